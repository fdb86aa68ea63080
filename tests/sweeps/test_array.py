"""Which jobs an element of the array of a submitted grid runs."""

import json
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.sweeps.array import (
    JOBS,
    WORKERS,
    JobArray,
    JobEntry,
    count_elements,
    format_indices,
    own_numbers,
    parse_part,
    read_array,
)


def array(jobs: int, elements: int) -> JobArray:
    return JobArray(tuple(JobEntry(str(number), f"seed={number}", "epochs=1") for number in range(jobs)), elements)


def test_every_job_is_in_one_element() -> None:
    """Elements run consecutive jobs, in order, and as many jobs as each other or one more."""
    for jobs in range(1, 40):
        for elements in range(1, jobs + 1):
            each = array(jobs, elements)
            runs = [each.jobs_of(element) for element in range(elements)]
            assert [number for run in runs for number in run] == list(range(jobs))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1
            assert [each.element_of(number) for number in range(jobs)] == [
                element for element, run in enumerate(runs) for _ in run
            ]


@pytest.mark.parametrize(
    ("jobs", "chunk", "n_jobs", "limit", "elements"),
    [
        (40, None, 16, 1001, 40),
        (1000, None, 16, 1001, 64),
        (10_000, None, 1000, 1001, 1001),
        (10_000, None, 1000, None, 4000),
        (10_000, None, 0, None, 10_000),
        (40, 4, 16, 1001, 10),
        (41, 4, 16, 1001, 11),
        (3, 8, 16, 1001, 1),
    ],
)
def test_the_number_of_elements(jobs: int, chunk: int | None, n_jobs: int, limit: int | None, elements: int) -> None:
    assert count_elements(jobs, chunk, n_jobs, limit) == elements


def test_more_elements_than_the_cluster_accepts() -> None:
    with pytest.raises(UserError, match=r"chunk=1: 10000 jobs .* 10000 elements, .*MaxArraySize .* 1001; use .*=10$"):
        count_elements(10_000, 1, 16, 1001)


def test_indices_of_sbatch() -> None:
    assert format_indices([0]) == "0"
    assert format_indices(range(40)) == "0-39"
    assert format_indices({7, 0, 1, 2, 9, 10, 12}) == "0-2,7,9-10,12"


@pytest.mark.parametrize(
    ("variables", "numbers"),
    [
        ({}, range(10)),
        ({"SLURM_ARRAY_TASK_ID": "0"}, range(2)),
        ({"PBS_ARRAY_INDEX": "4"}, range(8, 10)),
        ({"PBS_ARRAYID": "1"}, range(2, 4)),
        ({"SGE_TASK_ID": "1"}, range(2)),
        ({"SGE_TASK_ID": "undefined"}, range(10)),
        ({"LSB_JOBINDEX": "5"}, range(8, 10)),
        ({"LSB_JOBINDEX": "0"}, range(10)),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "2"}, range(4, 6)),
        ({"JOB_COMPLETION_INDEX": "3"}, range(6, 8)),
    ],
)
def test_the_index_of_a_scheduler(variables: dict[str, str], numbers: range) -> None:
    assert own_numbers(array(10, 5), None, variables) == numbers
    assert own_numbers(array(10, 5), parse_part("3/3"), variables) == range(6, 10)


def test_an_index_out_of_range() -> None:
    for name, value, last in (("PBS_ARRAY_INDEX", "5", "0 to 4"), ("SGE_TASK_ID", "6", "1 to 5")):
        with pytest.raises(UserError, match=f"{name}={value}: this sweep has the elements {last}"):
            own_numbers(array(10, 5), None, {name: value})
    for part in ("0/3", "4/3", "1/0"):
        with pytest.raises(UserError, match=f"part={part}: the parts are 1/"):
            parse_part(part)
    for part in ("3", "a/b", "-1/3", "1/3/4", "1.5/3"):
        with pytest.raises(UserError, match=f"part={part}: must be two numbers"):
            parse_part(part)


def test_the_file_of_the_jobs(tmp_path: Path) -> None:
    assert read_array(tmp_path) is None
    (tmp_path / WORKERS).mkdir()
    array(10, 5).write(tmp_path)
    assert read_array(tmp_path) == array(10, 5)
    entry = ["0", "", ""]
    for content in (
        "{", "[]", json.dumps({"elements": 2, "jobs": [entry]}), json.dumps({"elements": 1, "jobs": [["0", "", 1]]}),
        *(json.dumps({"elements": 1, "jobs": [[folder, "", ""]]}) for folder in ("/tmp", "../0", "", "a/../../b")),
    ):  # fmt: skip
        (tmp_path / WORKERS / JOBS).write_text(content)
        with pytest.raises(UserError, match=r"workers/jobs\.json: is damaged: .*; restore it, or submit"):
            read_array(tmp_path)
