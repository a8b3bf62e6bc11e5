"""The package: public names, cold start, versions, what importing costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import latentae
from latentae import cli

ROOT = Path(__file__).parents[1]
VERBS = [name for _, names in latentae.VERBS.values() for name in names]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_every_public_name_exists_and_is_documented():
    for name in latentae.__all__:
        value = getattr(latentae, name)
        assert name == "__version__" or value.__doc__, name
    assert set(latentae.__all__) <= set(dir(latentae))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        latentae.nothing  # noqa: B018


def test_nothing_needs_diffusers_and_no_module_hides_a_public_name():
    code = "import sys, latentae, latentae.cli, latentae.training.train, latentae.evaluation.evaluate\n"
    code += "import latentae.encoding.encode, latentae.exporting.export, latentae.data.shards\n"
    code += "assert 'diffusers' not in sys.modules\n"
    code += "import latentae.examples.quickstart\n"
    code += f"print(all(callable(getattr(latentae, verb)) for verb in {VERBS!r}))"
    assert run(code) == "True"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_and_its_command_have_the_options_of_one_table(verb):
    command = cli.app.get_command(click.Context(cli.app), verb)
    function = inspect.signature(getattr(latentae, verb)).parameters
    taken = {parameter.name for parameter in command.params}
    assert taken - {"words"} <= set(function)
    if "words" not in taken:
        assert taken == set(function)
    for option in function:
        assert option == "overrides" or f"    {option}: " in getattr(latentae, verb).__doc__


def test_one_version_everywhere():
    assert version("latentae") == latentae.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert f"## {latentae.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_latentae_loads_nothing_heavy():
    heavy = ("torch", "numpy", "triton", "accelerate", "webdataset")
    code = f"import sys, latentae; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_the_models_load_neither_data_nor_training_packages():
    heavy = ("accelerate", "webdataset", "lpips", "timm", "matplotlib", "diffusers", "torchvision")
    code = "import sys, latentae_kernels; from latentae import AutoencoderKL\n"
    code += f"print(latentae_kernels.__name__, [m for m in {heavy!r} if m in sys.modules])"
    assert run(code) == "latentae_kernels []"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_help_of_every_verb_answers_without_torch():
    code = f"""
import sys
sys.argv = ["latentae"]
from latentae.cli import main
for words in [], *([verb] for verb in {VERBS!r}):
    try:
        main([*words, "--help"])
    except SystemExit as stop:
        print("CODE", words, stop.code, "torch" in sys.modules)
"""
    output = run(code)
    assert output.count("Usage: latentae") == len(VERBS) + 1
    for words in [], *([verb] for verb in VERBS):
        assert f"CODE {words} 0 False" in output


def test_the_import_direction_holds():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
