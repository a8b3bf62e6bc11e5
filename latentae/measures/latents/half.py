"""Whether a model can run in half precision: how large its activations get, and what fp16 and bf16 make of its output.

fp16 ends at 65504. A model whose activations get near it gives infinities, then NaN, on some image sooner or later; pipelines run
such a model in fp32 where its config says `force_upcast`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from latentae.errors import DataError, ModelError
from latentae.models.base import Autoencoder
from latentae.models.posterior import DiagonalGaussian

__all__ = ["FP16_MAX", "MARGIN", "PSNR_NEEDED", "HalfAudit", "HalfRun", "audit_half"]

FP16_MAX = 65504.0
MARGIN = 4.0  # images that were not seen may drive an activation further than all that were
PSNR_NEEDED = 20 * math.log10(255)  # dB: fp16 changes an image by at most one of 255 levels, root mean square
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CPU_SIDE, CPU_PIXELS = 256, 2**16
"""Of what a CPU runs in half precision, which without its own instructions takes six times fp32's time."""
ENCODER, DECODER = "encoder", "decoder"
_SMALLEST = 2  # latent pixels a side that are traced; one would be taken for a constant
_MOST = (
    32  # images that a traced model is given at once; diffusers' upsampling does something else from 64 on
)
_HANDED_ON = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.chunk.default,
    operator.getitem,
    torch.ops.aten.clamp.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.cat.default,
)  # what a posterior is made of
_LOGIT_ROWS = 1024  # queries whose attention logits are looked at together


@dataclass(frozen=True)
class HalfRun:
    """How far the model, weights and activations in half precision, is from itself in fp32. None where it is not finite."""

    finite: bool
    latent_max_abs: float | None
    """Largest difference of the encoder's mean, in units of the raw latent."""
    image_max_abs: float | None
    """Largest difference of an image decoded from the same latent, range [-1, 1]."""
    image_psnr: float | None
    """Of the decoded images against those of fp32 over all images in dB, peak 2; infinite where they are equal."""


@dataclass(frozen=True)
class HalfAudit:
    """What `audit_half` found."""

    images: int
    half_images: int
    """How many of them were run in half precision too."""
    encoder: Mapping[str, float]
    """Stage -> largest absolute activation over all images; infinite where fp32 was not finite."""
    decoder: Mapping[str, float]
    runs: Mapping[str, HalfRun]
    """"fp16" and "bf16"."""

    @property
    def largest(self) -> tuple[str, str, float]:
        """Coder, stage and value of the largest activation."""
        found = [(ENCODER, *item) for item in self.encoder.items()] + [
            (DECODER, *item) for item in self.decoder.items()
        ]
        return max(found, key=lambda item: item[2])

    @property
    def obstacle(self) -> str | None:
        """Why the model should not run in fp16, in words; None if it can."""
        coder, stage, value = self.largest
        if value * MARGIN > FP16_MAX:
            limit = f"fp16 ends at {FP16_MAX:.0f} and {MARGIN:g} times less is asked for"
            return f"activations reach {value:.4g} in {stage} of the {coder}; {limit}"
        run = self.runs["fp16"]
        if not run.finite or run.image_psnr is None:
            return "the output in fp16 is not finite"
        if run.image_psnr < PSNR_NEEDED:
            return f"images in fp16 differ by {run.image_psnr:.1f} dB PSNR from those in fp32; {PSNR_NEEDED:.1f} is asked for"
        return None

    @property
    def force_upcast(self) -> bool:
        """What a diffusers config should say: whether pipelines must run this model in fp32."""
        return self.obstacle is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; null for what is not finite."""
        coder, stage, value = self.largest
        return {
            "images": self.images,
            "half_images": self.half_images,
            "force_upcast": self.force_upcast,
            "obstacle": self.obstacle,
            "fp16_max": FP16_MAX,
            "margin": MARGIN,
            "largest": {"coder": coder, "stage": stage, "activation": _finite(value)},
            "activation_maxima": {
                name: {stage: _finite(value) for stage, value in maxima.items()}
                for name, maxima in ((ENCODER, self.encoder), (DECODER, self.decoder))
            },
            "runs": {
                name: {
                    key: _finite(value) if isinstance(value, float) else value
                    for key, value in asdict(run).items()
                }
                for name, run in self.runs.items()
            },
        }

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of a card."""
        rows = [
            ("Images whose activations were measured", str(self.images)),
            ("Images run in half precision", str(self.half_images)),
        ]
        for name, maxima in ((ENCODER, self.encoder), (DECODER, self.decoder)):
            stage = max(maxima, key=lambda stage: maxima[stage])
            rows.append((f"Largest activation, {name}", f"{maxima[stage]:.4g} ({stage})"))
        rows += [(f"{name} against fp32", _in_words(run)) for name, run in self.runs.items()]
        return [*rows, ("fp16", "safe" if self.obstacle is None else f"not safe: {self.obstacle}")]


