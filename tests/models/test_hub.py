"""Models by their name on the Hub, with a stand-in for the Hub: nothing here uses a network."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
from small_models import equal

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset
from latentae.models.pretrained import hub_id, resolve_model

CONFIG = preset("tiny", block_out_channels=(8, 8, 16))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The Hub as a folder: someone/model has its files that match the requested patterns."""
    repository = tmp_path / "hub"
    repository.mkdir()

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        if name != "someone/model":
            raise huggingface_hub.errors.OfflineModeIsEnabled(f"Cannot reach\nhttps://hub/api/models/{name}")
        local = tmp_path / "cache/snapshot"
        for file in repository.rglob("*"):
            relative = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                (local / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, local / relative)
        local.mkdir(parents=True, exist_ok=True)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return repository


@pytest.mark.parametrize("folder", ["", "vae/"])
def test_a_name_on_the_hub_is_a_model_of_which_only_config_and_safetensors_are_fetched(folder, hub, tmp_path):
    model = AutoencoderKL(CONFIG)
    model.save_pretrained(hub / folder)
    for name in ("model.ckpt", "pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors", "evil.py"):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_bytes(b"x")
    assert equal(AutoencoderKL.from_pretrained("someone/model"), model)
    fetched = {
        path.relative_to(tmp_path / "cache/snapshot").as_posix() for path in (tmp_path / "cache").rglob("*.*")
    }
    assert fetched == {f"{folder}config.json", f"{folder}diffusion_pytorch_model.safetensors"}


def test_what_the_hub_does_not_give_is_one_line(hub):
    (hub / "README.md").write_text("a dataset")
    with pytest.raises(ModelError, match="someone/model on the Hub holds no model"):
        resolve_model("someone/model")
    with pytest.raises(
        ModelError, match="nobody/nothing is no path here, and the Hub did not give it"
    ) as caught:
        AutoencoderKL.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_there_is_never_looked_for_on_the_hub(hub, tmp_path):
    AutoencoderKL(CONFIG).save_pretrained("someone/model")  # below the working folder
    assert resolve_model("someone/model").path == Path("someone/model")
    shutil.rmtree("someone/model")
    with pytest.raises(
        ModelError, match="someone/model does not exist"
    ):  # a slip in a path, since someone/ is here
        resolve_model("someone/model")


@pytest.mark.parametrize(
    "path", ["model", "/someone/model", "a/b/c", "../model", "./model", "a/.hidden", "-o/x", "a/b c"]
)
def test_what_no_repository_is_called(path):
    assert hub_id(path) is None
