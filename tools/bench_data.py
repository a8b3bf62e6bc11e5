"""Time latentae's training loader and plain webdataset + PIL on the same shards.

    python tools/bench_data.py [--images 2000] [--batch 32] [--workers 0] [--worlds 1 2 4 8]
    [--stages-only]

The shards have JPEGs of quality 90, 512 pixels on the short side, cut from the photos of
scikit-image and scikit-learn (or synthetic noise if these are not installed), each with a caption.
Both loaders read one epoch, shuffle, decode, cut a random square of half to all of the short side,
resize it to 256 (antialiased bicubic), flip half of them and build batches; the crops agree within
a level. Loaders take turns, each in a new process with one thread; medians. Writes
benchmarks/DEVICE/data.json:

- stages: decoding and cropping alone, CPU milliseconds per image, and the difference of pixels from
  PIL's.
- loader: images per second of CPU time (what one core delivers) and by the clock; with --workers
  also from worker processes. Resident memory above that of a process that has imported the same
  modules and read nothing: after a quarter of the epoch, and its peak.
- read amplification: bytes that all ranks together read from files in one epoch, over the bytes of
  the members of the samples they used.

Linux only: bytes and memory come from /proc.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import about, command_line, result_file, version, write_json
from PIL import Image
from torch import Tensor

from latentae.data import pixels
from latentae.data.builtin import HELD_OUT, TRAINING, photo_file
from latentae.data.decode import decode_image
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.shard_index import load_index
from latentae.data.transforms import random_crop_flip
from latentae.errors import MissingDependencyError
from latentae.keyed import derive_seed

SHORT, LONG = 512, (512, 683, 768)  # pixels; images take the long sides in turn
QUALITY = 90
SIZE = 256
SCALE = (0.5, 1.0)
SHUFFLE = 1000  # webdataset's buffer, as its documentation has it
BASELINE, OURS, OURS_PILLOW = "webdataset + PIL", "latentae", "latentae, Pillow only"


@dataclass(frozen=True)
class Job:
    """The measurement of one process: its rank's share of one epoch."""

    loader: str
    shards: tuple[str, ...]
    batch: int
    workers: int
    rank: int = 0
    world_size: int = 1


# ---- images and shards


def sources() -> tuple[str, list[Image.Image]]:
    """Photos, or noise with their spectrum (amplitude 1 / frequency, Field 1987)."""
    try:
        photos = [Image.open(photo_file(name)).convert("RGB") for name in (*TRAINING, *HELD_OUT)]
        return "photos of scikit-image and scikit-learn", photos
    except MissingDependencyError:
        return "synthetic 1/f noise", [_synthetic(seed) for seed in range(8)]


def _synthetic(seed: int, side: int = 1024) -> Image.Image:
    white = np.random.default_rng(seed).standard_normal((3, side, side))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = 1
    pink = np.fft.ifft2(np.fft.fft2(white) / frequency).real
    scaled = 128 + 50 * (pink - pink.mean()) / pink.std()
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def jpeg(photos: list[Image.Image], number: int) -> bytes:
    """One image of the data set: a random crop of a photo, resized to 512 pixels."""
    rng = np.random.default_rng(number)
    photo, height, width = photos[number % len(photos)], SHORT, LONG[number % len(LONG)]
    factor = min(photo.height / height, photo.width / width) * rng.uniform(0.7, 1.0)
    high, wide = height * factor, width * factor
    top, left = rng.uniform(0, photo.height - high), rng.uniform(0, photo.width - wide)
    file = io.BytesIO()
    cut = photo.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    cut.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_tars(folder: Path, photos: list[Image.Image], images: int, per_shard: int) -> dict[str, int]:
    """Write the shards; returns the bytes of each sample's members."""
    sizes: dict[str, int] = {}
    for first in range(0, images, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05}.tar", "w") as tar:
            for number in range(first, min(first + per_shard, images)):
                key = f"{number:07}"
                members = {"jpg": jpeg(photos, number), "txt": f"photo {number % len(photos)}".encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                sizes[key] = sum(map(len, members.values()))
    return sizes


# ---- the two loaders


def pil_crop(image: Image.Image, seed: int) -> Tensor:
    """`random_crop_flip` in PIL: crop, resize, flip, copy."""
    draws = (np.random.Philox(key=seed).random_raw(4) >> np.uint64(11)) * 2.0**-53
    short = min(image.size)
    lowest, highest = (min(max(bound * short, SIZE), short) for bound in SCALE)
    side = round(math.exp(math.log(lowest) + draws[0] * (math.log(highest) - math.log(lowest))))
    top, left = int(draws[1] * (image.height - side + 1)), int(draws[2] * (image.width - side + 1))
    crop = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if draws[3] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop))


