"""Time a training step of latentae and the same step on diffusers' AutoencoderKL.

    python tools/bench_training.py [--recipe kl-f8] [--batch 8] [--resolution 256] [--repeats 20]

Every variant uses latentae's step (objective, discriminator, both optimizers, weight average); only
the
autoencoder differs: ours, ours without the fused kernels, diffusers' class, and that under
torch.compile. The discriminator is active from the first image with a constant weight. Variants
take turns; medians of seconds per step. On a GPU peak memory is that of one step above the
persistent state (weights, optimizer, average). VGG's weights are random, which does not change
speed. Writes benchmarks/DEVICE/training.json. `tools/bench_autoencoder.py` times encode and decode,
`tools/equal_time.py` compares results after equal time.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarking import command_line, cpu_seconds, default_device, peak_bytes, result_file, save, version
from latentae_kernels import use_backend
from torch import Tensor, nn

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import AutoencoderOutput, DiagonalGaussian
from latentae.training.launch import build_accelerator
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.steps import Trainer, build_autoencoder

VARIANTS = ("diffusers", "diffusers compiled", "latentae, torch operators", "latentae")
BASELINE = "diffusers compiled"


class DiffusersAutoencoder(nn.Module):
    """diffusers' class with our weights and interface."""

    def __init__(self, ours: AutoencoderKL, compiled: bool) -> None:
        import diffusers

        super().__init__()
        self.config = ours.config
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            vae: Any = diffusers.AutoencoderKL.from_pretrained(folder)  # pyright: ignore[reportPrivateImportUsage]
        self.vae = vae.train()
        self.parts: list[Callable[[Tensor], Tensor]] = [vae._encode, lambda z: vae._decode(z).sample]
        if compiled:
            self.parts = [torch.compile(part) for part in self.parts]

    def forward(
        self, x: Tensor, noise: Tensor | None = None, sample_posterior: bool = True, **unused: Any
    ) -> AutoencoderOutput:
        """`AutoencoderKL.forward` without adaptive weights and alignment, which need its layers."""
        encode, decode = self.parts
        posterior = DiagonalGaussian(encode(x))
        latent = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        return AutoencoderOutput(decode(latent.to(x.dtype)), posterior, latent, latent)


def build_trainer(variant: str, recipe: Recipe, accelerator: Any) -> Trainer:
    """latentae's trainer around the variant's autoencoder."""

    def build(recipe: Recipe) -> Any:
        ours = build_autoencoder(recipe)
        assert isinstance(ours, AutoencoderKL)
        return ours if variant.startswith("latentae") else DiffusersAutoencoder(ours, variant == BASELINE)

    with patch("latentae.training.steps.build_autoencoder", build):
        return Trainer(recipe, accelerator)


def kernels_of(variant: str) -> AbstractContextManager[Any]:
    return use_backend("torch") if variant == "latentae, torch operators" else nullcontext()


def step_of(variant: str, trainer: Trainer, batch: Tensor) -> Callable[[], None]:
    def step() -> None:
        with kernels_of(variant):
            trainer.update([batch])
        if batch.is_cuda:
            torch.cuda.synchronize()

    return step


def benchmark_recipe(options: argparse.Namespace, weights: Path) -> Recipe:
    """The recipe with its discriminator active from the start, and random VGG weights for LPIPS."""
    overrides: dict[str, Any] = {
        "batch_size": options.batch,
        "loss.adversarial.start_images": 0,
        "loss.adversarial.adaptive": False,  # its ratio needs a layer of our model
        "data.resolution": options.resolution,
    }
    recipe = load_recipe(options.recipe, overrides)
    if recipe.loss.perceptual.net == "vgg":
        import torchvision

        torch.save(torchvision.models.vgg16(weights=None).state_dict(), weights)
        recipe = load_recipe(recipe, {"loss.perceptual.weights": str(weights)})
    return recipe


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        recipe = benchmark_recipe(options, Path(folder) / "vgg16.pth")
        accelerator = build_accelerator(recipe.precision)
        sides = (options.batch, 3, recipe.data.resolution, recipe.data.resolution)
        batch = torch.randint(0, 256, sides, dtype=torch.uint8).to(device, memory_format=torch.channels_last)
        trainers = {variant: build_trainer(variant, recipe, accelerator) for variant in options.variants}
    steps = {variant: step_of(variant, trainer, batch) for variant, trainer in trainers.items()}
    seconds = cpu_seconds(steps, options.repeats, warmup=3)
    rows = []
    for variant, step in steps.items():
        gc.collect()
        state = sum(p.numel() * p.element_size() for p in trainers[variant].raw_autoencoder.parameters())
        row = {"variant": variant, "seconds": seconds[variant]}
        row["images_per_second"] = options.batch / seconds[variant]
        row["peak_bytes"] = peak_bytes(step) if device.type == "cuda" else None
        rows.append(row | {"autoencoder_bytes": state})
    return {
        "diffusers": version("diffusers"),
        "recipe": options.recipe,
        "precision": str(accelerator.mixed_precision),
        "batch": options.batch,
        "resolution": recipe.data.resolution,
        "rows": rows,
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--recipe", default="kl-f8" if gpu else "tiny-cpu", help="shipped recipe or TOML file")
    add("--batch", type=int, default=8, help="images per step")
    add("--resolution", type=int, default=256 if gpu else 64, help="side in pixels")
    add("--repeats", type=int, default=20 if gpu else 7, help="timed steps of each variant")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="what to time")
    options = parser.parse_args()
    result = measure(options)
    baseline = next((row["seconds"] for row in result["rows"] if row["variant"] == BASELINE), None)
    for row in result["rows"]:
        memory = f"{row['peak_bytes'] / 2**30:8.2f} GiB" if row["peak_bytes"] else ""
        ratio = f"{baseline / row['seconds']:6.2f}x" if baseline else ""
        speed = f"{1e3 * row['seconds']:9.1f} ms {row['images_per_second']:8.2f} img/s"
        print(f"{row['variant']:28s} {speed} {ratio} {memory}")
    device = default_device()
    save(options.out or result_file(device, "training"), device, result)


if __name__ == "__main__":
    main()
