"""Standard streams as shells and daemons give them: closed, ASCII, or none at all; and names that
are not UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import latentae
from latentae.cli import main
from latentae.files import read_json, write_json, write_text
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder
from latentae.progress import Progress, say

NAMES = [b"caf\xe9", b"plain", "é".encode(), b"folder/x\xff"]
KEYS = [name.decode("utf-8", "surrogateescape") for name in NAMES]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """One shard whose member names are Latin-1, UTF-8 and neither."""
    folder = tmp_path_factory.mktemp("shards")
    with tarfile.open(folder / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for number, key in enumerate(KEYS):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            for name, data in ((f"{key}.png", buffer.getvalue()), (f"{key}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    LinearAutoencoder(LinearAutoencoderConfig(patch=4, sample_size=16)).save_pretrained(folder)
    return folder


def escaped(key: str) -> str:
    return key.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_features_of_names_that_are_not_utf8(format, shards, model, tmp_path):
    out = tmp_path / "out"
    latentae.features(model, shards, out, format=format, device="cpu")
    with (out / "index.csv").open(encoding="utf-8", newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == [escaped(key) for key in KEYS]
    if format == "npz":
        with np.load(out / "features-00000.npz") as arrays:
            assert arrays["keys"].tolist() == KEYS
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "key,label\n" + "".join(f"{escaped(key)},{number}\n" for number, key in enumerate(KEYS))
    )
    latentae.features(model, shards, tmp_path / "labelled", labels=labels, device="cpu")
    with (tmp_path / "labelled/index.csv").open(encoding="utf-8", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse names that are not UTF-8")
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_denoise_names_that_are_not_utf8(noise, shards, model, tmp_path):
    latentae.denoise(model, shards, tmp_path / "out", noise=noise, device="cpu")
    found = {
        os.fsencode(path.relative_to(tmp_path / "out/images"))
        for path in (tmp_path / "out/images").rglob("*.png")
    }
    assert found == {name + b".png" for name in NAMES}
    if noise:
        text = (tmp_path / "out/psnr.csv").read_text(encoding="utf-8")
        assert all(f"{escaped(key)}," in text for key in KEYS)


def test_a_bad_sample_whose_name_is_not_utf8_is_recorded(shards, tmp_path):
    """By encode, whose sidecars name what was skipped."""
    from latentae.models.autoencoder import AutoencoderKL
    from latentae.models.presets import preset

    AutoencoderKL(preset("tiny", block_out_channels=(8, 8, 8), sample_size=16)).save_pretrained(
        tmp_path / "model"
    )
    bad = tmp_path / "bad"
    bad.mkdir()
    with tarfile.open(bad / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in (f"{KEYS[0]}.png", f"{KEYS[1]}.png"):
            with tarfile.open(shards / "a.tar", encoding="utf-8", errors="surrogateescape") as source:
                file = source.extractfile(name)
                assert file is not None
                data = b"damaged" if name.startswith(KEYS[0]) else file.read()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    latentae.encode(tmp_path / "model", bad, tmp_path / "out", device="cpu", batch_size=2, max_bad_share=0.9)
    sidecar = json.loads((tmp_path / "out/a.tar.done.json").read_text(encoding="utf-8"))
    assert KEYS[0] in json.dumps(sidecar, ensure_ascii=False)
    again = latentae.encode(
        tmp_path / "model", bad, tmp_path / "out", device="cpu", batch_size=2, max_bad_share=0.9
    )
    assert again["finished"]


def test_json_keeps_such_names_and_text_escapes_them(tmp_path):
    write_json(tmp_path / "a.json", {KEYS[0]: KEYS[2]})
    assert read_json(tmp_path / "a.json") == {KEYS[0]: KEYS[2]}
    write_text(tmp_path / "a.txt", KEYS[0])
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == r"caf\udce9"


def test_functions_work_without_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody reads this")
    with Progress("work", 2, every=0) as progress:
        progress.advance(2)
    monkeypatch.undo()
    assert capsys.readouterr().out == ""


def run(command: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = f'"{sys.executable}" -m latentae {command} {shell}'
    return subprocess.run(
        ["/bin/sh", "-c", line],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
class TestStreamsOfAShell:
    def test_order_into_ascii(self, shards):
        result = run(f'order "{shards}" --global-batch 4', PYTHONIOENCODING="ascii")
        assert result.returncode == 0, result.stderr
        keys = {line.partition("\t")[2] for line in result.stdout.decode("ascii").splitlines()}
        assert keys == {key.encode("ascii", "backslashreplace").decode() for key in KEYS}

    @pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&- <&-"])
    def test_a_verb_without_streams(self, closed, shards, tmp_path):
        result = run(f'index "{shards}" "{tmp_path}"', closed)
        assert (result.returncode, result.stdout) == (0, b""), result.stderr
        assert list(tmp_path.iterdir())

    @pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
    def test_an_error_without_streams(self, closed):
        result = run("order /nowhere", closed)
        assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")


@pytest.mark.parametrize("missing", [("stderr",), ("stdout",), ("stdin", "stdout", "stderr")])
@pytest.mark.parametrize("verb", ["features", "denoise", "reconstruct", "order", "encode"])
def test_verbs_without_streams(verb, missing, shards, model, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    words = {
        "features": [model, shards, "--out", tmp_path / "out", "--device", "cpu"],
        "denoise": [model, shards, "--out", tmp_path / "out", "--device", "cpu"],
        "reconstruct": [model, picture, "--out", tmp_path / "out.png", "--device", "cpu"],
        "order": [shards, "--global-batch", "4"],
        "encode": [model, shards, tmp_path / "out", "--device", "cpu"],
    }
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main([verb, *map(str, words[verb])])
    made = [getattr(sys, name) for name in missing]
    monkeypatch.undo()
    for stream in made:
        stream.close()
    assert ended.value.code == 0


def test_a_closed_descriptor_is_not_given_to_a_file(tmp_path):
    """What C libraries write to descriptor 2 must not land in the first file that is opened."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from latentae.cli import _open_streams\n"
        "_open_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'wb', buffering=0)\n"
        "os.write(2, b'a message of a library')\n"
        "print('x', file=sys.stderr)\n"
        "sys.exit(file.fileno() < 3)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], preexec_fn=lambda: os.close(2)) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "file").read_bytes() == b""
