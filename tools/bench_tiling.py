"""Error, seams and memory of tiled encoding and decoding, ours and diffusers' with the same
weights.

    python tools/bench_tiling.py MODEL ... [--images FILE ...] [--side 1024] [--tile 256] [--overlap
    0.125 0.25] python tools/bench_tiling.py kl-f8 --memory 4096 [--step decode encode] [--tile 512]

MODEL is a run, an exported folder, or a preset for random weights. The first form compares, on
photos, the untiled model, diffusers' tiling (tiles of the same side, its overlap of a quarter),
latentae's "blended" at each overlap and "exact" with the untiled model in fp64. It reports the
largest difference, root mean square and PSNR; images span [-1, 1], latents are divided by their
standard deviation. A seam is the mean step of the difference across tile edges, in 1/255 of the
range (of two standard deviations), and its ratio to the mean step elsewhere; 1 is no seam.
`computed`: pixels that the levels near the image computed, with samples for statistics, over the
image's. Seconds are CPU time. The second form measures one large image, blended, in a new process:
seconds and peak resident memory. They write tiling.json and tiling_memory.json into
benchmarks/DEVICE.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarking import command_line, default_device, result_file, save, version
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.utils import logging
from torch import Tensor

from latentae.data.decode import decode_image
from latentae.errors import LatentAEError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import build
from latentae.models.presets import PRESETS, preset
from latentae.models.tiling import Tiled
from latentae.models.tiling.blended import Tiles, samples
from latentae.models.tiling.steps import change, encoder_steps, split_encoder

PHOTOS = ("retina.jpg", "hubble_deep_field.jpg", "astronaut.png", "coffee.png")  # inside scikit-image
THEIR_OVERLAP = 0.25


def load(name: str) -> AutoencoderKL:
    torch.manual_seed(0)
    model = build(preset(name)) if name in PRESETS else AutoencoderKL.from_pretrained(name)
    return model.eval()


def default_images() -> list[Path]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("bench_tiling: name --images, or pip install scikit-image, whose wheel has photos")
    return [Path(spec.origin).parent / "data" / name for name in PHOTOS]


def read(file: Path, side: int, f: int) -> Tensor:
    """The center of a photo, [1, 3, H, W] in [-1, 1], H and W at most `side` and multiples of f."""
    image = decode_image(file.read_bytes(), file.name).float() / 127.5 - 1
    sides = [min(length, side) // f * f for length in image.shape[1:]]
    top, left = ((length - kept) // 2 for length, kept in zip(image.shape[1:], sides, strict=True))
    crop = image[None, :, top : top + sides[0], left : left + sides[1]]
    return crop.contiguous(memory_format=torch.channels_last)


def rows(name: str, model: AutoencoderKL, file: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method on one photo, encode and decode."""
    f, tile = model.config.downsampling, options.tile
    x = read(file, options.side, f)
    blended = {overlap: Tiled(model, "blended", tile=tile, overlap=overlap) for overlap in options.overlap}
    exact = Tiled(model, "exact", tile=tile)
    precise, theirs = copy.deepcopy(model).double(), diffusers_twin(model, tile)
    latent = precise.encode(x.double()).mode()
    z = latent.float()
    found = []
    for step, given, whole in (("encode", x, latent), ("decode", z, precise.decode(z.double()))):
        calls: list[tuple[str, float, Any]] = [("untiled", 0.0, ours(model, step))]
        calls.append(("diffusers", THEIR_OVERLAP, theirs[step]))
        calls += [("blended", overlap, ours(tiled, step)) for overlap, tiled in blended.items()]
        calls.append(("exact", 0.0, ours(exact, step)))
        for method, overlap, call in calls:
            start = time.process_time()
            out = call(given)
            seconds = time.process_time() - start
            row: dict[str, Any] = {"model": Path(name).name, "photo": file.name}
            row |= {"height": x.shape[2], "width": x.shape[3], "step": step, "method": method}
            row |= {"tile": tile, "overlap": overlap}
            row["computed"] = round(computed(model, method, overlap, x, tile), 3)
            row["cpu_seconds"] = round(seconds, 2)
            row |= compare(out, whole, edges(method, overlap, tile, f, x, step), step)
            print(line(row), flush=True)
            found.append(row)
    return found


def ours(coder: AutoencoderKL | Tiled, step: str) -> Any:
    return coder.decode if step == "decode" else lambda x: coder.encode(x).mode()


