from __future__ import annotations

import pytest
import torch

from latentae.device import choose_device
from latentae.errors import RecipeError


def test_auto_is_a_device_that_is_there():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_unknown_and_absent_devices_are_named():
    with pytest.raises(RecipeError, match="'gpu0'"):
        choose_device("gpu0")
    with pytest.raises(RecipeError, match="cuda:99"):
        choose_device("cuda:99")
