"""Real diffusers pipelines, with tiny random networks, run from a saved folder with our exported
component.

What a pipeline's last latent should look like is computed by `latentae.pipeline` from the model, by
our own formula.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import latentae
from latentae import AutoencoderKL, export
from latentae.files import read_json, write_json
from latentae.inference.pipeline import Normalization
from latentae.models.config import AutoencoderKLConfig
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),  # SDXL itself calls it
    pytest.mark.filterwarnings(
        "ignore:`torch_dtype` is deprecated:FutureWarning"
    ),  # older diffusers know no other name
]

KINDS = ("sd", "sdxl", "sd3", "flux", "dit")
SHIFTED = ("sd3", "flux")  # the other pipelines never read shift_factor
MEAN, STD = (0.5, -0.25, 0.75, -1.0), (1.0, 1.5, 0.5, 2.0)
SIDE = 64
TOLERANCE = 1e-4
Z, WIDTH = 4, 16


@pytest.fixture(scope="module")
def diffusers(diffusers) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers' own imports warn of is not ours
        for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"):
            assert getattr(diffusers, f"{name}Pipeline")
            assert getattr(diffusers, f"{name}Img2ImgPipeline")
        assert diffusers.DiTPipeline
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@pytest.fixture(scope="module")
def work(save_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and what was measured of it: `even-0` and `even-0.3` (one mean and one std),
    `channels` (each its own).
    """
    root = tmp_path_factory.mktemp("pipelines")
    save_model(root / "model", preset("kl-f8", norm_num_groups=4, block_out_channels=(8, 8, 16, 16)))
    for name, mean, std in (
        ("even-0", (0.0,) * 4, (1.6,) * 4),
        ("even-0.3", (0.3,) * 4, (1.6,) * 4),
        ("channels", MEAN, STD),
    ):
        values = {"model": resolve_model(root / "model").fingerprint, "samples": 500}
        values |= {
            "latents_mean": mean,
            "latents_std": std,
            "scaling_factor": 1 / 1.6,
            "shift_factor": mean[0],
        }
        write_json(root / f"{name}.json", values)
    return root


@pytest.fixture(scope="module")
def component(work: Path):
    """An exported folder: `component("even-0", fold_normalization=True)`, created once."""

    def make(statistics: str, **options: Any) -> Path:
        out = work / "-".join([statistics, *(f"{key}={value}" for key, value in options.items())]) / "vae"
        export(work / "model", out, statistics=work / f"{statistics}.json", **options)
        return out

    return make