def diffusers_twin(model: AutoencoderKL, tile: int) -> dict[str, Any]:
    """The same weights in diffusers, tiling on."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        twin: Any = DiffusersAutoencoderKL.from_pretrained(folder)
    twin.eval().enable_tiling()
    twin.tile_sample_min_size, twin.tile_latent_min_size = tile, tile // model.config.downsampling
    twin.tile_overlap_factor = THEIR_OVERLAP
    return {"encode": lambda x: twin.encode(x).latent_dist.mode(), "decode": lambda z: twin.decode(z).sample}


def compare(out: Tensor, whole: Tensor, lines: tuple[list[int], list[int]], step: str) -> dict[str, Any]:
    difference = (out - whole).double()
    if step == "encode":
        difference /= whole.double().std()
    square = difference.square().mean().item()
    at, elsewhere = seam(difference, *lines)
    return {
        "max": rounded(difference.abs().max().item()),
        "rms": rounded(math.sqrt(square)),
        "psnr": round(10 * math.log10(4 / square), 2),
        "border_step": rounded(at * 127.5),
        "seam": round(at / elsewhere, 3),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def seam(difference: Tensor, rows: list[int], columns: list[int]) -> tuple[float, float]:
    """Mean absolute step of the difference from pixel to pixel, across tile edges and elsewhere."""
    steps = []
    for dim, edges in ((2, rows), (3, columns)):
        # one value per line between two pixels
        step = difference.diff(dim=dim).abs().mean([d for d in range(4) if d != dim])
        at = torch.zeros(len(step), dtype=torch.bool)
        at[[edge - 1 for edge in edges]] = True
        steps.append((step[at], step[~at]))
    at, elsewhere = (torch.cat(values) for values in zip(*steps, strict=True))
    return (at.mean().item() if len(at) else 0.0), elsewhere.mean().item()


def edges(
    method: str, overlap: float, tile: int, f: int, x: Tensor, step: str
) -> tuple[list[int], list[int]]:
    """Rows and columns of tile edges in the output; diffusers' for methods without tiles."""
    scale = f if step == "encode" else 1
    found = []
    for length in x.shape[2:]:
        if method == "blended":
            starts, side = Tiles(tile, int(tile * overlap) // f * f, f).along(length)
        else:
            starts, side = range(0, length, int(tile * (1 - THEIR_OVERLAP))), int(tile * THEIR_OVERLAP)
        edges = {edge for start in starts for edge in (start, start + side)}
        found.append(sorted(edge // scale for edge in edges if 0 < edge < length))
    return found[0], found[1]


def computed(model: AutoencoderKL, method: str, overlap: float, x: Tensor, tile: int) -> float:
    """Pixels computed at the image's resolution, over those of the image."""
    height, width = x.shape[2:]
    if method in ("untiled", "exact") or max(height, width) <= tile:
        return 1.0
    if method == "diffusers":
        stride = int(tile * (1 - THEIR_OVERLAP))
        down, across = (
            sum(min(tile, length - start) for start in range(0, length, stride)) for length in (height, width)
        )
        return down * across / (height * width)
    unit = round(change(split_encoder(encoder_steps(model))[0]))
    tiles = Tiles(tile, int(tile * overlap) // unit * unit, unit)
    down, across = (len(starts) * side for starts, side in map(tiles.along, (height, width)))
    sampled = sum(high * wide for boxes in samples(height, width, unit, tile) for _, _, high, wide in boxes)
    return (down * across + sampled) / (height * width)


def line(row: dict[str, Any]) -> str:
    what = f"{row['step']} {row['photo']} {row['height']}x{row['width']}"
    what += f" tile {row['tile']} {row['method']} {row['overlap']}"
    error = f"max {row['max']:.5f} rms {row['rms']:.5f} psnr {row['psnr']:.1f}"
    seams = f"step at edges {row['border_step']:.3f} seam {row['seam']:.2f}"
    return f"{what}: computed {row['computed']:.2f} {row['cpu_seconds']:.1f} s {error} {seams}"


def measure_memory(name: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one large random image in a new process."""
    command = [sys.executable, __file__, name, "--memory", str(options.memory), "--step", step]
    command += ["--tile", str(options.tile), "--overlap", str(options.overlap[0]), "--here"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_tiling: {done.stderr.strip()}")
    peak, size = (int(value) for value in done.stdout.split())
    row: dict[str, Any] = {"model": Path(name).name, "step": step, "side": options.memory}
    row |= {
        "tile": options.tile,
        "overlap": options.overlap[0],
        "peak_resident_bytes": peak,
        "of_these_before_the_call": size,
    }
    row |= {"seconds": round(time.perf_counter() - start)}
    print(f"{step} {options.memory}^2 {name}: peak {peak / 2**30:.2f} GiB, {row['seconds']} s", flush=True)
    return row


def run_here(options: argparse.Namespace) -> None:
    model, step = load(options.model[0]), options.step[0]
    side, channels = options.memory, model.config.in_channels
    if step == "decode":
        side, channels = side // model.config.downsampling, model.config.latent_channels
    x = torch.randn(1, channels, side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours(Tiled(model, "blended", tile=options.tile, overlap=options.overlap[0]), step)(x)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, before)


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("model", nargs="+", help="a run, an exported folder or a preset")
    add("--images", type=Path, nargs="+", help="photos (default: four of scikit-image's)")
    add("--side", type=int, default=1024, help="maximum side in pixels; larger photos are cropped")
    add("--tile", type=int, default=256, help="side of a tile in pixels")
    add("--overlap", type=float, nargs="+", default=[0.125, 0.25], help="overlaps of blended tiles")
    add("--memory", type=int, metavar="SIDE", help="measure the memory of an image of this side instead")
    add("--step", choices=["encode", "decode"], nargs="+", default=["decode"], help="with --memory")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with torch.no_grad():
        try:
            if options.here:
                return run_here(options)
            found = []
            for name in options.model:
                if options.memory:
                    found += [measure_memory(name, step, options) for step in options.step]
                    continue
                model = load(name)
                for file in options.images or default_images():
                    found += rows(name, model, file, options)
        except LatentAEError as error:
            raise SystemExit(f"bench_tiling: {error}") from None
    device = default_device()
    out = options.out or result_file(device, "tiling_memory" if options.memory else "tiling")
    save(out, device, {"diffusers": version("diffusers"), "rows": found})


if __name__ == "__main__":
    main()
