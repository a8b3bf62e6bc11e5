"""Time `latentae encode` and a plain DataLoader + diffusers loop on the same shards.

    python tools/bench_encode.py [--preset kl-f8] [--images 32] [--shard-size 16] [--batch 4]
    [--resolution 256]

The shards are those of bench_data.py: JPEGs of quality 90, 512 pixels on the short side, each with
a caption. Variants take turns in one process; medians of seconds by the clock. Writes
benchmarks/DEVICE/encode.json:

- whole: from the command to the last file, including loading the model. `latentae encode` writes
  tars, checksums and statistics; the plain loop (tarfile, PIL, torchvision, a DataLoader with
  worker processes, diffusers' AutoencoderKL with the same weights, in bf16 on a GPU) writes one
  safetensors file of moments per shard.
- in memory: only encoding the same decoded images, batch by batch, on the warm model.
- stage: the steps of `latentae encode` one by one, in CPU seconds of all its threads: load the
  model, read the shards, decode and crop; write is the rest: planning, hashing, tars, sidecars and
  statistics. By the clock most of it overlaps with encoding.

`over_memory` is whole / in memory, both of latentae; `over_memory_loaded` excludes loading the
model, as in a long run. `times_the_baseline` is the plain loop's whole / latentae's whole.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import described, sources, write_tars
from benchmarking import command_line, default_device, result_file, save, version
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

from latentae import encode
from latentae.data.decode import decode_sample
from latentae.data.shard_files import read_shard
from latentae.data.shard_index import load_index
from latentae.data.transforms import resize_and_center_crop
from latentae.encoding.encode import conclude, prepare
from latentae.encoding.options import EncodeOptions
from latentae.encoding.shard_encoder import ModelEncoder, encode_shards
from latentae.errors import LatentAEError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import build
from latentae.models.presets import preset
from latentae.models.pretrained import load_model, resolve_model
from latentae.options import parse

OURS, BASELINE = "latentae encode", "DataLoader + diffusers"
Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One measurement: model, shards and batch."""

    model: Path
    shards: list[str]
    images: int
    batch: int
    resolution: int
    workers: int
    device: torch.device

    @property
    def compute(self) -> str:
        """The compute dtype that `latentae encode` chooses."""
        return "bf16" if self.device.type == "cuda" else "fp32"


# ---- the plain loop


