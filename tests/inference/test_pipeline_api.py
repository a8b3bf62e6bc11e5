"""`latentae.pipeline`: inputs, outputs, and independence of sizes, batches and tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentae
from latentae.data import pixels as pixels_module
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.inference import pipeline as module
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}


def build(**overrides) -> AutoencoderKL:
    values = {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        **BLOCKS,
    }
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderKLConfig(**{**values, **overrides}))
    with torch.no_grad():
        model.decoder.conv_out.weight.div_(5)  # decodes to about [-1, 1], as a trained model does
    return model.eval()


def photo(height: int, width: int, channels: int = 3, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), dtype=dtype, endpoint=True)


def in_range(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, C] whole numbers -> [1, C, H, W] in [-1, 1], in fp64."""
    values = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    return 2 * values / np.iinfo(pixels.dtype).max - 1


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    return build()


@pytest.fixture
def pipe(model):
    return latentae.pipeline(model, device="cpu")


def close(found, expected, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


@torch.no_grad()
def test_both_directions_are_the_formula(model, pipe):
    """Against the plain model in fp64, NumPy's reflection and the config's two numbers."""
    image, exact = photo(13, 18), build().double()
    padded = np.pad(image, ((0, 3), (0, 2), (0, 0)), mode="reflect")
    raw = exact.encode(in_range(padded)).mode()
    latents = pipe.encode(image)
    close(latents[0], (raw[0] - 0.25) * 0.5)
    assert latents.sizes == ((13, 18),)
    [decoded] = pipe.decode(latents, output="tensor")
    close(decoded, exact.decode(raw)[0, :, :13, :18].clamp(-1, 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 40), (4, 4), (17, 16), (31, 29)])
