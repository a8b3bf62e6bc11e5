"""Draw pictures of the documentation: a photo at several latent sizes, the channels of a latent.

    python tools/pictures.py factors docs/images/factors.jpg
    python tools/pictures.py latent docs/images/latent.jpg --model quickstart/run

The photo is scikit-image's coffee; components are fitted on the quickstart's training photos.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import latentae
from latentae.data.builtin import TRAINING, photo_file, photo_tiles
from latentae.data.decode import decode_image
from latentae.data.transforms import resize_and_center_crop
from latentae.measures.metrics import psnr
from latentae.models.pca import fit_pca

SIDE = 320
SIZES = ((4, 8), (8, 16), (16, 32), (32, 32))
LABEL = 26  # pixels below a picture


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", choices=("factors", "latent"))
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--model", default="quickstart/run", help="model whose latent is drawn")
    options = parser.parse_args()
    picture = factors() if options.picture == "factors" else latent_channels(options.model)
    picture.save(options.out, quality=90)


def factors() -> Image.Image:
    """The photo and its PCA reconstructions at each f and z, with PSNR."""
    photo = the_photo()
    tiles = [(photo, "photo")]
    training = torch.stack([tile for _, tile in photo_tiles(TRAINING, 128, 32)])
    for f, z in SIZES:
        made = fit_pca(training, f, z).reconstruct(photo[None])[0]
        quality = float(psnr(made[None], photo[None]))
        tiles.append((made, f"f{f} z{z}, {z / f**2:.2f} per pixel: {quality:.1f} dB"))
    return row(tiles)


def latent_channels(model: str) -> Image.Image:
    """The photo and one gray image per latent channel, brightest at two standard deviations."""
    photo = the_photo()
    latent = latentae.pipeline(model).encode(photo[None])[0]
    normal = (latent - latent.mean((1, 2), keepdim=True)) / latent.std((1, 2), keepdim=True)
    gray = ((normal / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    across = len(gray) // 2
    side = SIDE // 2
    sheet = Image.new("RGB", (SIDE + across * side, SIDE), "white")
    sheet.paste(image(photo), (0, 0))
    for number, channel in enumerate(gray):
        tile = image(channel.expand(3, -1, -1)).resize((side - 4, side - 4), Image.Resampling.NEAREST)
        sheet.paste(tile, (SIDE + 4 + number % across * side, number // across * side + 2))
    return sheet


def the_photo() -> Tensor:
    """The center of a held-out photo as uint8 [3, SIDE, SIDE]."""
    file = photo_file("coffee.png")
    return resize_and_center_crop(decode_image(file.read_bytes(), file.name), SIDE)


def image(tensor: Tensor) -> Image.Image:
    """uint8 [3, H, W] as a Pillow image."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def row(tiles: list[tuple[Tensor, str]]) -> Image.Image:
    """Images next to each other, each above its label."""
    font = ImageFont.load_default(15)
    sheet = Image.new("RGB", (len(tiles) * (SIDE + 8) - 8, SIDE + LABEL), "white")
    for number, (tensor, label) in enumerate(tiles):
        left = number * (SIDE + 8)
        sheet.paste(image(tensor), (left, 0))
        ImageDraw.Draw(sheet).text((left, SIDE + 5), label, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
