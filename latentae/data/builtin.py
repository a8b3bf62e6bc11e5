"""Images inside installed packages: photos of scikit-image and scikit-learn, and digits.

They need no download. The photos are split by source image and cut into overlapping tiles.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_png
from latentae.errors import DataError, MissingDependencyError
from latentae.files import atomic_file

__all__ = [
    "BUILTIN",
    "HELD_OUT",
    "HELD_OUT_DIGITS",
    "TRAINING",
    "BuiltinImages",
    "digits",
    "is_builtin",
    "photo_file",
    "photo_tiles",
    "write_photo_tiles",
]

BUILTIN = ("sklearn:digits", "sklearn:binary-digits", "skimage:photos")
HELD_OUT_DIGITS = 360
"""The last fifth of the 1,797 digits.

They are ordered by writer, so most are by other writers than the rest.
"""
# The held-out photos are in color and of different subjects, none of which is in training. Both
# motorcycle photos, a stereo pair, are in training.
HELD_OUT = ("chelsea.png", "china.jpg", "coffee.png")
TRAINING = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "coins.png", "flower.jpg", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("motorcycle_right.png", "retina.jpg", "rocket.jpg"),
)
TILE = 128
LARGEST = 512  # short side of a photo in pixels, so that no photo dominates the tiles


def is_builtin(images: str) -> bool:
    """Whether this looks like built-in images: `sklearn:...` or `skimage:...`."""
    return str(images).startswith(("sklearn:", "skimage:"))


class BuiltinImages:
    """The images of a built-in set, to pack into shards; all are in memory (15 MB at most).

    Args:
        spec: `sklearn:digits` (8 x 8, gray, labels in `.cls`), `sklearn:binary-digits` (the same in
            black and white) or `skimage:photos` (color tiles of 128 pixels), each optionally with
            `:held-out` for the other split.

    Raises:
        DataError: no such set or split.
        MissingDependencyError: the package that contains it is not installed.
    """

    def __init__(self, spec: str) -> None:
        package, _, rest = spec.partition(":")
        name, _, split = rest.partition(":")
        name, split = f"{package}:{name}", split or "train"
        if name not in BUILTIN or split not in ("train", "held-out"):
            raise DataError(
                f"{spec} is no built-in set; expected {', '.join(BUILTIN)}, or one with :held-out"
            )
        self.location = f"{name}:{split}"
        rows = _photos(split) if name == "skimage:photos" else _digits(split, name == "sklearn:binary-digits")
        self._rows = [(f"{split}/{key}", members) for key, members in rows]
        self.sizes = [len(members["png"]) for _, members in self._rows]
        digest = hashlib.blake2b(digest_size=16)
        for key, members in self._rows:
            digest.update(key.encode() + b"".join(members.values()))
        self.listing = digest.hexdigest()

    def key(self, number: int) -> str:
        """The split, then the digit's number, or the photo and the tile's offsets."""
        return self._rows[number][0]

    def name(self, number: int) -> str:
        """The name of an image in messages."""
        return f"{self._rows[number][0]} of {self.location}"

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes: `png`, and `cls` with the class of a digit."""
        return dict(self._rows[number][1])


def digits(split: str = "train", *, binary: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits: uint8 [N, 1, 8, 8] and their classes, int64 [N].

    Their 17 levels are scaled to 0 to 255. They are the 1,797 digits of the test set of UCI's
    "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998). `held-out` is the last 360
    of them.

    Args:
        split: train or held-out.
        binary: white where a pixel has at least half of the ink, else black.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("the digits come", "scikit-learn") from error
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


def _missing(what: str, package: str) -> MissingDependencyError:
    advice = "which is not installed; pip install 'latentae[quickstart]'"
    return MissingDependencyError(f"{what} with {package}, {advice}")


def photo_file(name: str) -> Path:
    """The file of a photo in its package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    ours = ("sklearn", "datasets/images") if name in ("china.jpg", "flower.jpg") else ("skimage", "data")
    spec = importlib.util.find_spec(ours[0])
    if spec is None or spec.origin is None:
        raise _missing(f"the photo {name} comes", ours[0])
    return Path(spec.origin).parent / ours[1] / name


def photo_tiles(names: Sequence[str], size: int, stride: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Square tiles of the named photos: `PHOTO/ROW-COLUMN` and uint8 [C, size, size].

    Args:
        names: photos, from `TRAINING` or `HELD_OUT`.
        size: side of a tile in pixels.
        stride: pixels between tiles; below `size` they overlap. The last tile of a side ends at the
            photo's edge.
    """
    for name in names:
        file = photo_file(name)
        image = decode_image(file.read_bytes(), name)
        if min(image.shape[1:]) > LARGEST:
            image = resize(image, [LARGEST], antialias=True)
        high, wide = image.shape[1] - size, image.shape[2] - size
        for top in (*range(0, high, stride), high):
            for left in (*range(0, wide, stride), wide):
                yield f"{file.stem}/{top:04}-{left:04}", image[:, top : top + size, left : left + size]


def write_photo_tiles(folder: str | Path, names: Sequence[str], size: int, stride: int) -> int:
    """Write the tiles of `photo_tiles` as `folder/PHOTO/ROW-COLUMN.png`; returns their number."""
    count = 0
    for key, tile in photo_tiles(names, size, stride):
        with atomic_file(Path(folder) / f"{key}.png") as temporary:
            temporary.write_bytes(encode_png(tile))
        count += 1
    return count
