"""One training at a time holds a run folder or an address.

A claim of a process that has ended is taken over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latentae.errors import BusyError
from latentae.training.claim import CLAIM, Claim, FolderPlace
from latentae.training.mirror import Mirror, UrlPlace
from latentae.training.recipe import load_recipe
from latentae.training.train import train

QUICK = {"beat": 0.05, "watch": 0.5, "settle": 0.1}


def holder_of(folder: Path) -> dict:
    return json.loads((folder / CLAIM).read_text())


def claim_of(folder: Path, **changes: object) -> None:
    """A claim as another process would have left it."""
    claim = Claim(**QUICK)
    claim.take(FolderPlace(folder))
    holder = holder_of(folder)
    claim.release()
    folder.mkdir(exist_ok=True)
    (folder / CLAIM).write_text(json.dumps({**holder, "token": "other", **changes}))


def test_the_second_one_says_who_holds_the_run(tmp_path):
    run = tmp_path / "run"
    first = Claim(**QUICK)
    first.take(FolderPlace(run))
    with pytest.raises(
        BusyError, match=rf"run is in use by another training \(process {os.getpid()} on .*, since 20"
    ) as caught:
        Claim(**QUICK).take(FolderPlace(run))
    assert caught.value.exit_code == 75
    first.release()
    assert not run.exists()  # it stayed empty
    second = Claim(**QUICK)
    second.take(FolderPlace(run))
    second.release()


def test_a_claim_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from latentae.training.claim import Claim, FolderPlace\n"
        "Claim().take(FolderPlace(Path(sys.argv[1]))); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / CLAIM).exists()
    begun = time.monotonic()
    claim = Claim(watch=60)
    claim.take(FolderPlace(tmp_path))
    assert time.monotonic() - begun < 30
    claim.release()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path):
    claim_of(tmp_path, started="1")
    claim = Claim(watch=60)
    claim.take(FolderPlace(tmp_path))
    claim.release()


@pytest.mark.parametrize("where", ["another host", ""])
def test_a_silent_claim_of_another_host_is_taken_over_after_a_watch(tmp_path, where, capsys):
    claim_of(tmp_path, where=where, host="node7")
    claim = Claim(**QUICK)
    claim.take(FolderPlace(tmp_path))
    assert "is claimed by process" in capsys.readouterr().err
    assert holder_of(tmp_path)["host"] != "node7"
    claim.release()


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_claim_is_taken_over(tmp_path, left):
    (tmp_path / CLAIM).write_bytes(left)
    claim = Claim(**QUICK)
    claim.take(FolderPlace(tmp_path))
    claim.release()
    assert not (tmp_path / CLAIM).exists()


def test_a_claim_of_another_host_that_is_renewed_holds(tmp_path):
    claim_of(tmp_path, where="another host", host="node7")
    stop = threading.Event()

    def renew():
        while not stop.wait(0.02):
            holder = holder_of(tmp_path)
            (tmp_path / "new").write_text(json.dumps({**holder, "beat": holder["beat"] + 1}))
            (tmp_path / "new").replace(tmp_path / CLAIM)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(BusyError, match="on node7"):
            Claim(watch=10).take(FolderPlace(tmp_path))
    finally:
        stop.set()
        thread.join()


def test_who_was_taken_over_hears_of_it_and_leaves_the_claim_alone(tmp_path):
    lost = threading.Event()
    claim = Claim(lost=lost.set, **QUICK)
    claim.take(FolderPlace(tmp_path))
    claim.check()
    (tmp_path / "new").write_text(json.dumps({**holder_of(tmp_path), "token": "another", "host": "node8"}))
    (tmp_path / "new").replace(tmp_path / CLAIM)
    assert lost.wait(10)
    with pytest.raises(BusyError, match="on node8"):
        claim.check()
    claim.release()
    assert holder_of(tmp_path)["token"] == "another"


def test_an_address_is_held_by_one(tmp_path):
    mirror = Mirror(f"file://{tmp_path}/copies", {}, keep=2)
    first = Claim(**QUICK)
    first.take(UrlPlace(mirror))
    with pytest.raises(BusyError, match="copies is in use"):
        Claim(**QUICK).take(UrlPlace(mirror))
    first.release()
    assert not list((tmp_path / "copies").iterdir())


def test_of_two_that_claim_an_address_at_once_one_gets_it(tmp_path):
    mirror = Mirror(f"file://{tmp_path}/copies", {}, keep=2)
    place = UrlPlace(mirror)
    place.read = lambda read=place.read, first=[None]: (
        first.pop() if first else read()
    )  # it saw nothing there
    other = Claim(**QUICK)
    other.take(UrlPlace(mirror))
    late = Claim(**QUICK)
    late.take(place)  # wrote last
    time.sleep(0.3)
    with pytest.raises(BusyError):
        other.check()
    late.check()
    late.release()
    other.release()


def test_a_beat_that_was_slow_does_not_bring_a_released_claim_back(tmp_path):
    reading, released = threading.Event(), threading.Event()

    class Slow(FolderPlace):
        def read(self):
            found = super().read()
            if threading.current_thread().name == "claim":
                reading.set()
                released.wait(10)
            return found

    claim = Claim(beat=0.05)
    claim.take(Slow(tmp_path))
    beat = claim._thread
    assert reading.wait(10)
    claim.release()  # does not wait for the beat
    released.set()
    beat.join(10)
    assert not (tmp_path / CLAIM).exists()


def test_train_refuses_a_run_that_is_being_trained(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    holder = Claim()
    holder.take(FolderPlace(run))
    with pytest.raises(BusyError, match="is in use by another training"):
        train(small(), run)
    assert [entry.name for entry in run.iterdir()] == [CLAIM]
    holder.release()
    train(small(images=8, checkpoint_every_images=8), run)
    assert not (run / CLAIM).exists()
    monkeypatch.setattr(os, "access", lambda *_: False)  # a disk that is mounted read-only
    written = []  # by any claim, also of another run
    monkeypatch.setattr(FolderPlace, "write", lambda place, _: written.append(place.folder))
    train(small(images=8, checkpoint_every_images=8), run)
    assert run not in written, "a finished run is only reported"
    assert load_recipe(run / "recipe.toml").images == 8
