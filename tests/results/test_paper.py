"""Tables for papers."""

import subprocess
from pathlib import Path

import pytest

from dlopt.results import paper
from tests.support.folders import make_run, table
from tests.support.requires import requires

EVIL = r"a_b & 50% #1 {x} ^2 ~ \input{secret} $|<>"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """0.9 and 0.8 over three seeds, equal to 0.9 in one of them, and one that failed."""
    for lr, top in ((0.1, 0.9), (0.2, 0.8), (0.3, 0.9)):
        for seed in range(3):
            accuracies = (0.5, top + 0.01 * (seed - 1))
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=accuracies, test=top - 0.05)
    make_run(tmp_path / "failed", lr=9.0, accuracies=(0.1, 0.1), status="failed", config={"model.widths": EVIL})
    return tmp_path


def test_latex_has_booktabs_means_and_deviations(sweep: Path) -> None:
    text = paper.latex(table(sweep), made="made now", test=False, top=20)
    lines = text.splitlines()
    assert lines[0] == "% made now" and r"\toprule" in lines and r"\midrule" in lines and r"\bottomrule" in lines
    assert lines[lines.index(r"\toprule") + 1].split(" & ") == [
        "hidden units", "learning rate", "", "runs", r"validation accuracy (\%)", r"test accuracy (\%)",
        r"vs. best (points) \\",
    ]  # fmt: skip
    rows = [line.removesuffix(r" \\").split(" & ")[1:] for line in lines if line.startswith("{}[64,64]")]
    best = r"$\mathbf{90.00 \pm 1.00}$"
    assert rows == [
        ["0.1", "", "3", best, r"$85.00 \pm 0.00$", ""],
        ["0.3", "a", "3", best, r"$85.00 \pm 0.00$", "$+0.00$"],
        ["0.2", "b", "3", r"$80.00 \pm 1.00$", "", "$-10.00$"],
    ]
    remarks = ("a: equal to \\#1 in every run", "b: the same difference in every seed, so no interval")
    said = [rf"\multicolumn{{7}}{{l}}{{\footnotesize {remark}}} \\" for remark in remarks]
    assert lines[lines.index(r"\bottomrule") + 1 :] == [*said, r"\end{tabular}"]
    assert r"$85.00 \pm 0.00$" in paper.latex(table(sweep), made="", test=True, top=20).split("& 0.3 &")[1]
    assert "the first 2 of 4 configurations" in paper.latex(table(sweep), made="", test=False, top=2)


def test_losses_have_no_percent(sweep: Path) -> None:
    text = paper.latex(table(sweep, "val_loss"), made="", test=False, top=20)
    assert "validation loss & test accuracy" in text and r"$\mathbf{0.1000 \pm 0.0100}$" in text


def test_markdown(sweep: Path) -> None:
    lines = paper.markdown(table(sweep), made="made now", test=False, top=20).splitlines()
    assert lines[0].startswith("| hidden units | learning rate |  | runs |") and set(lines[1]) <= set("| -:")
    assert "| 90.00 ± 1.00 | 85.00 ± 0.00 |" in lines[2] and lines[-1].endswith("made now.")
    assert all(line.replace(r"\|", "").count("|") == lines[0].count("|") for line in lines[:6])
    assert lines[6:10] == [
        "", "- a: equal to #1 in every run", "- b: the same difference in every seed, so no interval", "",
    ]  # fmt: skip
    assert "verdict: " in lines[-1]


def test_lines_of_remarks_fit_a_page(tmp_path: Path) -> None:
    """The rows that are not shown are named."""
    for lr in (0.1, 0.2):
        for seed in range(3 if lr == 0.1 else 4):
            make_run(tmp_path / f"{lr}-{seed}", lr=lr, seed=seed, accuracies=(0.5, 1 - lr + 0.01 * seed))
    text = paper.latex(table(tmp_path), made="", test=False, top=1)
    remarks = [line.partition("footnotesize ")[2].removesuffix(r"} \\") for line in text.splitlines()]
    remarks = [line for line in remarks if line]
    assert len(remarks) == 5 and all(len(line) < 85 for line in remarks)
    assert remarks[0].startswith("a: warning: without some seeds") and r"\#2: the same difference" in remarks[-1]


@pytest.mark.slow
@requires("pdflatex")
def test_latex_compiles_whatever_the_values(sweep: Path) -> None:
    (sweep / "table.tex").write_text(paper.latex(table(sweep), made=EVIL, test=True, top=20))
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table.tex}\end{document}"
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", document]
    done = subprocess.run(command, cwd=sweep, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout


def test_runs_that_do_not_count_are_named(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / str(seed), seed=seed, status="finished" if seed else "failed")
    text = paper.markdown(table(tmp_path), made="", test=False, top=20)
    assert (
        text.startswith("|  | runs |") and "| a | 2 of 3, 1 failed | 80.00 ± 0.00 |" in text and "those of one" in text
    )
    assert "2 of 3, 1 failed & " in paper.latex(table(tmp_path), made="", test=False, top=20)
