"""Files: lines that another process appends."""

from pathlib import Path

from dlopt.basics.files import NewLines


def test_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb")
    lines = NewLines(path)
    assert lines.read() == b"a"
    assert lines.read() == b""
    path.write_bytes(b"a\nbc\nd\n")
    assert lines.read() == b"bc\nd"
    path.write_bytes(b"a\n")  # shorter: a resumed run removes the lines after its checkpoint
    assert lines.read() == b"a"
