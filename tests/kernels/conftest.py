from __future__ import annotations

import os

import numpy as np
import pytest
import torch


@pytest.fixture
def device() -> str:
    """A GPU where there is one; else the CPU, where the kernels run in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _bf16_rounds_to_nearest():
    """Triton's interpreter cuts fp32 off to bf16; the instruction it stands for, cvt.rn.bf16.f32,
    rounds to nearest even.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(data).reshape(data.shape)).to(torch.bfloat16)
            return nearest.view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert
