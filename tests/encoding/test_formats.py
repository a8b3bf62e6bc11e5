"""Each layout is read as its trainer does, from descriptions of the layouts."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_writer import make_samples, write_output
from PIL import Image
from safetensors import safe_open
from torchvision.datasets import DatasetFolder

from latentae.data.transforms import crop_to_bucket
from latentae.encoding.formats import FORMATS, class_conditional, write
from latentae.errors import DataError, OutputError, RecipeError

LABELLED = ("lightningdit", "edm2", "repa", "mar", "fastdit")
FLIPPED = ("lightningdit", "mar")


def shards(**options):
    return {"a.tar": make_samples(5, **options), "b.tar": [], "c.tar": make_samples(7, 5, **options)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve latents with flips, labels and images, in the tar and packed, and their content."""
    made, home = shards(images=True), tmp_path_factory.mktemp("made")
    plain, packed = (write_output(home / name, made, packed=name == "packed") for name in ("plain", "packed"))
    return plain, packed, [one for samples in made.values() for one in samples]


@pytest.fixture(params=["in the tar", "packed"])
def latents(request, folders):
    plain, packed, made = folders
    return packed if request.param == "packed" else plain, made


def std(logvar):
    return torch.exp(0.5 * logvar)


def eps(z, one, flip=""):
    """The noise that a sample was drawn with."""
    return (torch.as_tensor(z) - one.tensors["mean" + flip]) / std(one.tensors["logvar" + flip])


def assert_standard_normal(noise):
    values = torch.stack(noise)
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5
    assert values.std().item() == pytest.approx(1, abs=5 / (2 * values.numel()) ** 0.5)


class LightningDiT:
    """Files in the order of names; random choice of latents or latents_flip; normalized."""

    def __init__(self, folder):
        self.places = []
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                self.places += [(path, row) for row in range(file.get_slice("labels").get_shape()[0])]
        statistics = torch.load(Path(folder) / "latents_stats.pt", weights_only=True)
        self.mean, self.std = statistics["mean"], statistics["std"]

    def __len__(self):
        return len(self.places)

    def item(self, index, name):
        path, row = self.places[index]
        with safe_open(path, framework="pt", device="cpu") as file:
            latent, label = file.get_slice(name)[row : row + 1], file.get_slice("labels")[row : row + 1]
        return ((latent - self.mean) / self.std).squeeze(0), label.squeeze(0)


def test_lightningdit(latents, tmp_path, monkeypatch):
    folder, made = latents
    out = write("lightningdit", folder, tmp_path / "out")
    names = sorted(path.name for path in out.glob("latents*"))
    assert names == [
        "latents_rank00_shard000.safetensors",
        "latents_rank00_shard001.safetensors",
        "latents_stats.pt",
    ]
    reader, noise = LightningDiT(out), []
    assert len(reader) == 12
    assert reader.mean.shape == reader.std.shape == (1, 4, 1, 1)
    for index, one in enumerate(made):
        for name, flip in (("latents", ""), ("latents_flip", "_flip")):
            latent, label = reader.item(index, name)
            assert latent.dtype == torch.float32
            assert label.dtype == torch.int64
            assert label.ndim == 0
            assert label == one.label
            noise.append(eps((latent * reader.std + reader.mean)[0], one, flip))
    assert_standard_normal(noise)
    statistics = json.loads((folder / "statistics.json").read_text())
    np.testing.assert_allclose(reader.mean.flatten(), statistics["latents_mean"], rtol=1e-6)
    np.testing.assert_allclose(reader.std.flatten(), statistics["latents_std"], rtol=1e-6)
    monkeypatch.setattr(class_conditional, "FILE_SAMPLES", 2)  # large shards are cut
    reader = LightningDiT(write("lightningdit", folder, tmp_path / "cut"))
    assert len(list((tmp_path / "cut").glob("latents_rank*"))) == 3 + 4
    assert [int(reader.item(index, "latents")[1]) for index in range(12)] == [one.label for one in made]


