from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path

import fsspec
import pytest

import latentae
from latentae.errors import MissingDependencyError, OutputError, TrainingError
from latentae.files import sha256
from latentae.training import mirror as module
from latentae.training.checkpoint import find_checkpoint, verify
from latentae.training.mirror import Mirror
from latentae.training.steps import Trainer

INPUTS = {"recipe": {"seed": 0, "optimizer": {"lr": 1e-3}}, "data_digest": "abc"}
_numbers = count()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "memory":
        return f"memory://bucket{next(_numbers)}/runs/one"
    return f"file://{tmp_path}/store/runs/one"


def make(run, step, inputs=INPUTS, latest=True):
    """A checkpoint as far as a mirror is concerned."""
    folder = run / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    for name in ("ema.safetensors", "state.json"):
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 100)
    digests = {file.name: sha256(file) for file in folder.iterdir()}
    (folder / "meta.json").write_text(
        json.dumps({"format_version": 2, "step": step, "inputs": inputs, "sha256": digests})
    )
    if latest:
        (run / "checkpoints" / "latest").write_text(folder.name + "\n")
    return folder


def there(url, *path):
    fs, root = fsspec.core.url_to_fs(url)
    return sorted(p.rpartition("/")[2] for p in fs.ls("/".join([root, *path]), detail=False))


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Saboteur:
    """Replaces operations of the file system that fsspec also gives the mirror."""

    def __init__(self, url, monkeypatch):
        self.fs, self.monkeypatch = fsspec.core.url_to_fs(url)[0], monkeypatch

    def replace(self, name, make_broken):
        self.monkeypatch.setattr(self.fs, name, make_broken(getattr(self.fs, name)))

    def put_dies_half_way(self, from_call=0, times=10**9):
        """Copies break from a call on."""
        calls = count()

        def broken(plain):
            def put(source, target, **kwargs):
                if from_call <= next(calls) < from_call + times:
                    data = Path(source).read_bytes()
                    self.fs.pipe_file(target, data[: len(data) // 2])
                    raise ConnectionError("connection reset midway")
                return plain(source, target, **kwargs)

            return put

        self.replace("put_file", broken)


def denied(plain):
    def operation(*args, recursive=True, **kwargs):
        if recursive:  # a single file may be removed
            raise PermissionError("403 Forbidden")
        return plain(*args, **kwargs)

    return operation


@pytest.fixture
def sabotage(url, monkeypatch):
    return Saboteur(url, monkeypatch)


def test_copies_are_whole_the_oldest_go_and_another_machine_gets_the_newest(url, tmp_path, capsys):
    first = Mirror(url + "/", INPUTS, keep=2)
    first.claim()
    for step in (4, 8, 12):
        folder = make(tmp_path / "lost", step)
        assert Mirror(url, INPUTS, keep=5).push(folder)
    assert there(url) == ["latentae.json", "latest", "step-00000004", "step-00000008", "step-00000012"]
    assert first.push(folder)
    assert there(url) == ["latentae.json", "latest", "step-00000008", "step-00000012"]
    fs, root = fsspec.core.url_to_fs(url)
    assert fs.cat_file(f"{root}/latest") == b"step-00000012\n"
    assert {name: fs.cat_file(f"{root}/{folder.name}/{name}") for name in content(folder)} == content(folder)
    assert first.failures == 0
    second = Mirror(url, INPUTS, keep=2)
    second.claim()
    found = second.newest(tmp_path / "run")
    assert found == find_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000012"
    assert content(found) == content(folder)
    assert f"fetching {url}/step-00000012" in capsys.readouterr().err
    assert second.newest(tmp_path / "run") == found
    assert capsys.readouterr().err == "", "what is here is not fetched again"


def test_an_older_one_here_is_replaced_and_a_newer_one_here_is_copied(url, tmp_path):
    mirror, run = Mirror(url, INPUTS, keep=2), tmp_path / "run"
    mirror.claim()
    assert mirror.newest(run) is None
    mirror.push(make(tmp_path / "other", 8))
    make(run, 4)
    cut = make(run, 8, latest=False)  # a killed run came so far, but not to naming it: maybe incomplete
    (cut / "ema.safetensors").write_bytes(b"cut")
    assert mirror.newest(run) == cut
    verify(cut)
    shutil.rmtree(cut)  # it is named the latest, but gone
    assert mirror.newest(run) == cut
    verify(cut)
    newer = make(run, 12)
    assert mirror.newest(run) == newer
    assert there(url) == ["latentae.json", "latest", "step-00000008", "step-00000012"], (
        "a copy that failed is caught up on"
    )


def test_another_recipe_is_refused_and_the_key_is_named(url, tmp_path):
    mirror = Mirror(url, INPUTS, keep=2)
    mirror.claim()
    mirror.claim()
    mirror.push(make(tmp_path / "run", 4))
    other = Mirror(url, {**INPUTS, "recipe": {"seed": 0, "optimizer": {"lr": 2e-3}}}, keep=2)
    refusal = rf"{url} holds checkpoints of another run: recipe.optimizer.lr was 0.001 and is now 0.002"
    with pytest.raises(OutputError, match=refusal):
        other.claim()
    with pytest.raises(OutputError, match=refusal):
        other.newest(tmp_path / "other")
    assert find_checkpoint(tmp_path / "other") is None
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/latentae.json", b"<html>")
    with pytest.raises(OutputError, match=r"latentae\.json is damaged or not ours"):
        mirror.claim()


@pytest.mark.parametrize("from_call", [0, 1])
def test_a_copy_that_fails_is_said_and_counted_and_never_taken_for_whole(
    from_call, url, tmp_path, capsys, monkeypatch
):
    mirror = Mirror(url, INPUTS, keep=1)
    old = make(tmp_path / "run", 4)
    with monkeypatch.context() as broken:
        Saboteur(url, broken).put_dies_half_way(from_call, times=2)
        assert mirror.push(old), "it is tried again"
    with monkeypatch.context() as broken:
        Saboteur(url, broken).put_dies_half_way(from_call)
        for failures, step in enumerate((8, 12), 1):
            new = make(tmp_path / "run", step)
            assert not mirror.push(new)
            assert mirror.failures == failures
            line = capsys.readouterr().err
            assert f"WARNING: {new.name} was not copied: could not copy" in line
            assert (
                f"connection reset midway) in 3 tries; check the address and your access; "
                f"continuing with {new}" in line
            )
            assert f"({failures} not copied so far)" in line
            assert line.count("\n") == 1
    found = Mirror(url, INPUTS, keep=1).newest(tmp_path / "other")
    assert content(found) == content(old), "the older copy stays until a newer one is complete"
    assert mirror.push(new)
    assert there(url) == ["latest", new.name]


@pytest.mark.parametrize("name", ["latentae.json", "meta.json", "latest"])
def test_a_small_file_is_whole_or_not_there(name, url, tmp_path, monkeypatch):
    old, new = make(tmp_path / "run", 4), make(tmp_path / "run", 8)
    with monkeypatch.context() as broken:
        mirror = Mirror(url, INPUTS, keep=2)
        if name != "latentae.json":
            mirror.claim()
            mirror.push(old)

        def killing(plain):
            def pipe(path, data, **kwargs):
                if name not in path:
                    return plain(path, data, **kwargs)
                plain(path, data[: len(data) // 2])
                raise KeyboardInterrupt  # as if there were no more

            return pipe

        Saboteur(url, broken).replace("pipe_file", killing)
        with pytest.raises(KeyboardInterrupt):
            mirror.claim()
            mirror.push(new)
    after = Mirror(url, INPUTS, keep=2)
    after.claim()
    found = after.newest(tmp_path / "other")
    assert (found and content(found)) == {
        "latentae.json": None,
        "meta.json": content(old),
        "latest": content(new),
    }[name]


def test_a_half_written_copy_under_the_same_name_is_written_anew(url, tmp_path, monkeypatch):
    mirror = Mirror(url, INPUTS, keep=2)
    mirror.push(make(tmp_path / "first", 4))
    other = make(tmp_path / "second", 4, inputs={**INPUTS, "data_digest": "abd"})
    with monkeypatch.context() as broken:
        Saboteur(url, broken).put_dies_half_way()
        assert not mirror.push(other)
    assert "meta.json" not in there(url, "step-00000004")
    assert mirror.newest(tmp_path / "third") is None


def test_other_bytes_than_were_written_are_noticed(url, tmp_path, sabotage, capsys):
    mirror = Mirror(url, INPUTS, keep=2)

    def flipped(plain):
        def put(source, target, **kwargs):
            plain(source, target, **kwargs)
            if target.endswith("ema.safetensors"):
                sabotage.fs.pipe_file(target, bytes(byte ^ 1 for byte in sabotage.fs.cat_file(target)))

        return put

    sabotage.replace("put_file", flipped)
    assert not mirror.push(make(tmp_path / "run", 4))
    assert "step-00000004/ema.safetensors came back with other bytes" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flipped", "file gone", "list gone", "no list"])
def test_a_damaged_copy_is_not_taken_and_the_older_one_is(damage, url, tmp_path, capsys):
    mirror = Mirror(url, INPUTS, keep=2)
    old, new = make(tmp_path / "run", 4), make(tmp_path / "run", 8)
    mirror.push(old)
    mirror.push(new)
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{new.name}/"
    if damage == "flipped":
        fs.pipe_file(
            path + "ema.safetensors", bytes(byte ^ 1 for byte in fs.cat_file(path + "ema.safetensors"))
        )
    elif damage == "no list":
        fs.pipe_file(path + "meta.json", b'{"inputs": ')
    else:
        fs.rm_file(path + ("ema.safetensors" if damage == "file gone" else "meta.json"))
    found = mirror.newest(tmp_path / "other")
    assert content(found) == content(old)
    assert f"WARNING: the copy {url}/{new.name} is incomplete" in capsys.readouterr().err
    assert sorted(p.name for p in found.parent.iterdir()) == ["latest", old.name]


def test_neither_an_old_list_nor_an_old_name_hides_or_invents_a_copy(url, tmp_path, sabotage):
    mirror = Mirror(url, INPUTS, keep=2)
    for step in (4, 8, 12):
        new = make(tmp_path / "run", step)
        mirror.push(new)
    fs, root = fsspec.core.url_to_fs(url)
    stale = [
        f"{root}/{name}" for name in ("latest", "step-00000004", "step-00000008")
    ]  # as it was before the last checkpoint
    sabotage.replace("ls", lambda plain: lambda path, detail=True, **kwargs: list(stale))
    assert mirror.newest(tmp_path / "a") is not None
    assert content(find_checkpoint(tmp_path / "a")) == content(new), "known by name"
    newest = make(tmp_path / "run", 16)
    assert mirror.push(newest), "removing what is already gone is no failure"
    assert fs.cat_file(f"{root}/latest") == b"step-00000016\n"
    fs.pipe_file(f"{root}/latest", b"step-00000004\n")  # out of date: it is gone
    stale.append(f"{root}/step-00000016")
    assert content(mirror.newest(tmp_path / "b")) == content(newest), "known by the list"
    fs.pipe_file(f"{root}/latest", b"../../elsewhere\n")
    assert content(mirror.newest(tmp_path / "c")) == content(newest)


def test_copies_that_can_not_be_removed_are_said_and_stop_nothing(url, tmp_path, sabotage, capsys):
    mirror = Mirror(url, INPUTS, keep=1)
    mirror.push(make(tmp_path / "run", 4))
    sabotage.replace("rm", denied)
    assert mirror.push(make(tmp_path / "run", 8))
    assert mirror.failures == 0
    assert "WARNING: could not remove old copies" in capsys.readouterr().err


def test_at_the_start_an_address_that_fails_is_an_error(url, tmp_path, sabotage):
    mirror = Mirror(url, INPUTS, keep=1)
    sabotage.replace("pipe_file", denied)
    with pytest.raises(
        OutputError, match=r"could not write latentae.json at .*403 Forbidden\) in 1 tries; check the address"
    ):
        mirror.claim()
    sabotage.replace("cat_file", denied)
    with pytest.raises(OutputError, match="could not list the checkpoints"):
        mirror.newest(tmp_path)


def test_an_unknown_or_uninstalled_file_system_is_one_line():
    with pytest.raises(OutputError, match="checkpoint_url nowhere://x can't be opened"):
        Mirror("nowhere://x", INPUTS, keep=1)
    with pytest.raises(MissingDependencyError, match="install it and try again"):
        Mirror("oss://x", INPUTS, keep=1)


def test_a_run_that_is_to_end_does_not_wait_for_the_store(url, tmp_path, sabotage, monkeypatch):
    monkeypatch.setattr(module, "WAITS", (60.0, 60.0))
    mirror = Mirror(url, INPUTS, keep=1, stopping=lambda: True)
    sabotage.put_dies_half_way()
    assert not mirror.push(make(tmp_path / "run", 4))


def test_no_password_is_shown(tmp_path, capsys, monkeypatch):
    url = f"memory://me:secret@bucket{next(_numbers)}/run"
    mirror = Mirror(url, INPUTS, keep=1)
    Saboteur(url, monkeypatch).put_dies_half_way()
    mirror.push(make(tmp_path / "run", 4))
    assert "secret" not in capsys.readouterr().err


def test_a_newer_format_is_an_error_rather_than_an_older_checkpoint(url, tmp_path):
    mirror = Mirror(url, INPUTS, keep=2)
    mirror.push(make(tmp_path / "run", 4))
    mirror.push(make(tmp_path / "run", 8))
    fs, root = fsspec.core.url_to_fs(url)
    meta = json.loads(fs.cat_file(f"{root}/step-00000008/meta.json"))
    fs.pipe_file(f"{root}/step-00000008/meta.json", json.dumps({**meta, "format_version": 99}).encode())
    with pytest.raises(TrainingError, match="reads formats up to 2"):
        mirror.newest(tmp_path / "other")


def test_a_run_whose_disk_is_lost_goes_on_from_its_copies(small, whole_run, tmp_path, capsys):
    url = f"file://{tmp_path}/store"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as broken:
        broken.setattr(Trainer, "update", _interrupted_at(5))
        latentae.train(small(checkpoint_url=url), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "lost")
    with pytest.raises(
        OutputError, match=r"holds checkpoints of another run: recipe\.seed was 0 and is now 1"
    ):
        latentae.train(small(checkpoint_url=url, seed=1), tmp_path / "other")
    capsys.readouterr()
    latentae.train(small(checkpoint_url=url), tmp_path / "run")
    assert f"fetching {url}/step-00000004" in capsys.readouterr().err
    last, expected = (
        find_checkpoint(run) / "autoencoder.safetensors" for run in (tmp_path / "run", whole_run)
    )
    assert last.read_bytes() == expected.read_bytes()
    assert there(url) == ["latentae.json", "latest", "step-00000004", "step-00000006"]
    # a finished run makes up for a copy that failed
    shutil.rmtree(tmp_path / "store")
    latentae.train(small(checkpoint_url=url), tmp_path / "run")
    assert there(url) == ["latentae.json", "latest", "step-00000006"]


def _interrupted_at(step):
    update = Trainer.update

    def once(self, *arguments):
        if self.state.step == step:
            raise KeyboardInterrupt
        return update(self, *arguments)

    return once