def plain_batches(job: Job) -> Iterator[tuple[list[str], Tensor]]:
    """webdataset as documented: shards split over ranks, a shuffle buffer, PIL decoding."""
    import webdataset

    wds: Any = webdataset  # its names are resolved lazily, past type checkers

    def transformed(sample: dict[str, Any]) -> tuple[str, Tensor]:
        return sample["__key__"], pil_crop(sample["jpg"], derive_seed("augment", sample["__key__"]))

    def joined(samples: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
        return [key for key, _ in samples], torch.stack([image for _, image in samples])

    urls = list(job.shards)[job.rank :: job.world_size]
    data = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None, empty_check=False)
    data = (
        data.shuffle(SHUFFLE)
        .decode("pilrgb")
        .map(transformed)
        .batched(job.batch, collation_fn=joined, partial=False)
    )
    if not job.workers:
        yield from data
        return
    yield from wds.WebLoader(data, batch_size=None, num_workers=job.workers)


def our_batches(job: Job) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    settings = {
        "shards": "::".join(job.shards),
        "validation": "none",
        "resolution": SIZE,
        "scale_min": SCALE[0],
        "scale_max": SCALE[1],
        "workers": job.workers,
        "cache_mb": 0,
    }
    known = {name: value for name, value in settings.items() if name in DataOptions.model_fields}
    loader = TrainLoader(DataOptions(**known), job.batch, 0, job.rank, job.world_size)
    for _, batch in zip(range(loader.samples // (job.batch * job.world_size)), loader, strict=False):
        yield batch.keys, batch.images


def batches(job: Job) -> Iterator[tuple[Any, Tensor]]:
    if job.loader == OURS_PILLOW:
        pixels.simplejpeg = None
    return plain_batches(job) if job.loader == BASELINE else our_batches(job)


# ---- one process


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: by read and pread, from any file


def load(job: Job, warm_up: Job) -> dict[str, Any]:
    """Load one rank's share of an epoch and measure it; `warm_up` first imports all modules."""
    torch.set_num_threads(1)
    for _ in batches(warm_up):
        pass
    keys: list[str] = []
    resident = [_status("VmRSS")]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start, cpu, read = time.perf_counter(), time.process_time(), _bytes_read()
    for names, images in batches(job):
        assert images.shape[0] == len(names)
        keys += names
        resident.append(_status("VmRSS"))
    return {
        "keys": keys,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "read_bytes": _bytes_read() - read,
        "quarter_bytes": resident[len(resident) // 4] - resident[0],
        "peak_bytes": _status("VmHWM") - resident[0],
    }


def _send(pipe: Connection, job: Job, warm_up: Job) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for a loader's workers, the usual method on Linux
    pipe.send(load(job, warm_up))


def run(job: Job, warm_up: Job) -> dict[str, Any]:
    """`load` in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latentae.data.loader", "webdataset", "torchvision"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, job, warm_up))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        sys.exit(
            f"the process of {job.loader}, rank {job.rank} of {job.world_size}, died; see its error above"
        )
    finally:
        process.join()


# ---- measures


def cpu_milliseconds(
    calls: Mapping[str, Callable[[], object]], images: int, repeats: int
) -> dict[str, float]:
    """Median CPU milliseconds per image of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:
                times[name].append(1e3 * (time.process_time() - start) / images)
    return {name: statistics.median(values) for name, values in times.items()}


def stages(jpegs: list[bytes], loaders: list[str], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each stage and of all stages from bytes to crop, in one process."""
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs]
    decoded = [decode_image(data, "image") for data in jpegs]
    fast = pixels.simplejpeg

    def with_decoder(loader: str, call: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            pixels.simplejpeg = fast if loader == OURS else None
            call()

        return timed

    plain: dict[str, Callable[[], object]] = {
        "header": lambda: [Image.open(io.BytesIO(data)) for data in jpegs],
        "decode": lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in jpegs],
        "crop and resize": lambda: [pil_crop(image, seed) for seed, image in enumerate(opened)],
        "both": lambda: [
            pil_crop(Image.open(io.BytesIO(data)).convert("RGB"), seed) for seed, data in enumerate(jpegs)
        ],
    }
    ours: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(data, "image") for data in jpegs],
        "crop and resize": lambda: [our_crop(image, seed) for seed, image in enumerate(decoded)],
        "both": lambda: [our_crop(decode_image(data, "image"), seed) for seed, data in enumerate(jpegs)],
    }
    rows = []
    for stage, plain_call in plain.items():
        others = [loader for loader in loaders if loader != BASELINE and stage in ours]
        calls = {BASELINE: plain_call}
        calls |= {loader: with_decoder(loader, ours[stage]) for loader in others}
        rows.append({"measure": "stage", "stage": stage} | cpu_milliseconds(calls, len(jpegs), repeats))
    pixels.simplejpeg = fast
    apart = [
        (pil_crop(image, seed).permute(2, 0, 1).int() - our_crop(tensor, seed).int()).abs()
        for seed, (image, tensor) in enumerate(zip(opened, decoded, strict=True))
    ]
    largest = max(int(one.max()) for one in apart)
    mean = statistics.mean(float(one.float().mean()) for one in apart)
    return [*rows, {"measure": "levels apart from PIL", "largest": largest, "mean": mean}]


def our_crop(image: Tensor, seed: int) -> Tensor:
    return random_crop_flip(image, SIZE, scale=SCALE, seed=seed)


def throughput(job: Job, loaders: list[str], warm_up: Job, repeats: int) -> list[dict[str, Any]]:
    """Images per second of each loader, the loaders taking turns, and memory without workers."""
    results: dict[str, list[dict[str, Any]]] = {loader: [] for loader in loaders}
    for _ in range(repeats):
        for loader, runs in results.items():
            runs.append(run(replace(job, loader=loader), replace(warm_up, loader=loader)))
    rows = []
    for loader, runs in results.items():
        images = len(runs[0]["keys"])
        row: dict[str, Any] = {
            "measure": "loader",
            "loader": loader,
            "workers": job.workers,
            "images": images,
        }
        row["images_per_second"] = statistics.median(images / one["seconds"] for one in runs)
        if not job.workers:
            row["images_per_cpu_second"] = statistics.median(images / one["cpu_seconds"] for one in runs)
            for name in ("quarter_bytes", "peak_bytes"):
                row[name] = int(statistics.median(one[name] for one in runs))
        rows.append(row)
    speed = "images_per_second" if job.workers else "images_per_cpu_second"
    for row in rows[1:]:
        row["times_the_baseline"] = row[speed] / rows[0][speed]
    return rows


def amplification(
    job: Job, worlds: list[int], loaders: list[str], warm_up: Job, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    rows = []
    for loader in loaders:
        for world_size in worlds:
            share = replace(job, loader=loader, world_size=world_size)
            ranks = [replace(share, rank=rank) for rank in range(world_size)]
            results = [run(rank, replace(warm_up, loader=loader)) for rank in ranks]
            used = sum(sizes[key] for result in results for key in result["keys"])
            read = sum(result["read_bytes"] for result in results)
            row = {"measure": "read amplification", "loader": loader, "world_size": world_size}
            row |= {"read_bytes": read, "used_bytes": used, "amplification": read / used if used else None}
            rows.append(row)
    return rows


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, photos = sources()
    (folder / "warm-up").mkdir()
    (folder / "data").mkdir()
    write_tars(folder / "warm-up", photos, 2 * options.batch, options.batch)
    sizes = write_tars(folder / "data", photos, options.images, options.shard_size)
    data, warm = (tuple(sorted(map(str, (folder / name).glob("*.tar")))) for name in ("data", "warm-up"))
    load_index(data)  # written next to the shards, once for all runs
    job, warm_up = Job(BASELINE, data, options.batch, 0), Job(BASELINE, warm, options.batch, 0)
    loaders = [BASELINE, OURS_PILLOW, *([OURS] if pixels.simplejpeg else [])]
    jpegs = [jpeg(photos, number) for number in range(min(options.images, 60))]
    rows = stages(jpegs, loaders, options.repeats)
    if not options.stages_only:
        for workers in sorted({0, options.workers}):
            rows += throughput(replace(job, workers=workers), loaders, warm_up, options.repeats)
        rows += amplification(job, options.worlds, [BASELINE, loaders[-1]], warm_up, sizes)
    return {
        "images": described(options.images, source),
        "mean_bytes": statistics.mean(sizes.values()),
        "batch": options.batch,
        "shard_size": options.shard_size,
        "webdataset": version("webdataset"),
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg"),
        "rows": rows,
    }


def described(images: int, source: str) -> str:
    return f"{images} from {source}, {SHORT} x {LONG[0]} to {SHORT} x {LONG[-1]}, JPEG quality {QUALITY}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of each measure under one head, for the terminal."""
    lines: list[str] = []
    heads: list[str] = []
    for row in rows:
        if list(row) != heads:
            heads = list(row)
            lines += ["", "  ".join(heads)]
        lines.append(
            "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    return "\n".join(lines)


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=2000, help="samples per epoch")
    add("--shard-size", type=int, default=100, help="samples per shard")
    add("--batch", type=int, default=32, help="images per batch of one rank")
    add("--workers", type=int, default=0, help="also time this number of worker processes")
    add("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="world sizes for counting bytes")
    add("--repeats", type=int, default=5, help="runs of each loader")
    add("--stages-only", action="store_true", help="time only decoding and cropping, no loader")
    options = parser.parse_args()
    if not Path("/proc/self/io").exists():
        sys.exit("bench_data.py counts bytes and memory in /proc, which is missing here; run it on Linux")
    device = torch.device("cpu")
    out, head = options.out or result_file(device, "data"), about(device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = head | measure(options, Path(folder))
    write_json(out, report)
    print(f"{table(report['rows'])}\n\nwrote {out}")


if __name__ == "__main__":
    main()