class Edm2:
    """Sorted npy files in a zip or folder, labels from dataset.json; mean + std * noise."""

    def __init__(self, path):
        self.path = Path(path)
        self.zip = zipfile.ZipFile(path) if self.path.suffix == ".zip" else None
        if self.zip:
            names = self.zip.namelist()
        else:
            names = [
                os.path.relpath(Path(root) / name, path) for root, _, files in os.walk(path) for name in files
            ]
        known = {*Image.registered_extensions(), ".npy"}
        self.names = sorted(name for name in names if os.path.splitext(name)[1].lower() in known)  # noqa: PTH122
        labels = dict(json.loads(self.bytes("dataset.json"))["labels"])
        self.labels = np.array([labels[name.replace("\\", "/")] for name in self.names]).astype(np.int64)

    def bytes(self, name):
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def item(self, index):
        array = np.load(io.BytesIO(self.bytes(self.names[index])))
        return array.reshape(-1, *array.shape[-2:]), self.labels[index]


@pytest.mark.parametrize("folder", [False, True])
def test_edm2(latents, tmp_path, folder):
    path = write("edm2", latents[0], tmp_path / "out", folder=folder)
    reader = Edm2(path)
    assert len(reader.names) == 12
    assert reader.names[0] == "00000/img-mean-std-00000000.npy"
    for index, one in enumerate(latents[1]):
        array, label = reader.item(index)
        assert array.dtype == np.float32
        mean, sigma = torch.from_numpy(array).chunk(2)
        assert torch.equal(mean, one.tensors["mean"])
        torch.testing.assert_close(sigma, std(one.tensors["logvar"]))  # not the log-variance
        assert label == one.label
    if not folder:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in reader.zip.infolist())
        reader.zip.close()


class Repa:
    """Images and features in two sorted folders, paired by position; labels by feature name."""

    def __init__(self, folder):
        known = {*Image.registered_extensions(), ".npy"}
        self.images, self.features = Path(folder) / "images", Path(folder) / "vae-sd"
        self.image_names, self.feature_names = (
            sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.suffix.lower() in known)
            for home in (self.images, self.features)
        )
        assert len(self.image_names) == len(self.feature_names)
        labels = dict(json.loads((self.features / "dataset.json").read_text())["labels"])
        self.labels = np.array([labels[name] for name in self.feature_names]).astype(np.int64)

    def item(self, index):
        image = np.array(Image.open(self.images / self.image_names[index]))
        image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
        return image, np.load(self.features / self.feature_names[index]), self.labels[index]


def test_repa(latents, tmp_path):
    reader = Repa(write("repa", latents[0], tmp_path / "out"))
    assert len(reader.labels) == 12
    assert [name[:-4] for name in reader.image_names] == [name[:-4] for name in reader.feature_names]
    for index, one in enumerate(latents[1]):
        image, moments, label = reader.item(index)
        original = torch.from_numpy(np.array(Image.open(io.BytesIO(one.members["png"])))).permute(2, 0, 1)
        assert torch.equal(
            torch.from_numpy(image.copy()), crop_to_bucket(original, (32, 32))
        )  # what was encoded
        mean, sigma = torch.from_numpy(moments)[None].chunk(2, dim=1)
        assert moments.dtype == np.float32
        assert torch.equal(mean[0], one.tensors["mean"])
        torch.testing.assert_close(sigma[0], std(one.tensors["logvar"]))
        assert label == one.label


def test_mar(latents, tmp_path):
    """torchvision's DatasetFolder over npz files; random choice of moments or moments_flip."""
    reader = DatasetFolder(
        str(write("mar", latents[0], tmp_path / "out")), loader=np.load, extensions=(".npz",)
    )
    assert len(reader) == 12
    by_number = {int(Path(path).stem): (path, target) for path, target in reader.samples}
    for index, one in enumerate(latents[1]):
        path, target = by_number[index]
        assert target == one.label
        with np.load(path) as file:
            assert sorted(file.files) == ["moments", "moments_flip"]
            for name, flip in (("moments", ""), ("moments_flip", "_flip")):
                assert file[name].dtype == np.float32
                mean, logvar = torch.from_numpy(file[name])[None].chunk(2, dim=1)
                assert torch.equal(mean[0], one.tensors[f"mean{flip}"])
                assert torch.equal(logvar[0], one.tensors[f"logvar{flip}"])  # not the standard deviation


