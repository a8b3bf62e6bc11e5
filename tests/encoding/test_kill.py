"""An output survives kills at any moment and a second worker. See kill_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.fixture
def many(jpeg, write_tar, tmp_path):
    """Six shards of 4 images, one image of which can't be read."""
    for shard in range(6):
        members = {}
        for number in range(4):
            members[f"{shard}-{number}.jpg"] = (
                jpeg(8 * shard + number, 40 + number, 44) if (shard, number) != (3, 3) else b"x"
            )
            members[f"{shard}-{number}.txt"] = b"caption"
        write_tar(tmp_path / f"in/{shard}.tar", members)
    return tmp_path / "in"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("packed", "kills"), [(True, 4), pytest.param(False, 40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_byte_for_byte_like_the_uninterrupted_run(
    packed, kills, model, many, tmp_path
):
    kills = int(os.environ.get("LATENTAE_KILLS", kills))
    options = {
        "batch_size": 2,
        "device": "cpu",
        "max_bad_share": 0.1,
        "flip": packed,
        "packed": packed,
        "workers": 2,
    }
    command = [
        sys.executable,
        str(WORKER),
        str(model),
        str(many),
        str(tmp_path),
        str(kills),
        json.dumps(options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    print(found)
    assert sum(found["fell"].values()) >= kills
    assert found["races"]
    assert found["left_behind"] or kills < 10, "some kills fell into the writing of a file"
