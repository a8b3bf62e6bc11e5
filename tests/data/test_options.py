from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from latentae.data.options import DataOptions


def test_every_option_has_one_sentence():
    for name, field in DataOptions.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize(
    "values",
    [
        {"shard": "x"},
        {"resolution": 0},
        {"scale_min": 0.9, "scale_max": 0.5},
        {"validation_fraction": 1.0},
        {"workers": -1},
    ],
)
def test_unknown_and_impossible_values_are_refused(values):
    with pytest.raises(ValidationError):
        DataOptions(**values)


def test_options_load_without_torch():
    heavy = "{'torch', 'webdataset', 'numpy', 'PIL'}"
    code = f"import sys; import latentae.data.options; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
