"""Error, seams and memory of tiled encoding and decoding, beside diffusers' tiling with the same weights.

    python tools/bench_tiling.py MODEL ... [--images FILE ...] [--side 1024] [--tile 256] [--overlap 0.125 0.25] [--out FILE.json]
    python tools/bench_tiling.py kl-f8 --memory 4096 [--step decode encode] [--tile 512] [--out FILE.json]

MODEL is a run, an exported folder, or a preset's name for random weights. The first form compares the untiled model, diffusers' tiling
(tiles of the same side, its overlap of a quarter), latentae's "blended" at each overlap and "exact" with the untiled model in fp64, on
photos. Largest difference, root mean square and PSNR: images span [-1, 1], latents are divided by their standard deviation. At the
borders of tiles: the mean step of the difference in 1/255 of the range (of two standard deviations), and its ratio to the mean step
elsewhere; 1 is no seam. `computed`: pixels that the levels near the image computed, samples for statistics included, over the image's.
Seconds are the processor's.
The second form measures one large image, blended, in a new process: seconds and peak resident memory. They write tiling.json and
tiling_memory.json into benchmarks/DEVICE.
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
from benchmarking import ROOT, about, default_device, folder_name, version, write_json
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.utils import logging
from torch import Tensor

from latentae.data.decode import decode_image
from latentae.errors import LatentAEError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import PRESETS, preset
from latentae.models.tiling import Tiled
from latentae.models.tiling.blended import Tiles, samples
from latentae.models.tiling.steps import change, encoder_steps, split_encoder

PHOTOS = ("retina.jpg", "hubble_deep_field.jpg", "astronaut.png", "coffee.png")  # inside scikit-image
THEIR_OVERLAP = 0.25


def load(name: str) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(preset(name)) if name in PRESETS else AutoencoderKL.from_pretrained(name)
    return model.eval()


def default_images() -> list[Path]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("bench_tiling: name --images, or pip install scikit-image, whose wheel has photos")
    return [Path(spec.origin).parent / "data" / name for name in PHOTOS]


def read(file: Path, side: int, f: int) -> Tensor:
    """The middle of a photo, [1, 3, H, W] in [-1, 1], H and W at most `side` and multiples of f."""
    image = decode_image(file.read_bytes(), file.name).float() / 127.5 - 1
    sides = [min(length, side) // f * f for length in image.shape[1:]]
    top, left = ((length - kept) // 2 for length, kept in zip(image.shape[1:], sides, strict=True))
    return image[None, :, top : top + sides[0], left : left + sides[1]].contiguous(
        memory_format=torch.channels_last
    )


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
        calls: list[tuple[str, float, Any]] = [
            ("untiled", 0.0, ours(model, step)),
            ("diffusers", THEIR_OVERLAP, theirs[step]),
        ]
        calls += [("blended", overlap, ours(tiled, step)) for overlap, tiled in blended.items()]
        calls.append(("exact", 0.0, ours(exact, step)))
        for method, overlap, call in calls:
            start = time.process_time()
            out = call(given)
            seconds = time.process_time() - start
            row: dict[str, Any] = {
                "model": Path(name).name,
                "photo": file.name,
                "height": x.shape[2],
                "width": x.shape[3],
            }
            row |= {"step": step, "method": method, "tile": tile, "overlap": overlap}
            row |= {
                "computed": round(computed(model, method, overlap, x, tile), 3),
                "cpu_seconds": round(seconds, 2),
            }
            row |= compare(out, whole, borders(method, overlap, tile, f, x, step), step)
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
    """Mean absolute step of the difference from pixel to pixel, across the borders of tiles and elsewhere."""
    steps = []
    for dim, places in ((2, rows), (3, columns)):
        step = (
            difference.diff(dim=dim).abs().mean([d for d in range(4) if d != dim])
        )  # one value for each line between two pixels
        at = torch.zeros(len(step), dtype=torch.bool)
        at[[place - 1 for place in places]] = True
        steps.append((step[at], step[~at]))
    at, elsewhere = (torch.cat(values) for values in zip(*steps, strict=True))
    return (at.mean().item() if len(at) else 0.0), elsewhere.mean().item()


def borders(
    method: str, overlap: float, tile: int, f: int, x: Tensor, step: str
) -> tuple[list[int], list[int]]:
    """Rows and columns, in pixels of the output, at which a tile begins or ends; the others are judged at diffusers' places."""
    scale = f if step == "encode" else 1
    found = []
    for length in x.shape[2:]:
        if method == "blended":
            starts, side = Tiles(tile, int(tile * overlap) // f * f, f).along(length)
            places = {place for start in starts for place in (start, start + side)}
        else:
            stride = int(tile * (1 - THEIR_OVERLAP))
            places = {
                place
                for start in range(0, length, stride)
                for place in (start, start + int(tile * THEIR_OVERLAP))
            }
        found.append(sorted(place // scale for place in places if 0 < place < length))
    return found[0], found[1]


def computed(model: AutoencoderKL, method: str, overlap: float, x: Tensor, tile: int) -> float:
    """Image pixels computed near the image, over those it has."""
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
    looked_at = sum(high * wide for boxes in samples(height, width, unit, tile) for _, _, high, wide in boxes)
    return (down * across + looked_at) / (height * width)


def line(row: dict[str, Any]) -> str:
    what = f"{row['step']} {row['photo']} {row['height']}x{row['width']} tile {row['tile']} {row['method']} {row['overlap']}"
    error = f"max {row['max']:.5f} rms {row['rms']:.5f} psnr {row['psnr']:.1f}"
    seams = f"border step {row['border_step']:.3f} seam {row['seam']:.2f}"
    return f"{what}: computed {row['computed']:.2f} {row['cpu_seconds']:.1f} s {error} {seams}"


def measure_memory(name: str, step: str, options: argparse.Namespace) -> dict[str, Any]:
    """One large random image in a new process."""
    command = [sys.executable, __file__, name, "--memory", str(options.memory), "--step", step]
    command += ["--tile", str(options.tile), "--overlap", str(options.overlap[0]), "--here"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_tiling: {done.stderr.strip()}")
    peak, size = (int(value) for value in done.stdout.split())
    row: dict[str, Any] = {
        "model": Path(name).name,
        "step": step,
        "side": options.memory,
        "tile": options.tile,
    }
    row |= {"overlap": options.overlap[0], "peak_resident_bytes": peak, "of_these_before_the_call": size}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="+", help="a run, an exported folder or a preset")
    parser.add_argument("--images", type=Path, nargs="+", help="photos (default: four of scikit-image's)")
    parser.add_argument("--side", type=int, default=1024, help="longest side that is kept")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile")
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.125, 0.25], help="of blended tiles")
    parser.add_argument("--memory", type=int, help="measure an image of this side instead")
    parser.add_argument(
        "--step", choices=["encode", "decode"], nargs="+", default=["decode"], help="with --memory"
    )
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write instead of the one in benchmarks/DEVICE")
    options = parser.parse_args()
    logging.set_verbosity_error()
    with torch.no_grad():
        try:
            if options.here:
                return run_here(options)
            if options.memory:
                found = [
                    measure_memory(name, step, options) for name in options.model for step in options.step
                ]
            else:
                found = []
                for name in options.model:
                    model = load(name)
                    for file in options.images or default_images():
                        found += rows(name, model, file, options)
        except LatentAEError as error:
            raise SystemExit(f"bench_tiling: {error}") from None
    out = options.out or ROOT / "benchmarks" / folder_name(default_device()) / (
        "tiling_memory.json" if options.memory else "tiling.json"
    )
    write_json(out, {**about(default_device()), "diffusers": version("diffusers"), "rows": found})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
