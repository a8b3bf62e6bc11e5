"""Commands and snippets of the documentation, run as a reader would."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import click
import pytest
import torch
from builders import smooth_images, tiny_model, write_images

import latentae
from latentae import cli
from latentae.options import nearest

ROOT = Path(__file__).parents[1]
SHORT = (
    "--images 8 --batch-size 4 --data.resolution 32 --data.validation none --model.initialization torch "
    "--model.block_out_channels [8,8,8,16] --loss.perceptual.net none --log.summary false"
)


def blocks(file: str, language: str, heading: str) -> list[str]:
    """The code blocks of a language below a heading."""
    text = (ROOT / file).read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "latentae"
    with pytest.raises(SystemExit) as ended:
        cli.main(words[1:])
    assert not ended.value.code, line


@pytest.mark.slow
def test_the_session_of_the_readme(tmp_path, monkeypatch):
    """Shards, training, evaluation, latents and export, with a few images and short options, then
    diffusers.
    """
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", smooth_images(16, 48))
    latentae.shards(write_images(tmp_path / "held", smooth_images(4, 48, seed=1)), "held-out-shards")
    (session,) = blocks("README.md", "sh", "## A session")
    lines = session.strip().splitlines()
    assert [shlex.split(line)[1] for line in lines] == ["shards", "train", "evaluate", "encode", "export"]
    for line in lines:
        line = line.replace("--images 20000", SHORT)
        run(line.replace("evaluation/", "evaluation/ --perceptual none --frechet none --no-details"))
    (snippet,) = blocks("README.md", "python", "## A session")
    names = {"images": torch.zeros(1, 3, 32, 32)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers|transformers|huggingface_hub")
        exec(snippet, names)
    assert names["latent"].shape[1] == 16


def test_the_export_page_loads_in_diffusers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    run("latentae export model vae --device cpu")
    (snippet,) = blocks("docs/export.md", "python", "# Export")
    names: dict = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers|transformers|huggingface_hub")
        exec(snippet, names)
    assert names["vae"].config.latent_channels == 4


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_command_of_the_docs_has_the_options_it_shows(page):
    """Options of `latentae VERB` lines; those of recipes have a dot or belong to train, config and
    init.
    """
    context = click.Context(cli.app)
    for block in re.findall(
        r"```(?:sh|bash)\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL
    ):
        for line in block.replace("\\\n", " ").splitlines():
            for verb, rest in re.findall(r"\blatentae ([a-z]+) ([^#]*)", line):
                command = cli.app.get_command(context, verb)
                known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
                if verb in ("train", "config", "init"):
                    continue
                for option in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest):
                    assert option in known, (
                        f"{verb} {option}: {nearest(option, sorted(known), 'none is near')}"
                    )


def test_every_file_of_the_map_exists():
    page = (ROOT / "docs/map.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_/]+(?:\.py|\.md|\.css|/))`", page):
        homes = (ROOT / "latentae", ROOT, ROOT / "kernels/latentae_kernels/norm_act")
        assert any((home / name).exists() for home in homes), name
