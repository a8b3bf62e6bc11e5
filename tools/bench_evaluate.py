"""Time the steps of `latentae evaluate` per image and the model alone.

    python tools/bench_evaluate.py [--preset kl-f8] [--images 16] [--batch 4] [--resolution 256]
    [--stream 2000]

Variants take turns in one process on the same decoded images; medians of seconds per image by the
clock. Writes benchmarks/DEVICE/evaluate.json:

- model: only encoding and decoding.
- whole: everything that `evaluate` does with an image: the model, its 8-bit latents, PCA, block
  DCT, JPEG, WebP, all metrics, the perceptual distance and the features of each, and the sums over
  latents.
- one row for each of these steps alone.

`times_the_model` is whole / model. `grown_mib` is the peak resident memory between two chunks minus
that of the first quarter of `--stream` images through a tiny model: results go to one file per
chunk, so memory should not grow with the number of images.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_data import QUALITY, sources, write_tars
from benchmarking import command_line, cpu_seconds, default_device, result_file, save
from torch import Tensor

from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import LatentAEError
from latentae.evaluation.loaded_inputs import load_inputs
from latentae.evaluation.measure_images import Instruments, Loaded, load_images, measure
from latentae.evaluation.measurement import MODEL, ChunkFiles
from latentae.evaluation.options import EvaluateOptions
from latentae.measures.latents.report import LatentReport
from latentae.measures.metrics import psnr, ssim
from latentae.models.config import build
from latentae.models.presets import preset

Call = Callable[[], object]


def instruments_of(options: argparse.Namespace, folder: Path, device: torch.device) -> Instruments:
    """The instruments of `evaluate`, with baselines fitted on the same images."""
    given = EvaluateOptions(
        folder / "model",
        str(folder / "shards"),
        resolution=options.resolution,
        batch_size=options.batch,
        details=False,
        pca_shards=str(folder / "shards"),
        device=str(device),
    )
    return load_inputs(given).instruments()


def calls(instruments: Instruments, images: list[Loaded], batch: int) -> dict[str, Call]:
    """The timed calls by name."""
    stacked = torch.stack([item.image for item in images if item.image is not None]).to(instruments.device)
    parts = [part.contiguous(memory_format=torch.channels_last) for part in stacked.split(batch)]
    with torch.inference_mode():
        posteriors = [instruments.model.encode(to_float(part)) for part in parts]
        made = [to_uint8(instruments.model.decode(posterior.mode())) for posterior in posteriors]
        budgets = [
            int(size) for size in measure(instruments, images, batch).scores["latent_8bit"].values["bytes"]
        ]

    def model() -> None:
        for part in parts:
            to_uint8(instruments.model.decode(instruments.model.encode(to_float(part)).mode()))

    def each(function: Callable[[Tensor, Tensor], object]) -> Call:
        return lambda: [function(x, y) for x, y in zip(made, parts, strict=True)]

    def method(apply: Callable[[Tensor, list[int]], object]) -> Call:
        return lambda: [
            apply(part, budgets[row * batch : (row + 1) * batch]) for row, part in enumerate(parts)
        ]

    report = LatentReport()
    found: dict[str, Call] = {
        "model": model,
        "whole": lambda: measure(instruments, images, batch),
        "PSNR and SSIM": each(lambda x, y: (psnr(x, y), ssim(x, y))),
        "sums over latents": lambda: [
            report.add(p, to_float(x)) for p, x in zip(posteriors, parts, strict=True)
        ],
        **{other.name: method(other) for other in instruments.methods},
    }
    if instruments.distance.module is not None:
        found["perceptual distance"] = each(instruments.distance)
    if instruments.extractor is not None:
        found["features"] = each(lambda x, y: instruments.extractor(x) if instruments.extractor else None)
    return found


@torch.inference_mode()
def timed(found: dict[str, Call], repeats: int, images: int) -> dict[str, float]:
    """Median seconds per image of each call, the calls taking turns."""
    return {name: value / images for name, value in cpu_seconds(found, repeats, warmup=1).items()}


def growth(instruments: Instruments, images: list[Loaded], count: int, folder: Path) -> float:
    """Peak MiB at the end of a chunk, after the first quarter of `count` images minus within it."""

    def stream(positions: range) -> Iterator[Loaded]:
        for position in positions:
            item = images[position % len(images)]
            yield Loaded(position, f"{position:08}", item.image)

    parts, early, late = ChunkFiles(folder / "parts", count), 0.0, 0.0
    for number, chunk in enumerate(parts.chunks):
        measure(instruments, stream(chunk), 8).save(parts.path(number))
        if chunk.stop * 4 <= count:
            early = max(early, resident())
        else:
            late = max(late, resident())
    return late - early if early else 0.0


def resident() -> float:
    """Resident MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    build(preset(options.preset)).save_pretrained(folder / "model")
    source, photos = sources()
    (folder / "shards").mkdir()
    write_tars(folder / "shards", photos, options.images, options.images)
    raws = (raw for path in expand_shards(str(folder / "shards")) for raw in read_shard(path))
    images = list(load_images(enumerate(raws), options.resolution, 3))
    instruments = instruments_of(options, folder, device)
    seconds = timed(calls(instruments, images, options.batch), options.repeats, len(images))
    report = {
        "preset": options.preset,
        "images": f"{options.images} from {source}, JPEG quality {QUALITY}",
        "resolution": options.resolution,
        "batch": options.batch,
        "perceptual": instruments.distance.name,
        "extractor": None if instruments.extractor is None else instruments.extractor.name,
        "times_the_model": seconds["whole"] / seconds[MODEL],
        "rows": [{"part": name, "seconds_per_image": value} for name, value in seconds.items()],
    }
    if options.stream:
        tiny = folder / "tiny"
        tiny.mkdir()
        build(preset("tiny")).save_pretrained(tiny / "model")
        (tiny / "shards").symlink_to(folder / "shards")
        small = argparse.Namespace(**{**vars(options), "resolution": 64})
        raws = (raw for path in expand_shards(str(folder / "shards")) for raw in read_shard(path))
        few = list(load_images(enumerate(raws), 64, 3))
        report |= {
            "stream": options.stream,
            "grown_mib": growth(instruments_of(small, tiny, device), few, options.stream, tiny),
        }
    return report


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--preset", default="kl-f8", help="model preset")
    add("--images", type=int, default=16, help="number of images")
    add("--batch", type=int, default=4, help="images per batch")
    add("--resolution", type=int, default=256, help="side in pixels")
    add("--repeats", type=int, default=3, help="timed runs of each variant")
    add("--stream", type=int, default=2000, help="images to watch memory over; 0 skips this")
    options = parser.parse_args()
    device = default_device()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, device, Path(folder))
    except LatentAEError as error:
        raise SystemExit(f"bench_evaluate: {error}") from None
    for row in report["rows"]:
        print(f"{row['part']:>22}: {1000 * row['seconds_per_image']:8.1f} ms per image")
    print(f"whole / model {report['times_the_model']:.2f}")
    save(options.out or result_file(device, "evaluate"), device, report)


if __name__ == "__main__":
    main()
