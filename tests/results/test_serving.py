"""The local server of a report, and the files that replace those of an earlier report."""

import http.client
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.results import drawing
from dlopt.results.destination import destination
from dlopt.results.differences import config_rows, metric_rows
from dlopt.results.exports import ReportContent, write
from dlopt.results.leaderboard import Record
from dlopt.results.page import _escaped_json, serve
from dlopt.results.reading import condition, read_intact, select
from tests.support.folders import make_run, table

pytestmark = pytest.mark.drawn


def test_only_the_files_of_the_folder_are_served_and_only_to_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "inner").mkdir(parents=True)
    for name in ("index.html", "summary.csv", "a.png", "secret.txt", "inner/b.png"):
        (folder / name).write_text(name)
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "missing.html").mkdir()
    with serve(folder) as address:
        host = address.removeprefix("http://").removesuffix("/")
        port = int(host.rpartition(":")[2])
        assert host == f"127.0.0.1:{port}" and port > 0

        def get(path: str, name: str = host) -> tuple[int, dict[str, str], str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path, headers={"Host": name})
            answer = connection.getresponse()
            content = answer.read().decode(errors="replace")
            connection.close()
            return answer.status, dict(answer.getheaders()), content

        for path, kind in (("/", "text/html"), ("/index.html?x=1", "text/html"), ("/summary.csv", "text/csv")):
            status, headers, content = get(path, f"localhost:{port}")
            assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8"
            assert content == (path.partition("?")[0].removeprefix("/") or "index.html")
            assert headers["Content-Length"] == str(len(content)) and headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
            assert headers["Server"].strip() == "dlopt"
        assert get("/a.png")[1]["Content-Type"] == "image/png"
        for path in ("/inner/b.png", "/secret.txt", "/link.png", "/none.png", "/missing.html", "/..\\a.png"):
            assert get(path)[0] == 404, path
        for name in (f"example.org:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
            assert get("/", name)[0] == 403, name
    with pytest.raises(ConnectionRefusedError):
        get("/")


def test_a_report_replaces_the_plots_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "encoded", lambda figure, form: b"drawn")
    for i in range(2):
        make_run(tmp_path / f"runs/{i}", lr=0.1 * (i + 1))
    report = ReportContent(table(tmp_path / "runs"), "title", "now", None, test=False, refresh=None, top=20)
    folder = tmp_path / "report"
    folder.mkdir()
    names = ("importance.svg", "importance.png", "other.svg", "learning_rates.svg")
    for name in names:
        (folder / name).write_text("earlier")
    written = write(destination(tmp_path, str(folder), ["csv", "svg"], None), report)
    assert {path.name for path in folder.iterdir()} == {*(each.name for each in written), *names[1:]}
    assert (folder / "learning_rates.svg").read_text() != "earlier" and (folder / "other.svg").read_text() == "earlier"
    one = write(destination(tmp_path, str(folder), "svg", "learning_rates"), report)
    assert [path.name for path in one] == ["learning_rates.svg"] and (folder / "lr_sensitivity.svg").exists()
    file = write(destination(tmp_path, str(folder / "a.svg"), None, None), report)
    assert file == [folder / "a.svg"] and (folder / "lr_sensitivity.svg").exists()
    for output, formats, page in ((None, None, tmp_path / "report"), (None, "csv", None), ("x.html", None, None)):
        assert destination(tmp_path, output, formats, None).page == page  # type: ignore[arg-type]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert read_intact(folder).status == "finished"
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"run: config\.yaml is missing; nothing done"):
        read_intact(folder, "; nothing done")


def test_conditions_on_the_status_and_on_keys(tmp_path: Path) -> None:
    runs = [Record(Path(name), name, {"x": 1}, {"val_loss": 0.5}) for name in ("finished", "failed")]

    def selected(*lines: str) -> list[str]:
        parsed = [condition(line) for line in lines]
        return [run.status for run in select(runs, [each for each in parsed if each is not None])]

    assert selected("status=fa*") == ["failed"] and selected("status!=failed") == ["finished"]
    assert selected() == ["finished", "failed"] == selected("x=1", "val_loss<1") and selected("x>1") == []
    with pytest.raises(UserError, match="status=done: unknown status; allowed: finished, "):
        selected("status=done")
    with pytest.raises(UserError, match="y=2: unknown key; "):
        selected("y=2")


def test_differences_between_two_runs() -> None:
    first = Record(
        Path("a"), "finished", {"run_id": "1", "x": 1, "y": 2, "z": (1,)}, {"steps": 10, "val_loss": 0.123456}
    )
    second = Record(Path("b"), "finished", {"run_id": "2", "x": 1, "y": 3, "w": None}, {"val_accuracy": 0.5})
    assert config_rows(first, second) == [("y", "2", "3"), ("z", "[1]", "-"), ("w", "-", "null")]
    assert config_rows(first, first) == []
    assert metric_rows(first, second, brief=True) == [
        ("validation accuracy", "-", "50.00 %"), ("validation loss", "0.1235", "-"), ("steps", "10", "-"),
    ]  # fmt: skip
    assert metric_rows(first, second, brief=False)[1] == ("val_loss", "0.123456", "-")


def test_data_cannot_close_their_element() -> None:
    assert _escaped_json({"a": "</script>é&", "b": [1, None]}) == (
        '{"a":"\\u003c/script\\u003e\\u00e9\\u0026","b":[1,null]}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        _escaped_json({"a": float("nan")})
