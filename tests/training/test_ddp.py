"""Two gloo processes that accumulate gradients equal one with the global batch."""

from __future__ import annotations

import pytest
import torch
from forked import Processes

from latentae.training.init import fit_head_start, take_head_start
from latentae.training.launch import build_accelerator
from latentae.training.recipe import load_recipe
from latentae.training.steps import Trainer

ADVERSARIAL = {
    "loss.adversarial.weight": 0.3,
    "loss.adversarial.channels": 8,
    "loss.adversarial.layers": 2,
    "loss.kl": 1e-3,
}
EFFICIENTNET = "efficientnet-lite0"
CASES = {
    "accumulated, with all that is averaged over processes": {
        "gradient_accumulation": 2,
        "loss.learn_logvar": True,
        "loss.wavelet": 0.3,
        "loss.perceptual.net": EFFICIENTNET,
        "loss.perceptual.gram": 1e-4,  # a gradient as large as those of the other terms
        "loss.alignment.weight": 0.1,
        "loss.alignment.adaptive": False,
        "loss.alignment.backbone": EFFICIENTNET,
        "loss.adversarial.lecam": 0.1,
        "loss.adversarial.r1": 0.1,
        "loss.adversarial.penalty_every": 2,
        "model.latent_noise": 1.0,
    },
    "adaptive weights, an alignment and its projection": {
        "loss.adversarial.adaptive": True,
        "loss.alignment.weight": 0.1,
        "loss.alignment.backbone": EFFICIENTNET,
        "loss.learn_logvar": True,
    },
    "corrupted images and latents with learned fills, accumulated": {
        "gradient_accumulation": 2,
        "corruption.noise": [0.1, 0.5],
        "corruption.mask": [0.3, 0.6],
        "corruption.mask_loss": "hidden",
        "model.latent_mask": 0.7,
        "model.nested_channels": 2,
        "loss.equivariance.probability": 0.7,
        "loss.equivariance.smallest_scale": 0.5,
        "loss.equivariance.downscaled": 0.25,
        "loss.equivariance.factors": [2],
    },
    "penalties on the latent of batch statistics, U-Net": {
        "loss.sparsity.weight": 0.3,
        "loss.sparsity.kind": "kl",
        "loss.free_bits": 0.5,
        "loss.contractive.weight": 0.1,
        "loss.spectrum": 0.1,
        "loss.adversarial.discriminator": "unet",
    },
    "decoder head only, heads on frozen features, accumulated": {
        "model.train": "decoder-head",
        "gradient_accumulation": 2,
        "loss.adversarial.discriminator": "features",
        "loss.adversarial.backbone": EFFICIENTNET,
    },
}


def trained(recipe, accelerator):
    """State, moments and gradient norms after a fixed stream of global batches."""
    trainer = Trainer(recipe, accelerator)
    world, rank, parts = accelerator.num_processes, accelerator.process_index, recipe.gradient_accumulation
    generator = torch.Generator().manual_seed(3)
    found = {}
    while not trainer.finished:
        batch = torch.randint(0, 256, (recipe.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        chunks = batch.chunk(parts * world)  # a process owns consecutive samples, as the loader deals them
        terms = trainer.update([chunks[rank * parts + part] for part in range(parts)])
        found |= {
            f"{name} of step {trainer.state.step}": v
            for name, v in terms.items()
            if name.startswith("gradient_norm/")
        }
    for name, part in trainer.saved.items():
        found |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    for name, optimizer in trainer.optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            moment = "momentum" if "momentum" in values else "exp_avg"
            found[f"{moment} {index} of {name}"] = values[moment]
    accelerator.free_memory()
    return {name: value.detach().clone() for name, value in found.items()}


def work(recipes, start, out):
    """What two processes do: train every recipe, then begin one at PCA."""
    accelerator = build_accelerator("fp32")
    found = {name: trained(recipe, accelerator) for name, recipe in recipes.items()}
    trainer = Trainer(start, accelerator)
    take_head_start(trainer, [])
    found["start"] = trainer.raw_autoencoder.state_dict()
    found["average"] = trainer.ema.state_dict()
    torch.save(found, out / f"{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def recipes(small):
    return {
        name: small(batch_size=8, images=16, **{**ADVERSARIAL, **options}) for name, options in CASES.items()
    }


@pytest.fixture(scope="module")
def two(recipes, narrow, tmp_path_factory):
    """What both of two processes have found."""
    folder = tmp_path_factory.mktemp("two")
    processes = Processes(folder, work, recipes, narrow(), folder, count=2)
    assert processes.wait() == [0, 0], processes.output() + processes.output(1)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture
def one_thread():
    """As many threads as each of the two processes, so that the same kernels run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, recipes, two, one_thread, accelerator):
    first, second = (found[case] for found in two)
    one = trained(load_recipe(recipes[case], {"gradient_accumulation": 1}), accelerator)
    assert one.keys() == first.keys() == second.keys()
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
        # Sums in another order differ by 5e-6 of a tensor's largest value (measured). Rounding also
        # switches single ReLU6 units of the frozen network, which moves gradients by up to 5e-4.
        # Adam's steps of the smallest gradients have the size of the learning rate, here 1.2e-5 and
        # then 1.1e-4, and either sign, so weights may end two steps apart.
        if "gradient_norm" in key or "momentum" in key or "exp_avg" in key:
            torch.testing.assert_close(
                first[key],
                value,
                rtol=1e-3,
                atol=2e-3 * value.abs().max().item(),
                msg=lambda m, k=key: f"{k}: {m}",
            )
        else:
            torch.testing.assert_close(
                first[key], value, rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_two_processes_begin_at_the_same_pca(two, narrow):
    recipe = narrow()
    for key, value in fit_head_start(recipe).build(recipe).state_dict().items():
        for found in two:
            torch.testing.assert_close(
                found["start"][key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
            assert torch.equal(found["average"][key], found["start"][key]), key
        assert torch.equal(two[0]["start"][key], two[1]["start"][key]), key
