from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.training.optim import Muon, orthogonalized

SIDES = st.integers(1, 12)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, st.integers(1, 3), st.integers(0, 2**31))
def test_singular_values_become_about_one_and_vectors_stay(rows, columns, count, seed):
    matrices = torch.randn(
        count, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    in_their_basis = u.mT @ found @ vh.mT
    values = torch.diagonal(in_their_basis, dim1=1, dim2=2)
    share = s / torch.linalg.matrix_norm(matrices).unsqueeze(1)
    assert torch.allclose(in_their_basis, torch.diag_embed(values), atol=1e-6)
    assert (values[share > 0.05] > 0.6).all()
    assert (values < 1.3).all()


def plain(weight, gradients, lr, momentum, decay):
    """The update rule word for word, one matrix at a time."""
    average = torch.zeros_like(weight)
    for g in gradients:
        average = momentum * average + (1 - momentum) * g
        x = ((1 - momentum) * g + momentum * average).flatten(1)
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(x.shape)) * x.reshape(weight.shape)
    return weight


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (16, 4, 1, 1), (24, 8), (4, 30)])
def test_steps_equal_the_rule(shape):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)] for _ in range(4)
    ]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1)
    for step in gradients:
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = g.clone()
        optimizer.step()
    for index, (parameter, weight) in enumerate(zip(parameters, weights, strict=True)):
        expected = plain(weight, [step[index] for step in gradients], 0.02, 0.9, 0.1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-8)


def test_it_is_torchs_muon_for_matrices():
    """torch's works in bf16, so only about."""
    start, gradient = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)), torch.randn(32, 48)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(ours - start, theirs - start, rtol=0.2, atol=6e-3)


def test_parameters_without_a_gradient_stay():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(4, 4))
