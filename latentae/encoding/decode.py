"""The verb `decode`: latents of an output of `encode` back to images, in one picture, beside the originals where they were kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.decode import decode_image
from latentae.data.tars import Sample
from latentae.data.transforms import crop_to_bucket, to_uint8
from latentae.device import choose_device
from latentae.encoding.contents import ShardContents, shard_contents
from latentae.encoding.options import DecodeOptions
from latentae.encoding.plan import read_sidecars
from latentae.encoding.sidecar import SUFFIX
from latentae.encoding.store import Store
from latentae.encoding.verify import open_output
from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.metrics import psnr
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model, resolve_model
from latentae.options import verb
from latentae.pages.images import image_grid, write_png
from latentae.progress import say

__all__ = ["decode"]

SOME = 8  # samples shown where no keys are given


@verb(DecodeOptions)
def decode(options: DecodeOptions) -> dict[str, Any]:
    """Decode latents and write the images as one PNG: a column a sample, the original on top where images were kept.

    Below the decoded posterior mean stands that of the mirrored image, where it was stored.

    Returns:
        `file`, `keys` as shown ("KEY of SHARD" where a key is shown more than once), and `psnr` (dB by these, of samples whose image
        was kept).

    Raises:
        OutputError: `out` is no output of encode, or the picture can't be written.
        ModelError: the model is gone, or is another one than that of the latents.
        DataError: a key is not there, or its shard is damaged.
    """
    if Path(options.file).suffix.lower() != ".png":
        raise ImageError(f"the picture is written as PNG, got {options.file}; give a name that ends in .png")
    store, record = open_output(options.out)
    network = _load(record, options.model, options.weights, options.device, store.shown)
    found = _find(store, list(dict.fromkeys(options.keys or ())), network.config.in_channels)
    times = Counter(key for key, _, _ in found)
    shown = [key if times[key] == 1 else f"{key} of {shard}" for key, shard, _ in found]
    samples = [tensors for _, _, tensors in found]
    results = {
        name: _decode(network, [sample[name] for sample in samples])
        for name in ("mean", "mean_flip")
        if name in samples[0]
    }
    rows = list(results.values())
    ratios: dict[str, float] = {}
    if all("original" in sample for sample in samples):
        originals = [sample["original"] for sample in samples]
        rows.insert(0, originals)
        for name, original, result in zip(shown, originals, results["mean"], strict=True):
            ratios[name] = float(psnr(result[None], original[None]))
            say(f"decode: {name}: {ratios[name]:.2f} dB")
    for key, count in times.items():
        if count > 1:
            say(f"decode: {count} shards have a sample {key}; all are shown, in the order of their shards")
    write_png(options.file, image_grid([[_rgb(image) for image in row] for row in rows]))
    say(f"decode: {len(shown)} samples of {store.shown} in {options.file}")
    return {"file": str(options.file), "keys": shown, "psnr": ratios}


def _load(
    record: Mapping[str, Any], model: str | Path | None, weights: str, device: str, out: str
) -> Autoencoder:
    """The model that the latents are of, on the device."""
    path = model if model is not None else record.get("notes", {}).get("model_path")
    if path is None:
        raise ModelError(f"{out} does not say where its model is; give the one it was encoded with")
    source, expected = resolve_model(path, weights), record["inputs"].get("model")
    if source.fingerprint != expected:
        raise ModelError(
            f"{path} is not the model that {out} was encoded with (fingerprint {source.fingerprint[:12]}..., expected "
            f"{str(expected)[:12]}...); give that model, or its other weights with --weights"
        )
    return load_model(source.weights_file, device=choose_device(device))[0]


def _find(store: Store, keys: list[str], channels: int) -> list[tuple[str, str, dict[str, Tensor]]]:
    """Key, shard, and the tensors as stored [z, h, w] and, where the image was kept, `original`: uint8 [C, H, W] as it was encoded."""
    sizes = store.sizes()
    names = sorted(name.removesuffix(SUFFIX) for name in sizes if name.endswith(SUFFIX))
    found: list[tuple[str, str, dict[str, Tensor]]] = []
    for sidecar in read_sidecars(store, names, sizes):
        if sidecar is None or not sidecar.output.samples:
            continue
        with shard_contents(store, sidecar) as contents:
            for sample in contents.samples():
                if sample.key in keys or not keys:
                    found.append((sample.key, sidecar.shard, _read(contents, sample, channels)))
                if not keys and len(found) == SOME:
                    return found
    missing = set(keys).difference(key for key, _, _ in found)
    if missing:
        raise DataError(
            f"no sample {min(missing)!r} in the finished shards of {store.shown}; keys are as in the input"
        )
    if not found:
        raise DataError(f"no latent is finished in {store.shown} yet")
    return sorted(found, key=lambda one: keys.index(one[0])) if keys else found


def _read(contents: ShardContents, sample: Sample, channels: int) -> dict[str, Tensor]:
    info = contents.info(sample)
    result = contents.tensors(sample, info)
    extension = str(info.get("source"))
    if any(extension == name for name, _, _ in sample.members):
        height, width = info["bucket"] if "bucket" in info else info["crop"][2:]
        name, short = (
            f"{sample.key}.{extension}",
            max(height, width),
        )  # as it was encoded, which no limit refused
        image = decode_image(
            contents.read(sample, extension), name, channels=channels, max_pixels=None, short=short
        )
        result["original"] = crop_to_bucket(image, (height, width))
    return result


@torch.inference_mode()
def _decode(network: Autoencoder, latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents [z, h, w] of any sizes, raw -> uint8 [C, H, W] on the CPU, one at a time."""
    device = next(network.parameters()).device
    return [to_uint8(network.decode(latent[None].to(device, torch.float32)))[0].cpu() for latent in latents]


def _rgb(image: Tensor) -> Tensor:
    """uint8 [C, H, W] of 1, 3 or 4 channels -> [3, H, W]; alpha is left out."""
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