class TarImages(IterableDataset[tuple[str, str, Tensor]]):
    """(shard, key, image in [-1, 1]) with tarfile, PIL and torchvision; workers split shards."""

    def __init__(self, shards: list[str], resolution: int) -> None:
        super().__init__()
        self.shards = shards
        self.transform = v2.Compose(
            [
                v2.Resize(resolution, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(resolution),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        worker = get_worker_info()
        mine = self.shards if worker is None else self.shards[worker.id :: worker.num_workers]
        for shard in mine:
            with tarfile.open(shard) as tar:
                for member in tar:
                    data = tar.extractfile(member)
                    if data is not None and member.name.endswith(".jpg"):
                        image = Image.open(io.BytesIO(data.read())).convert("RGB")
                        yield shard, member.name.removesuffix(".jpg"), self.transform(image)


@torch.no_grad()
def plain_loop(setting: Setting, out: Path) -> None:
    """Encode all shards; one safetensors file of moments each."""
    dtype = torch.bfloat16 if setting.compute == "bf16" else torch.float32
    model: Any = DiffusersAutoencoderKL.from_pretrained(setting.model)
    model = model.to(setting.device, dtype).eval()
    images = TarImages(setting.shards, setting.resolution)
    pin = setting.device.type == "cuda"
    loader = DataLoader(images, batch_size=setting.batch, num_workers=setting.workers, pin_memory=pin)
    found: dict[str, dict[str, Tensor]] = {}
    for shards, keys, batch in loader:
        moments = model.encode(batch.to(setting.device, dtype, non_blocking=True)).latent_dist.parameters
        for shard, key, values in zip(shards, keys, moments.to("cpu", torch.bfloat16), strict=True):
            found.setdefault(shard, {})[key] = values.contiguous().clone()
    out.mkdir()
    for shard, tensors in found.items():
        save_file(tensors, out / f"{Path(shard).stem}.safetensors")


# ---- measures


def decoded(setting: Setting) -> list[Tensor]:
    """Every image as `latentae encode` crops it, in uint8 batches [B, 3, R, R]."""
    squares = [
        resize_and_center_crop(decode_sample(raw).image, setting.resolution)
        for shard in setting.shards
        for raw in read_shard(shard)
    ]
    return list(torch.stack(squares).split(setting.batch))


def in_memory(setting: Setting, batches: list[Tensor]) -> dict[str, Call]:
    """Calls that encode `batches` with each model; compares the moments of both models first."""
    ours, _ = load_model(resolve_model(setting.model, "ema").weights_file, device=setting.device)
    encoder = ModelEncoder(ours, setting.device, setting.compute)
    dtype = torch.bfloat16 if setting.compute == "bf16" else torch.float32
    theirs: Any = DiffusersAutoencoderKL.from_pretrained(setting.model)
    theirs = theirs.to(setting.device, dtype).eval()

    @torch.no_grad()
    def diffusers(batch: Tensor) -> Tensor:
        pixels = batch.to(setting.device, dtype) / 127.5 - 1
        return theirs.encode(pixels).latent_dist.parameters.float().cpu()

    mean, logvar = encoder(batches[0])
    apart = (torch.cat([mean, logvar], 1) - diffusers(batches[0])).abs().max().item()
    largest = mean.abs().max().item()
    if not apart <= (1e-3 if dtype == torch.float32 else 0.1) * max(1.0, largest):
        raise SystemExit(
            f"the models differ by {apart:.1e} on latents of up to {largest:.1e}; nothing was timed"
        )
    return {
        OURS: lambda: [encoder(batch) for batch in batches],
        BASELINE: lambda: [diffusers(batch) for batch in batches],
    }


def seconds_in_turn(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each call, the calls taking turns; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - start)
                print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    return times


def cpu_seconds_of(call: Call, repeats: int) -> float:
    """Median of this process's CPU time."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def stages(setting: Setting, folder: Path, repeats: int) -> dict[str, float]:
    """CPU seconds of loading, reading, decoding and writing."""
    raws = [raw for shard in setting.shards for raw in read_shard(shard)]
    config = AutoencoderKL.from_pretrained(setting.model).config
    side = setting.resolution // config.downsampling
    noise = np.random.default_rng(0).standard_normal(
        (2, setting.batch, config.latent_channels, side, side), dtype=np.float32
    )
    mean, logvar = torch.from_numpy(noise)  # distinct values: constants would be written faster
    outs = iter(range(repeats))

    def without_encoding() -> None:
        work = prepare(
            parse(
                EncodeOptions,
                setting.model,
                setting.shards,
                folder / f"stub-{next(outs)}",
                **options_of(setting),
            )
        )
        for _ in encode_shards(work.pending, work.store, lambda images: (mean, logvar), work.settings):
            continue
        conclude(work)

    def load() -> None:
        load_model(resolve_model(setting.model, "ema").weights_file, device=setting.device)

    def read() -> None:
        for shard in setting.shards:
            for _ in read_shard(shard):
                continue

    def decode() -> None:
        for raw in raws:
            resize_and_center_crop(decode_sample(raw).image, setting.resolution)

    times = {
        name: cpu_seconds_of(call, repeats)
        for name, call in (("load", load), ("read", read), ("decode", decode))
    }
    rest = cpu_seconds_of(without_encoding, repeats) - times["read"] - times["decode"]
    return {**times, "write": max(0.0, rest)}


def options_of(setting: Setting) -> dict[str, Any]:
    """Options of `encode` and `prepare`."""
    return {
        "dtype": "bf16",
        "resolution": setting.resolution,
        "batch_size": setting.batch,
        "task_id": 0,
        "num_tasks": 1,
        "device": str(setting.device),
    }


def ours(setting: Setting, out: Path) -> None:
    encode(setting.model, setting.shards, out, **options_of(setting))


def measure(setting: Setting, folder: Path, repeats: int) -> dict[str, Any]:
    count = iter(range(1000))
    memory = in_memory(setting, decoded(setting))
    calls: dict[str, Call] = {
        f"whole, {OURS}": lambda: ours(setting, folder / f"ours-{next(count)}"),
        f"in memory, {OURS}": memory[OURS],
        f"whole, {BASELINE}": lambda: plain_loop(setting, folder / f"plain-{next(count)}"),
        f"in memory, {BASELINE}": memory[BASELINE],
    }
    times = seconds_in_turn(calls, repeats)
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        what, variant = name.split(", ")
        median = statistics.median(values)
        row = {"measure": what, "variant": variant, "seconds": median}
        row |= {"fastest": min(values), "slowest": max(values), "images_per_second": setting.images / median}
        rows.append(row)
    cpu = stages(setting, folder, repeats)
    rows += [{"measure": "stage", "stage": stage, "cpu_seconds": value} for stage, value in cpu.items()]
    load = time.perf_counter()
    load_model(resolve_model(setting.model, "ema").weights_file, device=setting.device)
    load = time.perf_counter() - load
    whole, pure = times[f"whole, {OURS}"], times[f"in memory, {OURS}"]
    return {
        "over_memory": _ratio(whole, pure),
        "over_memory_loaded": _ratio([value - load for value in whole], pure),
        "times_the_baseline": _ratio(times[f"whole, {BASELINE}"], whole),
        "rows": rows,
    }


def _ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of each turn: a slow machine slows both calls of a turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def run(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    build(preset(options.preset)).save_pretrained(folder / "model")
    source, photos = sources()
    (folder / "shards").mkdir()
    sizes = write_tars(folder / "shards", photos, options.images, options.shard_size)
    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    load_index(shards)  # written next to the shards, once for all runs
    sizes_of_run = (options.images, options.batch, options.resolution, options.workers)
    setting = Setting(folder / "model", shards, *sizes_of_run, device)
    return {
        "preset": options.preset,
        "images": described(options.images, source),
        "mean_bytes": statistics.mean(sizes.values()),
        "resolution": options.resolution,
        "batch": options.batch,
        "shard_size": options.shard_size,
        "workers_of_the_plain_loop": options.workers,
        "compute": setting.compute,
        "diffusers": version("diffusers"),
        **measure(setting, folder, options.repeats),
    }


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--preset", default="kl-f8", help="model preset")
    add("--images", type=int, default=32, help="samples in all shards")
    add("--shard-size", type=int, default=16, help="samples per shard")
    add("--batch", type=int, default=4, help="images per batch, in both variants")
    add("--resolution", type=int, default=256, help="side in pixels of the encoded square")
    add("--workers", type=int, default=2, help="worker processes of the plain loop's DataLoader")
    add("--repeats", type=int, default=3, help="timed runs of each variant")
    options = parser.parse_args()
    logging.set_verbosity_error()
    device = default_device()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, device, Path(folder))
    except LatentAEError as error:
        raise SystemExit(f"bench_encode: {error}") from None
    for row in report["rows"]:
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    print(
        f"whole / in memory {report['over_memory']:.3f}, without loading {report['over_memory_loaded']:.3f}"
    )
    print(f"the plain loop takes {report['times_the_baseline']:.2f} times as long")
    save(options.out or result_file(device, "encode"), device, report)


if __name__ == "__main__":
    main()
