"""`dlopt sample`: prompts, seeds, temperature, the cache, and errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dlopt.basics.errors import RunError, UserError
from dlopt.commands.sample import sample
from dlopt.models.generation import draw, generate
from dlopt.models.gpt import GPT
from tests.support.gpt import CONTEXT, OPTIONS, gpt
from tests.support.runs import start

TINY = [
    "data.sequence_length=8", "model=gpt_nano", "model.width=12", "model.depth=1", "threads=1", "device=cpu",
    "tracking=[]", "steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    (folder / "a.txt").write_text("def f(x): return x\n" * 100)
    start(folder / "run", "data=text", f"data.file={folder}/a.txt", *TINY)
    return folder / "run"


def test_continues_the_prompt_by_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*keys: str) -> str:
        assert sample([f"checkpoint={run}", "length=30", *keys]) == 0
        return capsys.readouterr().out

    text = printed("prompt=def f(x): {a, [b] = ")  # not a value in Hydra's grammar
    assert text.startswith("def f(x): {a, [b] = ") and len(text) > 40
    assert printed("prompt=def ", "seed=3") == printed("prompt=def ", "seed=3") != printed("prompt=def ", "seed=4")
    first, line, second = printed("prompt=def ", "samples=2", "seed=3").partition("-" * 40)
    assert line and first.strip() == printed("prompt=def ", "seed=3").strip() and first.strip() != second.strip()
    assert printed("temperature=0", "seed=1") == printed("top_k=1", "seed=2")
    (run.parent / "start.txt").write_text("def")
    assert printed(f"file={run.parent}/start.txt", "temperature=0").startswith("def")


def test_continues_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val"):
        (np.arange(300, dtype="<u2") % 30).tofile(tmp_path / f"{name}.bin")
    start(tmp_path / "run", "data=tokens", f"data.root={tmp_path}", "data.vocabulary=30", *TINY)
    sample([f"checkpoint={tmp_path}/run", "prompt=[3,4,5]", "length=4"])
    numbers = list(map(int, capsys.readouterr().out.split()))
    assert numbers[:3] == [3, 4, 5] and len(numbers) == 7 and max(numbers) < 30
    for prompt in ("prompt=def", "prompt=[30]", "seed=1"):
        with pytest.raises(UserError, match="the model reads tokens 0 to 29"):
            sample([f"checkpoint={tmp_path}/run", prompt])


def test_errors(run: Path, tmp_path: Path) -> None:
    for keys, message in (
        (["prompt="], "prompt=: is empty"),
        (["file=missing.txt"], "file=missing.txt: cannot be read"),
        (["temperature=-1"], "temperature=-1"),
        (["words=3"], "words"),
        (["precision=bf16"], "precision=bf16: samples are computed in fp32"),
    ):
        with pytest.raises(UserError, match=message):
            sample([f"checkpoint={run}", *keys])
    start(tmp_path / "digits", "model=mlp", "model.widths=[4]", "steps=1", "tracking=[]", "threads=1", "device=cpu")
    with pytest.raises(UserError, match="its model predicts no text"):
        sample([f"checkpoint={tmp_path}/digits"])


@pytest.mark.parametrize("options", OPTIONS)
def test_the_cache_does_not_change_the_samples(options: dict[str, object]) -> None:
    model = gpt(**options).eval()
    prompt = torch.tensor([1, 2, 3])

    def tokens(cache: bool, model: torch.nn.Module = model) -> list[int]:
        rng = torch.Generator().manual_seed(0)
        keys = {"context": CONTEXT, "temperature": 1.0, "top_k": 6, "generator": rng, "cache": cache}
        return list(generate(model, prompt, 4 * CONTEXT, **keys))  # type: ignore[arg-type]

    assert isinstance(model, GPT) and tokens(True) == tokens(False)


def test_extreme_draws() -> None:
    logits, rng = torch.tensor([1.0, 3.0, 2.0]).double(), torch.Generator()
    assert draw(logits, 1e-320, None, rng) == 1, "overflows to -inf, not to inf"
    for temperature in (0.0, 1.0):
        with pytest.raises(RunError, match="not finite"):
            draw(logits * torch.nan, temperature, None, rng)


def test_draws_follow_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2)):
        counts = torch.bincount(torch.tensor([draw(logits, temperature, top_k, rng) for _ in range(4000)]), minlength=4)
        expected = (logits / temperature).exp()
        if top_k is not None:
            expected[[0, 3]] = 0
        torch.testing.assert_close(counts / 4000, expected / expected.sum(), rtol=0, atol=0.03, check_dtype=False)