@torch.no_grad()
def audit_half(model: Autoencoder, batches: Iterable[Tensor]) -> HalfAudit:
    """Measure activations in fp32, and run the model in fp16 and bf16, over images.

    Maxima are of every intermediate result of the model as plain operators, attention logits included; the fused steps of a CPU or GPU,
    which keep some of them to themselves, are not used for it. The decoder is given samples of the posterior, the same each time.

    The half-precision runs are those of `model.to(dtype)` on its device, with whatever kernels that device uses. A GPU runs all images;
    a CPU the middle, at most CPU_SIDE pixels a side, of the first ones, until it has run CPU_PIXELS pixels.

    Args:
        model: in any dtype, on any device; it is copied, not changed.
        batches: images [B, C, H, W] in [-1, 1], of any sizes that f divides.

    Raises:
        DataError: no images.
        ImageError: images of the wrong shape.
        ModelError: a model that `torch.export` can't take apart.
    """
    device = next(model.parameters()).device
    exact = copy.deepcopy(model).float().eval()
    watched = {name: _Watch(program, name, exact) for name, program in _programs(exact, device).items()}
    comparisons = {name: _Comparison(model, dtype) for name, dtype in HALVES.items()}
    images = half_images = half_pixels = 0
    for batch in batches:
        if not len(batch):
            continue
        x = batch.to(device, torch.float32)
        latent = _sample(exact.encode(x), images)
        for name, inputs in ((ENCODER, x), (DECODER, latent)):
            for some in inputs.split(_MOST):
                watched[name].run(some)
        part = _half_part(x, model.config.downsampling, half_pixels)
        if len(part):
            posterior = exact.encode(part)
            latent = _sample(posterior, images)
            decoded = exact.decode(latent)
            for comparison in comparisons.values():
                comparison.add(part, posterior.mean, latent, decoded)
        images, half_images, half_pixels = (
            images + len(x),
            half_images + len(part),
            half_pixels + part[:, 0].numel(),
        )
    if not images:
        raise DataError("a half-precision audit has no images; give some")
    runs = {name: comparison.result() for name, comparison in comparisons.items()}
    return HalfAudit(images, half_images, watched[ENCODER].result(), watched[DECODER].result(), runs)


def _sample(posterior: DiagonalGaussian, seed: int) -> Tensor:
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
    return posterior.sample(noise=noise.to(posterior.mean.device))


