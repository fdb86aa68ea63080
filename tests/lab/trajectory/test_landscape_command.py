"""`dlopt trajectory checkpoint=...`: loss landscapes."""

from pathlib import Path

import pytest

from tests.support.line import SMALL, dlopt, refused

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscape")
    line = [each for each in SMALL if not each.startswith("epochs")]
    result = dlopt(folder, "train", *line, "epochs=4", "checkpoint.keep=10", "hydra.run.dir=run", "tracking=[]")
    assert result.code == 0, result.err
    return folder


def test_path_and_random_directions(trained: Path) -> None:
    for directions in ("auto", "random"):
        line = ["checkpoint=run/checkpoints/last.pt", f"directions={directions}", "points=5", f"output={directions}"]
        result = dlopt(trained, "trajectory", *line)
        assert result.code == 0, result.err
        centre = "run, path to epoch 4" if directions == "auto" else "run/checkpoints/last.pt, epoch 4"
        assert f"Loss landscape of {centre}" in (trained / f"{directions}/landscape.svg").read_text()
        assert result.out.splitlines() == [f"{directions}/landscape.png", f"{directions}/landscape.svg"]
    svgs = [(trained / f"{directions}/landscape.svg").stat().st_size for directions in ("auto", "random")]
    assert min(svgs) > 10_000


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("checkpoint=run/checkpoints/none.pt", "none.pt"),
        ("points=2", "points=2: "),
        ("directions=pca", "directions=pca: "),
        ("optimizer.lr=1", "optimizer.lr: the config is the checkpoint's"),
        ("span=0", "span=0: "),
    ],
)
def test_refused(trained: Path, typed: str, message: str) -> None:
    line = [] if typed.startswith("checkpoint") else ["checkpoint=run/checkpoints/last.pt"]
    assert message in refused(trained, "trajectory", *line, typed)