def clip(folder: Path) -> tuple[Any, Any]:
    """A text encoder, and a tokenizer that knows letters only, created without a download."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    end = len(words) - 1
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=len(words),
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        max_position_embeddings=12,
        **sizes,
    )
    return CLIPTextModel(config), tokenizer


def unet(diffusers: ModuleType, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(8, WIDTH), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, **options,
    )  # fmt: skip


def assemble(diffusers: ModuleType, kind: str, vae: Any, folder: Path) -> Any:
    """A pipeline of small random networks; where text is optional, its encoders are left out."""
    torch.manual_seed(1)
    scheduler, flow = (
        diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        diffusers.FlowMatchEulerDiscreteScheduler,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if kind == "sd":
        encoder, tokenizer = clip(folder)
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(vae, encoder, tokenizer, unet(diffusers), scheduler, **rest)
    if kind == "sdxl":
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        net = unet(diffusers, projection_class_embeddings_input_dim=6 * 8 + WIDTH, **extra)
        return diffusers.StableDiffusionXLPipeline(vae, unet=net, scheduler=scheduler, **none)
    if kind == "sd3":
        net = diffusers.SD3Transformer2DModel(
            sample_size=SIDE // 8, patch_size=1, in_channels=Z, out_channels=Z, num_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH,
        )  # fmt: skip
        third = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        return diffusers.StableDiffusion3Pipeline(vae=vae, transformer=net, scheduler=flow(), **none, **third)
    if kind == "flux":
        net = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4 * Z, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        return diffusers.FluxPipeline(vae=vae, transformer=net, scheduler=flow(), **none)
    net = diffusers.DiTTransformer2DModel(
        sample_size=SIDE // 8, patch_size=2, in_channels=Z, out_channels=2 * Z, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, num_embeds_ada_norm=1000, norm_num_groups=2,
    )  # fmt: skip
    return diffusers.DiTPipeline(net, vae, scheduler)


@pytest.fixture(scope="module")
def folder(diffusers, work, component):
    """A saved pipeline folder of a class, its `vae` our unchanged export."""

    def make(kind: str, statistics: str = "even-0", **options: Any) -> Path:
        vae = diffusers.AutoencoderKL.from_pretrained(component("even-0"))
        out = work / "-".join(
            ["pipeline", kind, statistics, *(f"{key}={value}" for key, value in options.items())]
        )
        if not out.exists():
            pipe = assemble(diffusers, kind, vae, work / "tokenizer")
            pipe.save_pretrained(out, variant=options.get("variant"))
            for file in (out / "vae").iterdir():
                file.unlink()
            export(work / "model", out / "vae", statistics=work / f"{statistics}.json", **options)
        return out

    return make


def load(diffusers: ModuleType, folder: Path, **options: Any) -> Any:
    left_out = [
        name for name, value in read_json(folder / "model_index.json").items() if value == [None, None]
    ]
    options |= dict.fromkeys(left_out)  # SD3 and Flux need them by name
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(pipe: Any, kind: str, images: int = 1) -> dict[str, Any]:
    """Arguments of a pipeline: a prompt, one already embedded, or a class."""
    if kind == "dit":
        return {"class_labels": [7] * images}
    if kind == "sd":
        return {"prompt": ["a cab"] * images}
    generator = torch.Generator().manual_seed(5)
    dtype = pipe.dtype if kind == "sdxl" else torch.float32
    given = torch.randn(1, 6, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return {
        name: value.repeat_interleave(images, 0).to(dtype) for name, value in zip(names, given, strict=True)
    }


def run(pipe: Any, kind: str, images: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1], and the last latents [B, z, h, w] that the diffusion model
    made.
    """
    steps, step = [], pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    size = (
        {}
        if kind == "dit" or ("image" in options and kind in ("sd", "sdxl"))
        else {"height": SIDE, "width": SIDE}
    )
    pipe.scheduler.step = recorded
    try:
        generator = torch.Generator().manual_seed(3)
        common = {
            "num_inference_steps": 2,
            "generator": generator,
            "output_type": "pt",
            "guidance_scale": 1.0,
        }
        shown = pipe(**{**words(pipe, kind, images), **size, **common, **options}).images
    finally:
        del pipe.scheduler.step
    last = steps[-1]
    if kind == "flux":
        last = pipe._unpack_latents(last, SIDE, SIDE, pipe.vae_scale_factor)
    assert shown.shape == (images, 3, SIDE, SIDE)
    assert shown.isfinite().all()
    assert shown.std() > 0.02  # a picture, not a plain
    return shown, last


def expected_images(work: Path, latents: Tensor, **config: Any) -> Tensor:
    """What our own model makes of a diffusion model's latents, normalised as a config says."""
    model = AutoencoderKL.from_pretrained(work / "model")
    pipe = latentae.pipeline(model, device="cpu")
    pipe.normalization = Normalization.of(AutoencoderKLConfig(**{**model.config.model_dump(), **config}))
    return torch.stack(pipe.decode(latents, output="tensor")) / 2 + 0.5


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_is_that_of_our_formula_plain_fused_and_folded(kind, work, diffusers, folder, component):
    """Folded with one mean and std as with scaling and shift; with those of each channel as our
    formula, though no pipeline has it.
    """
    shift = 0.3 if kind in SHIFTED else 0.0
    even = "even-0.3" if shift else "even-0"
    pipe = load(diffusers, folder(kind, even))
    assert type(pipe.vae) is diffusers.AutoencoderKL
    shown, latents = run(pipe, kind)
    close(shown, expected_images(work, latents, scaling_factor=1 / 1.6, shift_factor=shift))
    with latentae.fuse(pipe.vae) as fusion:
        assert not fusion.left
        close(run(pipe, kind)[0], shown)
    pipe.vae = diffusers.AutoencoderKL.from_pretrained(component(even, fold_normalization=True))
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (1.0, 0.0)
    with latentae.fuse(pipe.vae):
        folded, same_latents = run(pipe, kind)
    assert torch.equal(latents, same_latents)
    close(folded, shown)
    pipe.vae = diffusers.AutoencoderKL.from_pretrained(component("channels", fold_normalization=True))
    by_channel = expected_images(work, latents, scaling_factor=1.0, latents_mean=MEAN, latents_std=STD)
    assert (by_channel - shown).abs().max() > 0.02  # another image: the test can tell
    close(run(pipe, kind)[0], by_channel)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_folded_normalization_encodes_the_same_in_image_to_image(kind, diffusers, folder, component):
    even = "even-0.3" if kind in SHIFTED else "even-0"
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(load(diffusers, folder(kind, even)))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    shown, latents = run(pipe, kind, image=image, strength=0.5)
    pipe.vae = diffusers.AutoencoderKL.from_pretrained(component(even, fold_normalization=True))
    folded, folded_latents = run(pipe, kind, image=image, strength=0.5)
    close(folded_latents, latents)
    close(folded, shown)
    other, _ = run(pipe, kind, image=1 - image, strength=0.5)
    assert (other - shown).abs().max() > 0.01  # the image is heeded


