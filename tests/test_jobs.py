from __future__ import annotations

import json

import pytest

from latentae.errors import OutputError, RecipeError
from latentae.jobs import Job, first_difference, resolve_task, task_from_environment


def test_the_same_job_resumes_and_a_finished_one_says_so(tmp_path):
    out = tmp_path / "out"
    assert Job.open(out, "encode", {"a": 1}).state == "new"
    job = Job.open(out, "encode", {"a": 1})
    assert job.state == "resumed"
    job.finish(samples=3)
    assert Job.open(out, "encode", {"a": 1}).state == "finished"
    record = json.loads((out / "latentae.json").read_text())
    assert record["format_version"] == 1
    assert record["samples"] == 3


@pytest.mark.parametrize(
    ("verb", "inputs", "message"),
    [
        ("train", {"a": {"b": 1}}, "written by latentae encode, not by train"),
        ("encode", {"a": {"b": 2}}, "a.b was 1 and is now 2"),
        ("encode", {"a": {"b": 1}, "c": 3}, "c was not set and is now 3"),
    ],
)
def test_anything_else_is_refused_by_name(verb, inputs, message, tmp_path):
    Job.open(tmp_path / "out", "encode", {"a": {"b": 1}})
    with pytest.raises(OutputError, match=message):
        Job.open(tmp_path / "out", verb, inputs)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(OutputError, match=r"already contains thesis.doc"):
        Job.open(tmp_path, "encode", {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.doc"]
    with pytest.raises(OutputError, match="could not use"):
        Job.open(tmp_path / "thesis.doc", "encode", {})


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 99}'])
def test_a_damaged_or_newer_record_is_said(content, tmp_path):
    (tmp_path / "latentae.json").write_text(content)
    with pytest.raises(OutputError, match=r"latentae\.json"):
        Job.open(tmp_path, "encode", {})


def test_first_difference_of_equal_values_is_none():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None


def test_tasks_that_make_no_sense() -> None:
    assert resolve_task(1, 3) == (1, 3)
    for task, tasks in ((0, None), (None, 2), (2, 2), (-1, 2)):
        with pytest.raises(RecipeError):
            resolve_task(task, tasks)


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3"}, (0, 1)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (2, 4),
        ),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_task_from_environment(environment: dict[str, str], task: tuple[int, int]) -> None:
    assert task_from_environment(environment) == task