class FastDiT:
    """Two sorted folders; batches [B, 1, z, h, w] and labels [B, 1] lose their second axis."""

    def __init__(self, folder):
        self.folders = [Path(folder) / name for name in ("imagenet256_features", "imagenet256_labels")]
        self.names = [sorted(path.name for path in home.iterdir()) for home in self.folders]
        assert len(self.names[0]) == len(self.names[1])

    def batch(self):
        features, labels = (
            torch.stack([torch.from_numpy(np.load(home / name)) for name in names])
            for home, names in zip(self.folders, self.names, strict=True)
        )
        return features.squeeze(dim=1), labels.squeeze(dim=1)


@pytest.mark.parametrize("scaling", [None, 0.18215])
def test_fastdit(latents, tmp_path, scaling):
    options = {} if scaling is None else {"scaling": scaling}
    reader = FastDiT(write("fastdit", latents[0], tmp_path / "out", **options))
    factor = scaling or json.loads((latents[0] / "statistics.json").read_text())["scaling_factor"]
    features, labels = reader.batch()
    assert features.shape == (12, 4, 4, 4)
    assert features.dtype == torch.float32
    assert labels.dtype == torch.int64
    noise = []
    for row, name in enumerate(reader.names[0]):
        one = latents[1][int(name.removesuffix(".npy"))]
        assert labels[row] == one.label
        noise.append(eps(features[row] / factor, one))
    assert_standard_normal(noise)