def test_sdxl_reads_mean_and_std_by_channel_as_our_pipeline_does(work, diffusers, folder):
    pipe = load(diffusers, folder("sdxl"))
    pipe.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    shown, latents = run(pipe, "sdxl")
    close(shown, expected_images(work, latents, scaling_factor=1 / 1.6, latents_mean=MEAN, latents_std=STD))


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_tiling_and_slicing_with_and_without_fuse(kind, diffusers, folder):
    pipe = load(diffusers, folder(kind))
    whole, _ = run(pipe, kind, images=2)
    pipe.vae.enable_slicing()
    close(run(pipe, kind, images=2)[0], whole, 1e-5)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = (
        SIDE // 2,
        SIDE // 16,
    )  # so small an image would not be tiled
    tiled, _ = run(pipe, kind, images=2)
    assert 1e-3 < (tiled - whole).abs().mean() < 0.2  # tiles were taken, and show the same picture
    with latentae.fuse(pipe.vae):
        close(run(pipe, kind, images=2)[0], tiled)


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_fp16_variant_runs_in_half_precision(kind, fused, work, diffusers, folder):
    """SDXL decodes in fp32 as long as force_upcast is true; without it, and in SD, all of it is
    fp16.
    """
    pipe = load(diffusers, folder(kind, variant="fp16"), variant="fp16", torch_dtype=torch.float16)
    assert pipe.vae.dtype == torch.float16
    if fused:
        latentae.fuse(pipe.vae)
    for upcast in (True, False):
        pipe.vae.register_to_config(force_upcast=upcast)
        shown, latents = run(pipe, kind)
        assert pipe.vae.dtype == torch.float16
        exact = expected_images(work, latents.float(), scaling_factor=1 / 1.6)
        close(shown.float(), exact, 0.01)


def test_the_ldm_file_loads_through_from_single_file(work, component, diffusers, folder):
    out = component("even-0", format="ldm")
    [file] = out.glob("*.safetensors")
    vae = diffusers.AutoencoderKL.from_single_file(str(file), config=str(out), local_files_only=True)
    whole = diffusers.AutoencoderKL.from_pretrained(component("even-0"))
    assert vae.config.scaling_factor == whole.config.scaling_factor == 1 / 1.6
    for key, value in whole.state_dict().items():
        assert torch.equal(vae.state_dict()[key], value), key
    pipe = load(diffusers, folder("sd"))
    shown, _ = run(pipe, "sd")
    pipe.vae = vae
    close(run(pipe, "sd")[0], shown, 1e-6)


@pytest.mark.parametrize(
    ("way", "fused"),
    [
        ("model", "after"),
        ("sequential", "not"),
        ("sequential", "before"),
        ("sequential", "after"),
        ("group", "before"),
    ],
)
def test_offload_hooks_run(way, fused, diffusers, folder):
    """On a CPU, which replaces the accelerator, and weights come and go with the
    hooks.
    """
    accelerate = pytest.importorskip("accelerate")
    pipe, device = load(diffusers, folder("sd")), torch.device("cpu")
    shown, _ = run(pipe, "sd")
    if fused == "before":
        latentae.fuse(pipe.vae)
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "group":
        pipe.vae.enable_group_offload(device, offload_type="leaf_level")
    else:  # enable_sequential_cpu_offload, whose device cpu:0 is another one than cpu for accelerate
        for module in (pipe.text_encoder, pipe.unet, pipe.vae):
            accelerate.cpu_offload(module, device)
        assert {parameter.device.type for parameter in pipe.vae.parameters()} == {
            "meta"
        }  # not there but when they are used
    if fused == "after":
        latentae.fuse(pipe.vae)
    for _ in range(2):
        close(run(pipe, "sd")[0], shown)
