"""Images that come inside installed wheels, by name: something to train on at once, without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from latentae.data.photos import HELD_OUT, TRAINING, photo_tiles
from latentae.data.shrinking import encode_png
from latentae.errors import DataError, MissingDependencyError

__all__ = ["BUILTIN", "HELD_OUT_DIGITS", "BuiltinImages", "digits", "is_builtin"]

BUILTIN = ("sklearn:digits", "sklearn:binary-digits", "skimage:photos")
SPLITS = ("train", "held-out")
HELD_OUT_DIGITS = 360
"""The last fifth of the 1,797 digits, which come largely writer by writer, so that it is mostly by other hands."""
TILE = 128


def is_builtin(images: str) -> bool:
    """Whether this names built-in images, rightly or nearly: `sklearn:...` or `skimage:...`."""
    return str(images).startswith(("sklearn:", "skimage:"))


class BuiltinImages:
    """The images of a built-in set, to be packed into shards; all are in memory (15 MB at most).

    Args:
        spec: `sklearn:digits` (8 x 8, gray, labels in `.cls`), `sklearn:binary-digits` (the same in black and white) or
            `skimage:photos` (tiles of 128 pixels, in colour), each with `:held-out` for the other side of its split.

    Raises:
        DataError: no such set or split.
        MissingDependencyError: the package that holds it is not installed.
    """

    def __init__(self, spec: str) -> None:
        name, _, split = spec.partition(":")[2].partition(":")
        name, split = f"{spec.partition(':')[0]}:{name}", split or SPLITS[0]
        if name not in BUILTIN or split not in SPLITS:
            raise DataError(
                f"{spec} is no built-in set of images; there are {', '.join(BUILTIN)}, each with :held-out for its other split"
            )
        self.place = f"{name}:{split}"
        rows = (
            _photos(split)
            if name == "skimage:photos"
            else _digits(split, binary=name == "sklearn:binary-digits")
        )
        self._rows = [(f"{split}/{key}", members) for key, members in rows]
        self.sizes = [len(members["png"]) for _, members in self._rows]
        digest = hashlib.blake2b(digest_size=16)
        for key, members in self._rows:
            digest.update(key.encode() + b"".join(members.values()))
        self.listing = digest.hexdigest()

    def key(self, number: int) -> str:
        """The split, then the digit's number or the photo and where in it the tile lies."""
        return self._rows[number][0]

    def name(self, number: int) -> str:
        """What messages call an image."""
        return f"{self._rows[number][0]} of {self.place}"

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes: `png`, and `cls` with the class of a digit."""
        return dict(self._rows[number][1])


def digits(split: str = "train", *, binary: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits: uint8 [N, 1, 8, 8] and their classes, int64 [N].

    Its 17 levels are spread over 0 to 255. They are the 1,797 digits of the test set of UCI's "Optical Recognition of Handwritten
    Digits" (Alpaydin & Kaynak 1998); `held-out` is the last 360 of them.

    Args:
        split: train or held-out.
        binary: white where a pixel has half of the ink or more, else black.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn, which is not installed; pip install 'latentae[quickstart]'"
        ) from error
    ink, classes = load_digits(return_X_y=True)
    level = np.where(ink >= 8, 255, 0) if binary else np.round(ink * (255 / 16))
    chosen = slice(None, -HELD_OUT_DIGITS) if split == "train" else slice(-HELD_OUT_DIGITS, None)
    images = torch.from_numpy(level[chosen].astype(np.uint8)).view(-1, 1, 8, 8)
    return images, torch.from_numpy(np.asarray(classes)[chosen].astype(np.int64))


def _digits(split: str, binary: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    images, classes = digits(split, binary=binary)
    for number, (image, digit) in enumerate(zip(images, classes.tolist(), strict=True)):
        yield f"{number:09}", {"png": encode_png(image), "cls": str(digit).encode()}


def _photos(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, tile in photo_tiles(TRAINING if split == "train" else HELD_OUT, TILE, TILE):
        yield key, {"png": encode_png(tile)}
