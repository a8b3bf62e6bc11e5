"""The README's part on export and the snippet of docs/export.md, run as a reader would."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from PIL import Image

from latentae import cli
from latentae.models.presets import preset

ROOT = Path(__file__).parents[2]


def blocks(file: str, language: str, heading: str) -> list[str]:
    """The code blocks of a language below a heading."""
    text = (ROOT / file).read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch, photo_shards, save_model) -> Path:
    """Where the README's commands run: a model under the run's name, shards, two photos."""
    save_model(tmp_path / "runs/first", preset("tiny", block_out_channels=(8, 8, 16)))
    (tmp_path / "held-out-shards").symlink_to(photo_shards)
    for name, size in (("cat", (70, 51)), ("dog", (33, 64))):
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def diffusers_only(monkeypatch) -> None:
    """Of the formats, the one that takes no minute; test_export_formats has the others."""
    from latentae.exporting.diffusers_folder import write_diffusers

    def write(plan, model, config, folder):
        write_diffusers(model, config, folder, plan.options.variant)

    monkeypatch.setattr("latentae.exporting.export.write_formats", write)
    monkeypatch.setattr("latentae.exporting.export.measure_component", lambda model, request: (None, None))


def test_the_readme_exports_and_loads(workplace, diffusers_only):
    (command,) = blocks("README.md", "sh", "### Export")
    words = shlex.split(command.replace("--resolution 256", "--resolution 64 --perceptual none"))
    assert words[0] == "latentae"
    with pytest.raises(SystemExit) as ended:
        cli.main(words[1:])
    assert not ended.value.code
    plain, ours = blocks("README.md", "python", "### Export")
    names: dict = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers|transformers|huggingface_hub")  # not ours
        exec(plain, names)
    assert names["vae"].config.scaling_factor == 1.0
    exec(ours, names)
    assert [picture.size for picture in names["pictures"]] == [(70, 51), (33, 64)]
    (snippet,) = blocks("docs/export.md", "python", "# Export")
    exec(snippet, names)
    assert names["vae"].config.scaling_factor == 1.0


def test_every_option_the_docs_name_is_there():
    from click.testing import CliRunner

    text = CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    for option in set(
        re.findall(r"--[a-z][a-z-]+", (ROOT / "docs/export.md").read_text(encoding="utf-8"))
    ) - {"--init-from"}:
        assert option in text, option
