"""Uploading to the Hub, with a fake client: nothing here uses a network."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import huggingface_hub.errors
import pytest

from latentae import AutoencoderKL, export
from latentae.errors import OutputError, RecipeError
from latentae.models.presets import preset


class FakeApi:
    """What HfApi does with an upload, into a dict."""

    files: dict[str, bytes] = {}
    created: list[tuple[str, bool]] = []

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> str:
        self.created.append((repo_id, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        for path in Path(folder_path).rglob("*"):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                self.files[f"{repo_id}/{name}"] = path.read_bytes()

    def upload_file(
        self, *, repo_id: str, path_in_repo: str, path_or_fileobj: bytes, commit_message: str
    ) -> None:
        self.files[f"{repo_id}/{path_in_repo}"] = path_or_fileobj


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "files", {})
    monkeypatch.setattr(FakeApi, "created", [])
    monkeypatch.setattr("latentae.exporting.export.HfApi", FakeApi)
    return FakeApi


@pytest.fixture
def model(save_model, tmp_path) -> Path:
    return save_model(tmp_path / "model", preset("tiny", block_out_channels=(8, 8, 16)))


def test_the_folder_is_uploaded_and_its_card_names_the_repository(api, model, tmp_path, capsys):
    summary = export(model, tmp_path / "vae", push_to_hub="someone/my-vae")
    assert summary["repository"] == "https://hub/someone/my-vae"
    assert api.created == [("someone/my-vae", True)]
    local = {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    assert {name.removeprefix("someone/my-vae/") for name in api.files} == set(local)
    for name in set(local) - {"README.md"}:
        assert api.files[f"someone/my-vae/{name}"] == local[name]
    card = api.files["someone/my-vae/README.md"].decode()
    assert 'AutoencoderKL.from_pretrained("someone/my-vae")' in card
    assert "hf download someone/my-vae --local-dir vae" in card
    assert 'AutoencoderKL.from_pretrained("vae")' in local["README.md"].decode()
    assert "uploaded" in capsys.readouterr().err


def test_a_finished_export_can_be_uploaded_later(api, model, tmp_path):
    export(model, tmp_path / "vae")
    assert not api.files
    export(model, tmp_path / "vae", push_to_hub="someone/my-vae")
    assert "someone/my-vae/diffusion_pytorch_model.safetensors" in api.files


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nbut no token found"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline"),
        ConnectionError("no route"),
    ],
)
def test_an_upload_that_fails_is_one_line_and_keeps_the_folder(error, api, model, tmp_path, monkeypatch):
    def fail(self, *arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(api, "create_repo", fail)
    with pytest.raises(OutputError, match=r"could not upload to someone/my-vae .* `hf auth login`") as caught:
        export(model, tmp_path / "vae", push_to_hub="someone/my-vae")
    assert "\n" not in str(caught.value)
    AutoencoderKL.from_pretrained(tmp_path / "vae")


@pytest.mark.parametrize("name", ["my-vae", "a/b/c", "", "/x", "some one/x"])
def test_a_name_that_is_none_is_refused_before_any_work(name, api, model, tmp_path):
    with pytest.raises(RecipeError, match=r"push_to_hub is .*, expected OWNER/NAME"):
        export(model, tmp_path / "vae", push_to_hub=name)
    assert not (tmp_path / "vae").exists()
