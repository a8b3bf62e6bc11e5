"""Time a whole training step beside the same step on diffusers' AutoencoderKL, and write benchmarks/DEVICE/training.json.

    python tools/bench_training.py [--recipe kl-f8] [--batch 8] [--resolution 256] [--repeats 20] [--out FILE.json]

The step is latentae's own for every variant (objective, discriminator, both optimizers, average of weights); only the autoencoder
differs: ours, ours without the fused kernels, diffusers' class, and diffusers' class under torch.compile. The discriminator plays from
the first image, with a constant weight. Variants take turns; medians of seconds a step. On a GPU peak memory is that of one step above
the state that stays (weights, optimizer, average). VGG's weights are random: they change no speed. `tools/bench_autoencoder.py` times
encode and decode, `tools/equal_time.py` what our trainer and a plain loop reach in the same time.
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
from benchmarking import (
    ROOT,
    about,
    cpu_seconds,
    default_device,
    folder_name,
    peak_bytes,
    version,
    write_json,
)
from latentae_kernels import use_backend
from torch import Tensor, nn

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import AutoencoderOutput
from latentae.models.posterior import DiagonalGaussian
from latentae.training.launch import build_accelerator
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.steps import Trainer, build_autoencoder

VARIANTS = ("diffusers", "diffusers compiled", "latentae, torch operators", "latentae")
BASELINE = "diffusers compiled"


class DiffusersAutoencoder(nn.Module):
    """diffusers' class with the weights and the call of ours."""

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
        """As `AutoencoderKL.forward`, without what needs its insides (adaptive weights, an alignment)."""
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
    """The recipe with its discriminator on from the start, and random weights where LPIPS would need a download."""
    overrides: dict[str, Any] = {
        "batch_size": options.batch,
        "loss.adversarial.start_images": 0,
        "loss.adversarial.adaptive": False,  # its ratio is read from inside of our model
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
        rows.append(
            {
                "variant": variant,
                "seconds": seconds[variant],
                "images_per_second": options.batch / seconds[variant],
                "peak_bytes": peak_bytes(step) if device.type == "cuda" else None,
                "autoencoder_bytes": state,
            }
        )
    return {
        **about(device),
        "diffusers": version("diffusers"),
        "recipe": options.recipe,
        "precision": str(accelerator.mixed_precision),
        "batch": options.batch,
        "resolution": recipe.data.resolution,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--recipe", default="kl-f8" if gpu else "tiny-cpu", help="shipped recipe or TOML file"
    )
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--resolution", type=int, default=256 if gpu else 64, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 7, help="timed steps of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="what to time")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; the default is benchmarks/DEVICE/training.json"
    )
    options = parser.parse_args()
    result = measure(options)
    baseline = next((row["seconds"] for row in result["rows"] if row["variant"] == BASELINE), None)
    for row in result["rows"]:
        memory = f"{row['peak_bytes'] / 2**30:8.2f} GiB" if row["peak_bytes"] else ""
        ratio = f"{baseline / row['seconds']:6.2f}x" if baseline else ""
        print(
            f"{row['variant']:28s} {1e3 * row['seconds']:9.1f} ms {row['images_per_second']:8.2f} img/s {ratio} {memory}"
        )
    out = options.out or ROOT / "benchmarks" / folder_name(default_device()) / "training.json"
    write_json(out, result)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