def kohya(image_path, original, bucket, model):
    """The cache file of an image, its validity and content. Sizes are (width, height)."""
    path = Path(os.path.splitext(image_path)[0] + f"_{original[0]:04d}x{original[1]:04d}_{model}.npz")  # noqa: PTH122
    with np.load(path) as file:
        expected = (bucket[1] // 8, bucket[0] // 8)
        assert file["latents"].shape[1:3] == expected
        flipped = file.get("latents_flipped")
        assert flipped is None or flipped.shape[1:3] == expected
        return file["latents"], file["original_size"].tolist(), file["crop_ltrb"].tolist(), flipped


@pytest.mark.parametrize(("model", "flip"), [("sd", True), ("sdxl", False)])
def test_kohya(tmp_path, model, flip):
    made = make_samples(9, buckets=((32, 32), (16, 48), (48, 16)), flip=flip, labels=0, images=True)
    folder = write_output(tmp_path / "latents", {"a.tar": made})
    out = write("kohya", folder, tmp_path / "out", model=model)
    noise = []
    for one in made:
        high, wide = one.info["original_size"]
        image = out / f"{one.key}.png"
        assert image.read_bytes() == one.members["png"]
        assert image.with_suffix(".txt").read_bytes() == one.members["txt"]
        latent, original, (left, top, right, bottom), flipped = kohya(
            str(image), (wide, high), one.bucket[::-1], model
        )
        assert latent.dtype == np.float32
        assert original == [wide, high]
        # The image fitted into the bucket with its shape: that wide and high, in the middle.
        assert (right - left) / (bottom - top) == pytest.approx(wide / high)
        assert right - left == one.bucket[1] or bottom - top == one.bucket[0]
        assert left == (one.bucket[1] - (right - left)) // 2
        assert top == (one.bucket[0] - (bottom - top)) // 2
        noise.append(eps(latent, one))
        assert (flipped is None) == (not flip)
        if flip:
            noise.append(eps(flipped, one, "_flip"))
    values = torch.cat([part.flatten() for part in noise])
    assert abs(values.mean().item()) < 5 / values.numel() ** 0.5


@pytest.mark.parametrize("format", FORMATS)
def test_same_latents_same_bytes_packed_or_not_and_finished_once(folders, tmp_path, format, snapshot, capsys):
    plain, packed, _ = folders
    target = write(format, plain, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert not any(".incomplete" in name for name in before)
    assert write(format, plain, tmp_path / "out") == target
    assert "already finished" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == before
    write(format, packed, tmp_path / "packed")
    again = snapshot(tmp_path / "packed")
    assert {**again, "latentae.json": b""} == {**before, "latentae.json": b""}
    other = write_output(tmp_path / "other", {"a.tar": make_samples(5, 100, images=True)})
    with pytest.raises(OutputError):
        write(format, other, tmp_path / "out")
    with pytest.raises(OutputError):
        write("kohya" if format != "kohya" else "edm2", plain, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


def test_missing_labels(tmp_path):
    made = shards(images=True)
    del made["c.tar"][2].members["cls"]
    folder = write_output(tmp_path / "latents", made)
    for format in LABELLED:
        with pytest.raises(DataError, match=r"1 of 12 have none.*photos/0007"):
            write(format, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    write("kohya", folder, tmp_path / "out")  # knows no labels


def test_what_a_layout_can_not_do_without_is_named(encoded, tmp_path):
    with pytest.raises(OutputError, match="downsamples by 8"):
        write("kohya", encoded, tmp_path / "out")
    bare = write_output(tmp_path / "bare", shards(flip=False))
    sizes = write_output(tmp_path / "sizes", shards(buckets=((32, 32), (16, 48)), images=True))
    empty = write_output(tmp_path / "empty", {"a.tar": []})
    for format in FLIPPED:
        with pytest.raises(OutputError, match="--flip"):
            write(format, bare, tmp_path / "out")
    for format in LABELLED:
        with pytest.raises(OutputError, match="16x48, 32x32"):
            write(format, sizes, tmp_path / "out")
        with pytest.raises(OutputError, match="no latents"):
            write(format, empty, tmp_path / "out")
    with pytest.raises(OutputError, match="--keep-images"):
        write("repa", bare, tmp_path / "out")
    gap = write_output(tmp_path / "gap", {"a.tar": [one for one in make_samples(9) if one.label != 1]})
    with pytest.raises(DataError, match="class 1"):
        write("mar", gap, tmp_path / "out")


def test_unknown_names(latents, tmp_path):
    with pytest.raises(RecipeError, match="lightningdit"):
        write("lightning", latents[0], tmp_path / "out")
    with pytest.raises(RecipeError, match="scaling"):
        write("fastdit", latents[0], tmp_path / "out", scale=1)
    with pytest.raises(RecipeError, match="sdxl"):
        write("kohya", latents[0], tmp_path / "out", model="flux")
    with pytest.raises(OutputError, match="local"):
        write("mar", latents[0], "memory://out")


@pytest.mark.parametrize("format", FORMATS)
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(folders, tmp_path, format, snapshot, monkeypatch):
    """The disk is full at the n-th flush or move, for every n."""
    folder = folders[0]
    replace, left = Path.replace, 10**9

    def step(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        os, "sync", step, raising=False
    )  # a real one would wait for all that this machine writes
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: (step() if "layout.incomplete" in str(self) else None, replace(self, to))[1],
    )
    write(format, folder, tmp_path / "whole")
    whole, steps = snapshot(tmp_path / "whole"), 10**9 - left
    assert steps >= 3
    for stop in range(steps):
        out, left = tmp_path / str(stop), stop
        with pytest.raises(OutputError, match="No space left"):
            write(format, folder, out)
        assert not json.loads((out / "latentae.json").read_text()).get("finished")
        left = 10**9
        write(format, folder, out)
        assert snapshot(out) == whole


TWO = """
import os, signal, sys, time
from pathlib import Path
from latentae.encoding.formats import write

folder, out, killed = sys.argv[1:]
def start(target):
    child = os.fork()
    if not child:
        os._exit(write("mar", folder, target) is None)
    return child
children = [start(out) for _ in range(2)]
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
child = start(killed)
DONE = Path(killed, "layout.incomplete/done/3")
while not DONE.exists() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
    time.sleep(0.0005)
os.kill(child, signal.SIGKILL)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_two_at_once_do_no_harm_and_a_killed_one_is_gone_on_with(tmp_path, snapshot):
    folder = write_output(tmp_path / "latents", {f"{n:02}.tar": make_samples(20, 20 * n) for n in range(6)})
    write("mar", folder, tmp_path / "whole")
    command = [sys.executable, "-c", TWO, str(folder), str(tmp_path / "out"), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes, killed = done.stdout.splitlines()
    assert codes == "[0, 0]", done.stderr
    assert int(killed) in (0, -signal.SIGKILL)  # a fast disk may be sooner
    assert "already finished" in done.stderr
    write("mar", folder, tmp_path / "killed")
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
