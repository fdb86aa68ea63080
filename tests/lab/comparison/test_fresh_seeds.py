"""scripts/claims.py: verdicts in docs/gallery against those of fresh seeds."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from dlopt.lab.comparison.frozen import claims_hash
from tests.support.pages import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts/claims.py"))
VERDICTS = {"supported", "inconclusive", "contradicted"}


def results(*verdicts: str, saved: str = "x") -> dict[str, Any]:
    claims = [{"claim": f"claim {i}", "verdict": each, "outcome": "1 against 2"} for i, each in enumerate(verdicts)]
    return {"claims_hash": saved, "seeds": [0, 1], "claims": claims}


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    found: tuple[list[str], bool] = SCRIPT["report"](list(SCRIPT["pairs"]("momentum", old, new)))
    return found


def test_verdicts_of_fresh_seeds_are_compared_claim_by_claim() -> None:
    lines, is_good = compare(results("supported", "inconclusive"), results("supported", "supported"))
    assert lines == [
        "momentum: inconclusive -> supported: claim 1\n    1 against 2",
        "1 of 2 verdicts are the same (50.0 %); supported <-> contradicted: 0",
    ]
    assert not is_good
    assert compare(results(*["supported"] * 40), results(*["supported"] * 39, "inconclusive"))[1]
    assert not compare(results(*["supported"] * 40), results(*["supported"] * 39, "contradicted"))[1]


def test_claims_that_were_changed_do_not_count() -> None:
    assert not list(SCRIPT["pairs"]("momentum", results("supported"), results("supported", saved="y")))


def test_recipes_run_with_fresh_seeds_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        folder = Path(next(line for line in command if line.startswith("hydra.run.dir=")).partition("=")[2])
        folder.mkdir(parents=True)
        (folder / "comparison.json").write_text(json.dumps(results("supported")))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(SCRIPT["subprocess"], "run", run)
    for _ in range(2):
        assert SCRIPT["run_all"](["momentum", "warm_restarts"], tmp_path, 1000, None) == 0
    assert [command[4].partition("/")[2] for command in calls] == ["momentum", "warm_restarts"]
    assert calls[0][-1] == f"comparison.seeds=[{','.join(map(str, range(1000, 1010)))}]"
    assert json.loads((tmp_path / "seconds.json").read_text()).keys() == {"momentum", "warm_restarts"}
    assert SCRIPT["run_all"](["clipping"], tmp_path, 1000, 0.0) == 0 and len(calls) == 2  # out of time


def test_verdicts_of_fresh_seeds_are_recorded_for_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    import gallery

    path = tmp_path / "gallery/fresh/1000.json"
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/momentum.json").write_text(json.dumps(results("supported", "supported")))
    SCRIPT["record"]({"clipping": results("supported")}, path)
    SCRIPT["record"]({"momentum": results("supported", "inconclusive")}, path)
    assert json.loads(path.read_text()).keys() == {"clipping", "momentum"}
    assert gallery.fresh_verdicts(tmp_path, "clipping") == {}  # no results in the gallery
    found = gallery.fresh_verdicts(tmp_path, "momentum")
    assert found == {"1000": {"claim 0": "supported", "claim 1": "inconclusive"}}
    claim = {"claim": "A beats B", "verdict": "supported", "outcome": "2x.", "when_not": "", "changed": False}
    line = gallery._claim(claim, {"1000": "supported", "3000": "inconclusive", "2000": "inconclusive"})
    assert line == "- **Supported:** A beats B. 2x. But inconclusive with seeds from 2000, 3000."
    assert gallery._seeds(tmp_path, found) == "" and gallery._seeds(tmp_path, {}) == " (new seeds: none)"
    pairs = [("supported", "supported"), ("supported", "contradicted")]
    [line, _] = gallery._sets({"1000": pairs})
    assert line.startswith("- Seeds from 1000 on: 1 of 2 verdicts are the same (50.0 %);") and line.endswith(": 1.")
    [_, last, both, _] = gallery._sets({"10000": pairs, "2000": pairs[:1]})
    assert last.startswith("- Seeds from 10000 on")
    assert both.startswith("- Together: 2 of 3 verdicts are the same (66.7 %)")
    SCRIPT["record"]({"momentum": results("supported", saved="y")}, path)
    assert gallery.fresh_verdicts(tmp_path, "momentum") == {}  # of other claims


@pytest.mark.parametrize("path", sorted((ROOT / "docs/gallery").glob("*.json")), ids=lambda path: path.stem)
def test_results_in_the_gallery_have_hashes_and_current_verdicts(path: Path) -> None:
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert len(saved["claims_hash"]) == 64 and saved["recipe"] == f"lecture/{path.stem}"
    assert {claim["verdict"] for claim in saved["claims"]} <= VERDICTS
    assert claims_hash({}) != saved["claims_hash"]


def test_claims_are_judged_again_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = runpy.run_path(str(ROOT / "scripts/gallery"))
    for name in ("schedules", "correlated_inputs"):  # of several sides, and with bounds
        text = (ROOT / f"docs/gallery/{name}.json").read_text(encoding="utf-8")
        (tmp_path / f"{name}.json").write_text(text.replace('"supported"', '"inconclusive"'))
        gallery["judge_claims"].__globals__["FOLDER"] = tmp_path
        gallery["judge_claims"](name)
        assert (tmp_path / f"{name}.json").read_text() == text
    assert "schedules: inconclusive -> supported: The cosine ends lower" in capsys.readouterr().out


def test_the_optimizers_on_a_gpt_are_drawn_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = runpy.run_path(str(ROOT / "scripts/gallery"))
    drawn: list[Any] = []
    monkeypatch.setitem(gallery["draw_optimizers"].__globals__, "save", lambda figure, name: drawn.append(figure))
    gallery["draw_optimizers"]()
    [axes] = drawn[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert (len(labels), labels[0], labels[-1]) == (10, "lion, 0.001", "dmuon, 0.03")
    assert list(axes.lines[0].get_xdata())[-1] == 2.182


def test_pictures_along_a_key_are_redrawn_from_the_results() -> None:
    gallery = runpy.run_path(str(ROOT / "scripts/gallery"))
    results = gallery["saved_results"]("momentum")
    saved = json.loads((ROOT / "docs/gallery/momentum.json").read_text(encoding="utf-8"))
    for row in saved["rows"]:
        finals = results.finals(row["variant"], "train_loss")[tuple(row["at"].values())]
        assert [None if value != value else value for value in finals] == row["train_loss"]
    assert gallery["saved_results"]("second_order") is None  # it shows curves
    chosen = gallery["saved_results"]("weight_decay_adam")  # by the validation accuracy, which it does not show
    best = {
        variant: [point for point, values in chosen.finals(variant, "val_accuracy").items() if values[0]]
        for variant in chosen.comparison.variants
    }
    assert best == {"Adam, L2 in the loss": [(0.01, 0.01)], "AdamW, decoupled": [(0.01, 1.0)]}
