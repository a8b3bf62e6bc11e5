"""Parts of a checkpoint that a run does not take are named in the log."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from latentae.files import sha256, write_json
from latentae.models.pretrained import save_weights
from latentae.training.checkpoint import FORMAT_VERSION, enter_phase, load_checkpoint
from latentae.training.steps import TrainState


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of nothing but a discriminator."""
    save_weights(nn.Linear(2, 2).state_dict(), tmp_path / "discriminator.safetensors")
    torch.save({}, tmp_path / "optimizers.pt")
    write_json(tmp_path / "state.json", {**asdict(TrainState()), "data": {"epoch": 1}})
    digests = {file.name: sha256(file) for file in sorted(tmp_path.iterdir())}
    write_json(tmp_path / "meta.json", {"format_version": FORMAT_VERSION, "sha256": digests})
    return tmp_path


def trainer(**parts: nn.Module) -> Any:
    return SimpleNamespace(saved=parts, optimizers={}, state=None)


def test_a_part_that_the_recipe_does_not_have(folder, capsys):
    assert load_checkpoint(trainer(), folder) == {"epoch": 1}
    assert f"{folder}: ignoring discriminator, which this recipe does not have" in capsys.readouterr().err
    load_checkpoint(trainer(discriminator=nn.Linear(2, 2)), folder)
    assert "ignor" not in capsys.readouterr().err


def test_a_part_that_begins_anew_with_a_phase(folder, capsys):
    enter_phase(trainer(discriminator=nn.Linear(3, 3)), folder, phase=1)
    assert (
        "discriminator.safetensors is ignored: the discriminator of phase 2 has another shape"
        in capsys.readouterr().err
    )
    enter_phase(trainer(discriminator=nn.Linear(2, 2)), folder, phase=1)
    assert "ignor" not in capsys.readouterr().err
