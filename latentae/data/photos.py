"""Photos that come inside the wheels of scikit-image and scikit-learn, split by source image, cut into overlapping tiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torchvision.transforms.v2.functional import resize

from latentae.data.decode import decode_image
from latentae.data.shrinking import encode_png
from latentae.errors import MissingDependencyError
from latentae.files import atomic_file

__all__ = ["HELD_OUT", "TRAINING", "photo_file", "photo_tiles", "write_photo_tiles"]

# The held-out photos are all colour, of different subjects; nothing of them is in training. The two motorcycle photos are a
# stereo pair, so both are on the same side.
HELD_OUT = ("chelsea.png", "china.jpg", "coffee.png")
TRAINING = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "coins.png",
    "flower.jpg",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
LARGEST = 512
_HOMES = {"china.jpg": ("sklearn", "datasets/images"), "flower.jpg": ("sklearn", "datasets/images")}


def photo_file(name: str) -> Path:
    """Where a photo lies inside its package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    package, folder = _HOMES.get(name, ("skimage", "data"))
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"the photo {name} comes with {package}, which is not installed; pip install 'latentae[quickstart]'"
        )
    return Path(spec.origin).parent / folder / name


def _reduced(image: Tensor) -> Tensor:
    """A photo with its short side at most `LARGEST` pixels, so that no photo gives most of the tiles."""
    short = min(image.shape[1:])
    return image if short <= LARGEST else resize(image, [LARGEST], antialias=True)


def _starts(length: int, size: int, stride: int) -> Iterator[int]:
    """Tile positions along a side, the last one flush with the end."""
    yield from range(0, length - size, stride)
    yield length - size


def photo_tiles(names: Sequence[str], size: int, stride: int) -> Iterator[tuple[str, Tensor]]:
    """Square tiles of the named photos: `PHOTO/ROW-COLUMN` and uint8 [C, size, size].

    Args:
        names: photos, from `TRAINING` or `HELD_OUT`.
        size: side of a tile in pixels.
        stride: pixels between tiles; below `size` they overlap.
    """
    for name in names:
        file = photo_file(name)
        image = _reduced(decode_image(file.read_bytes(), name))
        for top in _starts(image.shape[1], size, stride):
            for left in _starts(image.shape[2], size, stride):
                yield f"{file.stem}/{top:04}-{left:04}", image[:, top : top + size, left : left + size]


def write_photo_tiles(folder: str | Path, names: Sequence[str], size: int, stride: int) -> int:
    """Write what `photo_tiles` gives as `folder/PHOTO/ROW-COLUMN.png`; returns how many."""
    count = 0
    for key, tile in photo_tiles(names, size, stride):
        with atomic_file(Path(folder) / f"{key}.png") as temporary:
            temporary.write_bytes(encode_png(tile))
        count += 1
    return count
