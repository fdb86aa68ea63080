"""Sentences from templates, and findings on a terminal."""

from pathlib import Path

from dlopt.lab.report import Observation, observations, sentences, wrapped


def test_indented_lines_continue_a_sentence_and_values_can_neither_split_nor_colour_it(tmp_path: Path) -> None:
    template = tmp_path / "some.txt"
    template.write_text("{% for name in names %}\nwarning: {{ name }}\n  is wrong.\n{% endfor %}\n\nEnd.\n")
    found = sentences(template, names=["a\n  b", "<c>\x1b[31m"])
    assert found == ["warning: a� b is wrong.", "warning: <c>�[31m is wrong.", "End."]
    assert observations(template, names=["x"]) == [Observation("x is wrong.", is_warning=True), Observation("End.")]


def test_warnings_are_marked_on_the_terminal() -> None:
    assert wrapped([Observation("a" * 8, is_warning=True), "b c"], 12) == ["warning:", "  aaaaaaaa", "b c"]
