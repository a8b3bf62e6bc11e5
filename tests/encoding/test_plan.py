from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_output import Made

from latentae.data.shard_index import load_index
from latentae.encoding.plan import (
    Shard,
    find_finished,
    output_names,
    plan_digest,
    plan_shards,
)
from latentae.errors import ShardError

NAMES = st.lists(
    st.lists(st.sampled_from(["a", "b", "c.d", "e"]), min_size=1, max_size=3).map("/".join),
    min_size=1,
    unique=True,
)


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_two_shards_never_meet(names: list[str]) -> None:
    shards = [f"/data/{name}.tar" for name in names]
    outputs = output_names(shards)
    assert len(set(outputs.values())) == len(shards)
    for shard, output in outputs.items():
        assert shard.endswith(f"/{output}")
        assert not Path(output).is_absolute()


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        (["/data/x/0.tar", "/data/x/1.tar"], ["0.tar", "1.tar"]),
        (["/data/a/0.tar", "/data/a/../b/1.tar"], ["a/0.tar", "b/1.tar"]),
        (["s3://b/x/0.tar", "s3://b/x/1.tar"], ["0.tar", "1.tar"]),
        (["gs://b/x/0.tar", "gs://b/y/z/0.tar"], ["x/0.tar", "y/z/0.tar"]),
        (["https://user:secret@host/x/0.tar?signature=a/b"], ["0.tar"]),
        (["s3://b/0.tar", "s3://c/0.tar"], ["b/0.tar", "c/0.tar"]),
    ],
)
def test_shards_keep_their_names_below_the_folder_they_share(shards: list[str], names: list[str]) -> None:
    assert output_names(shards) == dict(zip(shards, names, strict=True))


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        (["a.tar", "{here}/a.tar"], "given twice"),
        (["/data/a.tar", "/data/x/../a.tar"], "given twice"),
        (
            ["https://me:secret@host/x/0.tar?signature=a/b", "https://host/x/0.tar?signature=c"],
            r"https://host/x/0\.tar is given twice",
        ),
        (["s3://b/a/../0.tar"], "contains '..'"),
        (["/data/a", "/data/a.tar"], "once with and once without"),  # their packed files would meet
        (["s3://b/0.tar", "/data/0.tar"], "different drives or file systems"),
    ],
)
def test_shards_that_would_meet_are_refused(
    shards: list[str], says: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match=says):
        output_names([shard.replace("{here}", str(tmp_path)) for shard in shards])


def test_plan_is_the_same_however_shards_are_listed(photos: Path) -> None:
    paths = sorted(str(path) for path in photos.glob("*.tar"))
    plans = [plan_shards(load_index(order)) for order in (paths, paths[::-1])]
    assert plans[0] == plans[1]
    assert [shard.name for shard in plans[0]] == [Path(path).name for path in paths]
    assert plan_digest(plans[0]) == plan_digest(plans[1])
    assert [shard.samples for shard in plans[0]] == [5, 1, 0, 6]


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_is_finished(tmp_path: Path, kind: str) -> None:
    made = Made(
        tmp_path / "out" if kind == "disk" else f"memory://{uuid.uuid4().hex}/out",
        tmp_path / "in",
        packed=True,
    )
    plan = [
        Shard("", name, sidecar.input.samples, sidecar.input.bytes)
        for name, sidecar in sorted(made.sidecars.items())
    ]
    plan.append(Shard("", "new.tar", 1, 1))

    def finished(fingerprint: str = "f" * 64) -> list[str]:
        found = [
            shard.name
            for shard, sidecar in find_finished(made.store, plan, fingerprint, made.store.sizes())
            if sidecar is not None
        ]
        assert found == [shard.name for shard in plan if shard.finished(made.store, fingerprint) is not None]
        return found

    assert finished() == ["a.tar", "deep/b.tar", "deep/c.tar"]
    assert finished("e" * 64) == []
    made.store.remove(made.sidecars["a.tar"].packed[0].name)
    made.replace("deep/b.tar", b"cut")
    assert finished() == ["deep/c.tar"]
    plan[2] = Shard("", "deep/c.tar", 5, plan[2].bytes + 1)
    assert finished() == []
