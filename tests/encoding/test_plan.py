from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.encoding.plan import output_names, remove_leftovers, task_from_environment
from latentae.errors import ShardError

NAMES = st.lists(st.lists(st.sampled_from(["a", "b", "c.d", "e"]), min_size=1, max_size=3).map("/".join), min_size=1, unique=True)


def test_shards_of_one_folder_keep_their_names() -> None:
    assert output_names(["/data/x/0.tar", "/data/x/1.tar"]) == {"/data/x/0.tar": "0.tar", "/data/x/1.tar": "1.tar"}


@given(NAMES)
def test_two_shards_never_meet(names: list[str]) -> None:
    shards = [f"/data/{name}.tar" for name in names]
    outputs = output_names(shards)
    assert len(set(outputs.values())) == len(shards)
    for shard, output in outputs.items():
        assert shard.endswith(f"/{output}")
        assert not Path(output).is_absolute()


def test_relative_and_absolute_path_of_one_shard_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match="given twice"):
        output_names(["a.tar", str(tmp_path / "a.tar")])


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    shard = tmp_path / "a[0].tar"
    dead, alive, other = (
        tmp_path / name for name in (f".{shard.name}.1.incomplete", f".{shard.name}.2.incomplete", ".b.tar.1.incomplete")
    )
    for path in (shard, dead, alive, other):
        path.write_bytes(b"x")
    os.utime(dead, (0, 0))
    remove_leftovers(shard, older_than=600)
    assert sorted(tmp_path.iterdir()) == sorted([shard, alive, other])
    remove_leftovers(shard)
    assert sorted(tmp_path.iterdir()) == sorted([shard, other])


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