def _half_part(x: Tensor, f: int, done: int) -> Tensor:
    """What of a batch is run in half precision after `done` pixels; sides stay multiples of `f`."""
    if x.device.type != "cpu":
        return x
    height, width = (min(side, max(CPU_SIDE // f, 1) * f) for side in x.shape[2:])
    top, left = ((whole - part) // 2 for whole, part in zip(x.shape[2:], (height, width), strict=True))
    left_over = max(CPU_PIXELS - done, 0)
    return x[: -(-left_over // (height * width)), :, top : top + height, left : left + width]


class _Encode(nn.Module):
    """The encoder as a module, which is what `torch.export` takes."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> mean and log-variance, [B, z, h, w]."""
        posterior = self.model.encode(sample)
        return posterior.mean, posterior.logvar


class _Decode(nn.Module):
    """The decoder as a module."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, C, f*h, f*w]."""
        return self.model.decode(latent_sample)


def _programs(model: Autoencoder, device: torch.device) -> dict[str, ExportedProgram]:
    """Encoder and decoder as plain operators, for any batch, height and width."""
    config = model.config
    z, channels, f = config.latent_channels, config.in_channels, config.downsampling
    # traced at sizes that are neither 1 nor equal: torch.export takes a 1 for a constant, and equal sides for one number
    images, latents = (
        torch.zeros(2, channels, 3 * f, 4 * f, device=device),
        torch.zeros(2, z, 3, 4, device=device),
    )
    batch, height, width = (
        Dim("batch", min=1, max=_MOST),
        Dim("height", min=_SMALLEST),
        Dim("width", min=_SMALLEST),
    )
    try:
        return {
            ENCODER: torch.export.export(
                _Encode(model), (images,), dynamic_shapes={"sample": {0: batch, 2: f * height, 3: f * width}}
            ),
            DECODER: torch.export.export(
                _Decode(model), (latents,), dynamic_shapes={"latent_sample": {0: batch, 2: height, 3: width}}
            ),
        }
    except (
        Exception
    ) as error:  # whatever a model does that can't be traced, each thing with an exception of its own
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(
            f"torch.export can't trace this {type(model).__name__} ({type(error).__name__}: {reason}), so its activations can't be measured"
        ) from error


class _Watch(fx.Interpreter):
    """Runs an exported coder operator by operator and remembers the largest magnitude in each stage."""

    def __init__(self, program: ExportedProgram, coder: str, model: Autoencoder) -> None:
        super().__init__(
            program.module(check_guards=False)
        )  # they are about speed: strides of one-pixel maps
        nodes = [n for n in self.module.graph.nodes if n.op == "call_function"]  # pyright: ignore  # a GraphModule
        self.coder, self.maxima = coder, dict[str, Tensor]()
        self.stages = dict(zip(nodes, _stages(nodes, coder, model), strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """One operator, and what it gave."""
        out = super().run_node(n)
        if n.op == "call_function":
            for value in tree_leaves(out):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._note(n, value)
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key = (self.env[argument] for argument in n.args[:2])  # pyright: ignore[reportArgumentType]
            for rows in query.split(_LOGIT_ROWS, dim=-2):
                self._note(n, rows @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]))
        return out

    def result(self) -> dict[str, float]:
        """Stage -> largest magnitude, in the order of execution."""
        values = {stage: value.item() for stage, value in self.maxima.items()}
        return {stage: math.inf if math.isnan(value) else value for stage, value in values.items()} or {
            self.coder: 0.0
        }

    def _note(self, n: fx.Node, value: Tensor) -> None:
        stage, largest = self.stages[n], value.abs().amax()
        if stage is not None:
            self.maxima[stage] = torch.maximum(self.maxima.get(stage, largest), largest)


def _stages(nodes: Sequence[fx.Node], coder: str, model: Autoencoder) -> list[str | None]:
    """The stage of each operator: conv_in, down_blocks.0 ..., mid_block, up_blocks.0 ..., conv_out, quant_conv.

    What a coder does itself belongs to the stage before, and after the last one to its last convolution (with the normalization before
    it), where it has one by that name; what is in no module, to the coder. None is what only hands the moments on.
    """
    last = (
        "conv_out"
        if any(f".{name}".endswith(f".{coder}.conv_out") for name, _ in model.named_modules())
        else coder
    )
    found: list[str | None] = []
    stacks = [list(n.meta.get("nn_module_stack", {}).values()) for n in nodes]
    paths = [stack[-1][0].split(".") if stack else [] for stack in stacks]
    inside = [path[path.index(coder) + 1 :] if coder in path else None for path in paths]
    ends = max((number for number, parts in enumerate(inside) if parts), default=-1)
    for number, (n, path, parts) in enumerate(zip(nodes, paths, inside, strict=True)):
        if parts:
            found.append(".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0])
        elif parts is not None:
            found.append(
                last if number > ends else next((stage for stage in reversed(found) if stage), coder)
            )
        else:
            own = next((part for part in path if part not in ("", "model", "module")), None)
            found.append(own or (None if n.target in _HANDED_ON else coder))
    return found


class _Comparison:
    """The model in half precision beside fp32, over batches."""

    def __init__(self, model: Autoencoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = copy.deepcopy(model).to(dtype).eval(), dtype
        self.latent = self.image = self.squares = 0.0
        self.count = 0

    def add(self, x: Tensor, mean: Tensor, latent: Tensor, decoded: Tensor) -> None:
        """Images, and what fp32 makes of them: the posterior's mean, a latent and what it decodes to."""
        posterior = self.model.encode(x.to(self.dtype))
        latent_error = torch.where(
            posterior.logvar.isnan().any(), torch.nan, (posterior.mean - mean).abs().amax()
        )
        image_error = self.model.decode(latent.to(self.dtype)).float() - decoded
        squares = image_error.square().mean()  # sums of many squares would lose digits in fp32
        self.latent = _larger(self.latent, latent_error.item())
        self.image = _larger(self.image, image_error.abs().amax().item())
        self.squares += squares.item() * image_error.numel()
        self.count += image_error.numel()

    def result(self) -> HalfRun:
        """The differences so far."""
        if not math.isfinite(self.latent + self.image):
            return HalfRun(False, _finite(self.latent), _finite(self.image), None)
        error = self.squares / self.count
        return HalfRun(True, self.latent, self.image, 10 * math.log10(4 / error) if error else math.inf)


def _larger(a: float, b: float) -> float:
    """The larger; NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _in_words(run: HalfRun) -> str:
    if not run.finite or run.image_psnr is None:
        return "not finite"
    psnr = f"{run.image_psnr:.1f} dB" if math.isfinite(run.image_psnr) else "no difference"
    return f"decoded images {psnr} PSNR, at most {run.image_max_abs:.2g} off; latents at most {run.latent_max_abs:.2g} off"