def test_any_size_comes_back_in_its_size_in_every_output(pipe, height, width):
    latents = pipe.encode(photo(height, width))
    assert latents[0].shape == (4, -(-height // 4), -(-width // 4))
    [picture], [array], [tensor] = (pipe.decode(latents, output=kind) for kind in ("pil", "numpy", "tensor"))
    assert picture.size == (width, height)
    assert np.array_equal(np.asarray(picture), array)
    assert (array.dtype, array.shape) == (np.uint8, (height, width, 3))
    assert tensor.shape == (3, height, width)
    assert abs(in_range(array)[0] - tensor).max() <= 1.01 / 255


@pytest.fixture
def everything(tmp_path) -> dict[str, object]:
    """One picture in every form that is taken; all must give the same latent."""
    pixels = photo(12, 9)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(turned, exif=exif)
    wide = pixels.astype(np.uint16) * 257
    return {
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "pillow": picture,
        "pillow, not read yet": Image.open(tmp_path / "a.png"),
        "pillow, on its side": Image.open(turned),
        "file, on its side": turned,
        "array": pixels,
        "array, 16 bits": wide,
        "opaque": np.dstack([pixels, np.full((12, 9), 255, np.uint8)]),
        "tensor": tensor,
        "tensor, 16 bits": torch.from_numpy(wide).permute(2, 0, 1),
        "float": tensor.float() / 127.5 - 1,
        "double": tensor.double() / 127.5 - 1,
    }


def test_every_form_of_a_picture_gives_the_same_latent(pipe, everything):
    expected = pipe.encode(everything["array"])[0]
    assert expected.dtype == torch.float32
    for name, image in everything.items():
        assert torch.allclose(pipe.encode(image)[0], expected, rtol=0, atol=2e-5), name
    latents = pipe.encode(iter(everything.values()))
    assert len(latents) == len(everything)
    assert set(latents.sizes) == {(12, 9)}
    close(latents.batch(), expected.expand(len(everything), -1, -1, -1))


def test_an_opened_jpeg_is_read_from_memory_with_or_without_simplejpeg(pipe, tmp_path, monkeypatch):
    Image.fromarray(photo(16, 16)).save(tmp_path / "a.jpg")
    expected = pipe.encode(tmp_path / "a.jpg")[0]
    monkeypatch.setattr(pixels_module, "simplejpeg", object())  # any use of it is an error
    with Image.open(tmp_path / "a.jpg") as picture:
        assert torch.equal(pipe.encode(picture)[0], expected)


def test_batches_are_lists(pipe):
    pixels = np.stack([photo(8, 12, seed=seed) for seed in range(3)])
    expected = pipe.encode(list(pixels)).batch()
    assert expected.shape == (3, 4, 2, 3)
    close(pipe.encode(pixels).batch(), expected)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    close(pipe.encode(tensor).batch(), expected)
    close(pipe.encode(tensor.float() / 127.5 - 1).batch(), expected)
    assert len(pipe.encode([])) == len(pipe.decode([])) == 0


def test_order_and_results_do_not_depend_on_the_batches(model):
    images = [photo(8 + 4 * (number % 3), 10, seed=number) for number in range(7)]
    alone = [latentae.pipeline(model).encode(image)[0] for image in images]
    for batch_size in (1, 2, 8):
        pipe = latentae.pipeline(model, batch_size=batch_size)
        latents = pipe.encode(images)
        assert latents.sizes == tuple((image.shape[0], 10) for image in images)
        for found, expected in zip(latents, alone, strict=True):
            close(found, expected)
        shown = pipe.decode(latents, output="numpy")
        assert [image.shape for image in shown] == [image.shape for image in images]
    sampled = [
        latentae.pipeline(model, batch_size=size).encode(images, sample=True, seed=5) for size in (1, 8)
    ]
    for one, other in zip(*sampled, strict=True):
        close(one, other)


def test_no_pass_is_larger_than_it_says(model, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "LARGEST_PASS", 200)
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda x: seen.append(tuple(x.shape)) or plain(x))
    latentae.pipeline(model).encode([photo(8, 8)] * 5)
    assert seen == [(3, 3, 8, 8), (2, 3, 8, 8)]


@torch.no_grad()
def test_a_sample_has_the_posteriors_spread_and_its_own_seed(model, pipe):
    image = photo(64, 64)
    posterior = model.encode(in_range(image).float())
    draws = torch.stack([pipe.encode(image, sample=True, seed=seed)[0] for seed in range(40)])
    noise = (
        (draws / 0.5 + 0.25) - posterior.mean
    ) / posterior.std  # back to standard normal, 40 * 1024 values
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert torch.equal(draws[3], pipe.encode(image, sample=True, seed=3)[0])
    two = pipe.encode([image, image], sample=True)
    assert not torch.equal(two[0], two[1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_converted_as_files_are(channels, tmp_path):
    """Gray, gray with alpha, RGB and RGBA, 8 and 16 bits: arrays and files give the same latent."""
    pipe = latentae.pipeline(build(in_channels=channels, out_channels=channels))
    gray, colour = photo(8, 8, 1)[..., 0], photo(8, 8, 4)
    pictures = {
        "L": Image.fromarray(gray),
        "LA": Image.fromarray(colour[..., :2]),
        "RGB": Image.fromarray(colour[..., :3]),
        "RGBA": Image.fromarray(colour),
        "1": Image.fromarray(gray > 99),
        "P": Image.fromarray(colour[..., :3]).quantize(7),
        "I;16": Image.fromarray(photo(8, 8, 1, np.uint16)[..., 0]),
    }
    for mode, picture in pictures.items():
        assert picture.mode == mode
        picture.save(tmp_path / "a.png")
        found = pipe.encode([tmp_path / "a.png", picture])
        close(found[0], found[1])
        if mode in ("L", "LA", "RGB", "RGBA", "I;16"):
            close(pipe.encode(np.asarray(picture))[0], found[0])
    [shown] = pipe.decode(found[:1] if isinstance(found, list) else found[0])
    assert shown.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_transparency_lies_over_white_or_is_kept():
    pixels = photo(8, 8, 4)
    alpha = pixels[..., 3:].astype(np.float64) / 255
    over_white = np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    three = latentae.pipeline(build())
    close(three.encode(pixels)[0], three.encode(over_white)[0])
    four = latentae.pipeline(build(in_channels=4, out_channels=4))
    assert not torch.allclose(
        four.encode(pixels)[0], four.encode(np.dstack([pixels[..., :3], np.full((8, 8), 255, np.uint8)]))[0]
    )


@torch.no_grad()
def test_sixteen_bits_go_in_and_come_out(model, pipe, tmp_path):
    deep = photo(8, 8, 1, np.uint16)
    Image.fromarray(deep[..., 0]).save(tmp_path / "deep.png")
    expected = model.encode(in_range(deep).float().expand(-1, 3, -1, -1)).mode()
    for image in (deep, tmp_path / "deep.png"):
        close(pipe.encode(image)[0], (expected[0] - 0.25) * 0.5)
    [image], [exact] = (pipe.decode(pipe.encode(deep), output=kind) for kind in ("numpy16", "tensor"))
    assert image.dtype == np.uint16
    assert abs(in_range(image)[0] - exact).max() <= 1.01 / 65535
    assert len(np.unique(image % 257)) > 20  # more than 8 bits widened


def test_latents_of_a_diffusion_model_are_cropped_where_sizes_are_given(pipe):
    latents = pipe.encode([photo(9, 10), photo(12, 11, seed=1)])
    made = latents.batch() * 1.0
    expected = pipe.decode(latents, output="numpy")
    assert [image.shape for image in pipe.decode(made, output="numpy")] == [(12, 12, 3)] * 2
    for given in (made, list(made), made.half()):
        found = pipe.decode(given, sizes=latents.sizes, output="numpy")
        assert [image.shape for image in found] == [(9, 10, 3), (12, 11, 3)]
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 1
    assert len(pipe.decode(made[0])) == 1
    for sizes, match in [
        ([(9, 10)], "found 1 sizes for 2 latents"),
        ([(13, 10), (12, 11)], "an image of 13 x 10 pixels has no latent of 3 x 3"),
        ([(9, 10), (8, 11)], "an image of 8 x 11 pixels"),
    ]:
        with pytest.raises(ImageError, match=match):
            pipe.decode(made, sizes=sizes)


@torch.no_grad()
def test_mean_and_std_by_channel_are_heeded_as_in_sdxl():
    mean, std = (0.5, -0.25, 0.0, 1.0), (2.0, 0.5, 1.0, 4.0)
    model = build(latents_mean=mean, latents_std=std)
    pipe = latentae.pipeline(model)
    image = photo(8, 8)
    raw = model.encode(in_range(image).float()).mode()[0]
    by_channel = [torch.tensor(values).view(4, 1, 1) for values in (mean, std)]
    latents = pipe.encode(image)
    close(latents[0], (raw - by_channel[0]) * 0.5 / by_channel[1])
    close(pipe.decode(latents, output="tensor")[0], model.decode(raw[None])[0].clamp(-1, 1))
    close(
        latentae.pipeline(build(latents_mean=mean)).encode(image)[0], (raw - 0.25) * 0.5
    )  # one alone is not used, as there
    for wrong in ({"latents_std": (1.0, 0.0, 1.0, 1.0)}, {"latents_std": (1.0, 1.0)}):
        with pytest.raises(ModelError, match="latents_std"):
            latentae.pipeline(build(**{"latents_mean": mean, "latents_std": std, **wrong}))


def test_half_precision_is_close_and_its_latents_are_fp32(model, pipe):
    image = photo(16, 16)
    expected = pipe.encode(image)
    half = latentae.pipeline(build(), dtype="bf16")
    latents = half.encode(image)
    assert latents[0].dtype == torch.float32
    assert 0 < (latents[0] - expected[0]).abs().max() < 0.05
    [found], [exact] = half.decode(expected, output="tensor"), pipe.decode(expected, output="tensor")
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1


@pytest.mark.parametrize(("tiling", "tolerance"), [("exact", 1e-5), ("blended", 0.3)])
def test_tiles_give_the_same_picture(model, pipe, tiling, tolerance):
    pytest.importorskip("latentae.models.tiling").Tiled  # noqa: B018
    image = np.clip(
        128 + 100 * np.sin(np.indices((40, 52)).sum(0) / 9)[..., None] * [1, 0.5, -1], 0, 255
    ).astype(np.uint8)
    tiled = latentae.pipeline(model, tiling=tiling)
    latents = tiled.encode(image)
    assert latents.sizes == ((40, 52),)
    close(latents[0], pipe.encode(image)[0], tolerance)
    close(tiled.decode(latents, output="tensor")[0], pipe.decode(latents, output="tensor")[0], tolerance)


def test_auto_tiles_what_is_too_large(model, monkeypatch):
    used = []

    class Recorder:
        def __init__(self, model, mode):
            used.append(mode)
            self.encode, self.decode = model.encode, model.decode

    monkeypatch.setattr(module, "LARGEST_PASS", 64)
    monkeypatch.setattr(pytest.importorskip("latentae.models.tiling"), "Tiled", Recorder)
    for tiling, expected in (
        ("none", []),
        ("auto", ["blended"]),
        ("blended", ["blended"]),
        ("exact", ["exact"]),
    ):
        used.clear()
        pipe = latentae.pipeline(model, tiling=tiling)
        pipe.decode(pipe.encode(photo(8, 9)))
        assert used == expected
    pipe = latentae.pipeline(model, tiling="auto")
    used.clear()
    pipe.decode(pipe.encode(photo(8, 8)))
    assert used == []


def test_what_is_no_image_is_named(pipe, tmp_path):
    good = photo(8, 8)
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(photo(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for image, match in [
        (tmp_path / "gone.png", r"could not read .*gone\.png"),
        (tmp_path / "text.png", r"text\.png is not an image"),
        (good.astype(np.float32) / 255, "number 1 is float32.*give floats as a tensor"),
        (good[0, 0], r"number 1 is uint8 \[3\]"),
        (np.zeros((8, 8, 7), np.uint8), "number 1 has 7 channels, the model 3"),
        (np.zeros((0, 8, 3), np.uint8), "number 1 is empty"),
        (torch.zeros(1, 8, 8), r"number 1 is float \[1, 8, 8\]"),
        (torch.full((3, 8, 8), 255.0), r"values from 255 to 255, expected floats in \[-1, 1\]"),
        (torch.full((3, 8, 8), torch.nan), "values from nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "number 1 is torch.int64"),
        (7, "number 1 is a int"),
    ]:
        with pytest.raises(ImageError, match=match):
            pipe.encode([good, image])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(ImageError, match="number 1 is damaged"):
        pipe.encode([good, cut])
    with pytest.raises(ImageError, match="found a int"):
        pipe.encode(7)
    with pytest.raises(ImageError, match="found 4 x 2 x 2 and 4 x 3 x 2"):
        pipe.encode([good, photo(12, 8)]).batch()


def test_wrong_options_and_latents_are_named(model, pipe):
    for options, match in [
        ({"tiling": "some"}, "tiling is 'some'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is int8"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"device": "abacus"}, "abacus"),
    ]:
        with pytest.raises(RecipeError, match=match):
            latentae.pipeline(model, **options)
    with pytest.raises(ModelError, match="does not exist"):
        latentae.pipeline(Path("nowhere/at/all"))
    with pytest.raises(RecipeError, match="output is 'jpeg'"):
        pipe.decode(torch.zeros(1, 4, 2, 2), output="jpeg")
    for latent in (torch.zeros(1, 3, 2, 2), torch.zeros(4, 2), torch.zeros(4, 0, 2)):
        with pytest.raises(ModelError, match=r"expected \[4, h, w\]"):
            pipe.decode(latent)
    with pytest.raises(ModelError, match="image number 1 has NaN"):
        pipe.decode(torch.stack([torch.zeros(4, 2, 2), torch.full((4, 2, 2), torch.inf)]))


def test_a_result_that_overflows_says_what_to_do():
    model = build()
    with torch.no_grad():
        model.encoder.conv_in.weight.mul_(1e6)
    image = photo(8, 8)
    assert latentae.pipeline(model).encode(image)[0].isfinite().all()
    with pytest.raises(
        ModelError, match=r"latent number 0 has NaN or infinite values in torch\.float16; use dtype='fp32'"
    ):
        latentae.pipeline(model, dtype="fp16").encode(image)


def test_a_model_of_two_channels_takes_arrays_and_tensors_but_no_files():
    pipe = latentae.pipeline(build(in_channels=2, out_channels=2))
    with pytest.raises(ImageError, match="files have 1, 3 or 4 channels, the model 2"):
        pipe.encode("a.png")
    with pytest.raises(RecipeError, match="2 channels, but Pillow needs"):
        pipe.decode(torch.zeros(1, 4, 2, 2))
    pixels = photo(8, 8, 2)
    latents = pipe.encode([pixels, in_range(pixels)[0]])
    close(latents[0], latents[1])
    assert pipe.decode(latents, output="numpy")[0].shape == (8, 8, 2)


def test_another_architecture_works_and_has_no_tiles(tmp_path, monkeypatch):
    from latentae.models.config import LinearAutoencoderConfig
    from latentae.models.linear import LinearAutoencoder

    LinearAutoencoder(
        LinearAutoencoderConfig(patch=4, latent_channels=6, scaling_factor=0.5)
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(module, "LARGEST_PASS", 64)  # an AutoencoderKL would be tiled
    pipe = latentae.pipeline(tmp_path)
    latents = pipe.encode(photo(10, 11))
    assert latents[0].shape == (6, 3, 3)
    assert pipe.decode(latents)[0].size == (11, 10)
    with pytest.raises(RecipeError, match="LinearAutoencoder has no tiles"):
        latentae.pipeline(tmp_path, tiling="exact")


def test_latents_show_themselves(pipe):
    latents = pipe.encode([photo(9, 10)] * 6)
    assert str(latents) == f"Latents(6: {', '.join(['4 x 3 x 3 of 9 x 10 pixels'] * 4)}, and 2 more)"
    assert torch.equal(latents.to("cpu").batch(), latents.batch())


def test_the_three_lines_of_the_docs_run(model, tmp_path, monkeypatch):
    """Every Python block of docs/pipeline.md, in order, in one program."""
    model.save_pretrained(tmp_path / "vae")
    for name in ("cat.jpg", "dog.png"):
        Image.fromarray(photo(24, 21)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
    assert torch.equal(
        latentae.pipeline("vae").encode(photo(8, 8))[0], latentae.pipeline(model).encode(photo(8, 8))[0]
    )
    names: dict[str, object] = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert (tmp_path / "back.png").is_file()
    assert [image.size for image in names["images"]] == [(21, 24), (21, 24)]
