"""The verb `decode`: latents to one picture, below the original images if stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.decode import decode_image
from latentae.data.tars import Sample
from latentae.data.transforms import crop_to_bucket, to_uint8
from latentae.device import choose_device
from latentae.encoding.latent_shard import LatentShard, bucket_of
from latentae.encoding.options import DecodeOptions
from latentae.encoding.sidecar import listed_shards, open_output, read_sidecars
from latentae.encoding.store import Store
from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.metrics import psnr
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model, resolve_model
from latentae.options import verb
from latentae.pages.images import image_grid, write_png
from latentae.progress import say

__all__ = ["decode"]

SOME = 8  # samples shown without `keys`

_Found = list[tuple[str, str, dict[str, Tensor]]]
"""Key, shard, and tensors: the stored ones, raw [z, h, w], and `original`, uint8 [C, H, W]."""


@verb(DecodeOptions)
def decode(options: DecodeOptions) -> dict[str, Any]:
    """Decode latents and write a PNG with one column per sample.

    The rows are the original if images were stored, the decoded posterior mean, and the decoded
    mean of the flipped image if it was stored.

    Returns:
        `file`, `keys` ("KEY of SHARD" for repeated keys), and `psnr` in dB by key, for stored
        images.

    Raises:
        ImageError: `file` is no PNG.
        OutputError: `out` is no output of encode, or the picture can't be written.
        ModelError: the model is missing or not the one that encoded.
        DataError: a key is missing, or its shard is damaged.
    """
    if Path(options.file).suffix.lower() != ".png":
        raise ImageError(f"the picture is a PNG, got {options.file}; give a name that ends in .png")
    store, record = open_output(options.out)
    network = _load(record, options, store.shown)
    found = _find(store, list(dict.fromkeys(options.keys or ())), network.config.in_channels)
    times = Counter(key for key, _, _ in found)
    shown = [key if times[key] == 1 else f"{key} of {shard}" for key, shard, _ in found]
    rows = [
        [_decoded(network, tensors[name]) for _, _, tensors in found]
        for name in ("mean", "mean_flip")
        if name in found[0][2]
    ]
    ratios: dict[str, float] = {}
    if all("original" in tensors for _, _, tensors in found):
        originals = [tensors["original"] for _, _, tensors in found]
        for name, original, result in zip(shown, originals, rows[0], strict=True):
            ratios[name] = float(psnr(result[None], original[None]))
            say(f"decode: {name}: {ratios[name]:.2f} dB")
        rows.insert(0, originals)
    for key, count in times.items():
        if count > 1:
            say(f"decode: {count} shards have a sample {key}; all are shown, in the order of their shards")
    write_png(options.file, image_grid(rows))
    say(f"decode: {len(shown)} samples of {store.shown} in {options.file}")
    return {"file": str(options.file), "keys": shown, "psnr": ratios}


def _load(record: Mapping[str, Any], options: DecodeOptions, out: str) -> Autoencoder:
    """Load the model of the latents."""
    path = options.model if options.model is not None else record.get("notes", {}).get("model_path")
    if path is None:
        raise ModelError(f"{out} does not record the path of its model; give it with --model")
    source, expected = resolve_model(path, options.weights), record["inputs"].get("model")
    if source.fingerprint != expected:
        raise ModelError(
            f"{path} is not the model that encoded {out} (fingerprint {source.fingerprint[:12]}..., expected "
            f"{str(expected)[:12]}...); give that model, or its other weights with --weights"
        )
    return load_model(source.weights_file, device=choose_device(options.device))[0]


def _find(store: Store, keys: list[str], channels: int) -> _Found:
    """The samples with these keys, in their order, or the first ones without keys."""
    sizes = store.sizes()
    found: _Found = []
    for sidecar in filter(None, read_sidecars(store, listed_shards(sizes), sizes)):
        if not sidecar.output.samples:
            continue
        with LatentShard(store, sidecar) as shard:
            for sample in shard.samples():
                if sample.key in keys or not keys:
                    found.append((sample.key, sidecar.shard, _read(shard, sample, channels)))
                if not keys and len(found) == SOME:
                    return found
    if missing := set(keys).difference(key for key, _, _ in found):
        raise DataError(
            f"no sample {min(missing)!r} in the finished shards of {store.shown}; use the keys of the input"
        )
    if not found:
        raise DataError(f"no latents are finished in {store.shown}; run the encode command first")
    return sorted(found, key=lambda one: keys.index(one[0])) if keys else found


def _read(shard: LatentShard, sample: Sample, channels: int) -> dict[str, Tensor]:
    info = shard.info(sample)
    tensors = shard.tensors(sample, info)
    extension = str(info.get("source"))
    if extension in [name for name, _, _ in sample.members]:
        bucket, data = bucket_of(info), shard.read(sample, extension)
        name = f"{sample.key}.{extension}"
        image = decode_image(data, name, channels=channels, max_pixels=None, short=max(bucket))
        tensors["original"] = crop_to_bucket(image, bucket)
    return tensors


@torch.inference_mode()
def _decoded(network: Autoencoder, latent: Tensor) -> Tensor:
    """Decode one raw latent [z, h, w] to uint8 [C, H, W] on the CPU."""
    latent = latent[None].to(next(network.parameters()).device, torch.float32)
    return to_uint8(network.decode(latent))[0].cpu()
