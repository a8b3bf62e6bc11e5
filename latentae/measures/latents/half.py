"""Audit of half precision: largest activations, and how fp16 and bf16 change the output.

The largest fp16 number is 65504. A model whose activations get near it produces infinities and then
NaN on some image sooner or later. Pipelines run such a model in fp32 if its config says
`force_upcast`.
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
from torch.utils._pytree import tree_leaves, tree_map

from latentae.errors import DataError, ModelError, first_line
from latentae.models.base import Autoencoder, DiagonalGaussian
from latentae.models.config import AutoencoderConfig

__all__ = ["DECODER", "ENCODER", "HalfAudit", "HalfRun", "audit_half", "trace_coders"]

FP16_MAX = 65504.0
MARGIN = 4.0  # for larger activations on other images
PSNR_NEEDED = 20 * math.log10(255)  # dB: fp16 changes an image by at most one of 255 levels, root mean square
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CPU_SIDE, CPU_PIXELS = (
    256,
    2**16,
)  # run in half precision on a CPU, where it can take six times as long as fp32
ENCODER, DECODER = "encoder", "decoder"
SMALLEST = 2  # latent pixels per side; size 1 would give attention's tokens other symbolic strides
MOST = 32  # images per batch of a traced model; diffusers' upsampling differs from 64 on
POSTERIOR_OPERATORS = (
    torch.ops.aten.to.dtype,
    torch.ops.aten.chunk.default,
    operator.getitem,
    torch.ops.aten.clamp.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.cat.default,
)
LOGIT_ROWS = 1024  # queries per block of attention logits


@dataclass(frozen=True)
class HalfRun:
    """Difference between the model in half precision (weights and activations) and in fp32.

    Attributes:
        finite: whether everything was finite.
        latent_max_abs: largest difference of the encoder's mean, in units of the raw latent; None
            if not finite.
        image_max_abs: largest difference of images decoded from the same latent, range [-1, 1];
            None if not finite.
        image_psnr: of the decoded images against those of fp32, over all images, in dB with peak 2;
            infinite if equal, None if not finite.
    """

    finite: bool
    latent_max_abs: float | None
    image_max_abs: float | None
    image_psnr: float | None

    def __str__(self) -> str:
        if not self.finite or self.image_psnr is None:
            return "not finite"
        psnr = f"{self.image_psnr:.1f} dB" if math.isfinite(self.image_psnr) else "no difference"
        return (
            f"decoded images {psnr} PSNR, at most {self.image_max_abs:.2g} off; "
            f"latents at most {self.latent_max_abs:.2g} off"
        )


@dataclass(frozen=True)
class HalfAudit:
    """Result of `audit_half`.

    Attributes:
        images: number of images whose activations were measured.
        half_images: number of images that were also run in half precision.
        encoder, decoder: largest absolute activation by stage; infinite if fp32 was not finite.
        runs: by "fp16" and "bf16".
    """

    images: int
    half_images: int
    encoder: Mapping[str, float]
    decoder: Mapping[str, float]
    runs: Mapping[str, HalfRun]

    @property
    def largest(self) -> tuple[str, str, float]:
        """Coder, stage and value of the largest activation."""
        coders = ((ENCODER, self.encoder), (DECODER, self.decoder))
        return max(
            ((coder, *item) for coder, maxima in coders for item in maxima.items()), key=lambda item: item[2]
        )

    @property
    def obstacle(self) -> str | None:
        """Why the model should not run in fp16; None if it can."""
        coder, stage, value = self.largest
        if value * MARGIN > FP16_MAX:
            limit = f"fp16 ends at {FP16_MAX:.0f} and {MARGIN:g} times less is asked for"
            return f"activations reach {value:.4g} in {stage} of the {coder}; {limit}"
        run = self.runs["fp16"]
        if not run.finite or run.image_psnr is None:
            return "the output in fp16 is not finite"
        if run.image_psnr < PSNR_NEEDED:
            found = f"images in fp16 differ by {run.image_psnr:.1f} dB PSNR from those in fp32"
            return f"{found}; {PSNR_NEEDED:.1f} is asked for"
        return None

    @property
    def force_upcast(self) -> bool:
        """Value for a diffusers config: whether pipelines must run this model in fp32."""
        return self.obstacle is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; null for a number that is not finite."""
        coder, stage, value = self.largest
        values = {
            "images": self.images,
            "half_images": self.half_images,
            "force_upcast": self.force_upcast,
            "obstacle": self.obstacle,
            "fp16_max": FP16_MAX,
            "margin": MARGIN,
            "largest": {"coder": coder, "stage": stage, "activation": value},
            "activation_maxima": {ENCODER: dict(self.encoder), DECODER: dict(self.decoder)},
            "runs": {name: asdict(run) for name, run in self.runs.items()},
        }
        return tree_map(lambda value: _finite(value) if isinstance(value, float) else value, values)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of a model card."""
        rows = [
            ("Images whose activations were measured", str(self.images)),
            ("Images run in half precision", str(self.half_images)),
        ]
        for name, maxima in ((ENCODER, self.encoder), (DECODER, self.decoder)):
            stage = max(maxima, key=maxima.__getitem__)
            rows.append((f"Largest activation, {name}", f"{maxima[stage]:.4g} ({stage})"))
        rows += [(f"{name} against fp32", str(run)) for name, run in self.runs.items()]
        return [*rows, ("fp16", "safe" if self.obstacle is None else f"not safe: {self.obstacle}")]


@torch.no_grad()
def audit_half(model: Autoencoder, batches: Iterable[Tensor]) -> HalfAudit:
    """Measure activations in fp32, and compare the model in fp16 and bf16 with fp32.

    Maxima are over all intermediate results of the model as plain operators, including attention
    logits. Fused steps, which hide some of them, are not used here. The decoder gets samples of the
    posterior, the same each time.

    The half-precision runs are those of `model.to(dtype)` on its device, with the kernels of that
    device. A GPU runs all images. A CPU runs the center of the first images, at most CPU_SIDE
    pixels a side, until it has run CPU_PIXELS pixels.

    Args:
        model: in any dtype, on any device; copied, not changed.
        batches: images [B, C, H, W] in [-1, 1], with sides that are multiples of f.

    Raises:
        DataError: no images.
        ImageError: images of the wrong shape.
        ModelError: `torch.export` can't trace the model.
    """
    device = next(model.parameters()).device
    exact = copy.deepcopy(model).float().eval()
    watched = {name: _Watch(program, name, exact) for name, program in _programs(exact).items()}
    comparisons = {name: _Comparison(model, dtype) for name, dtype in HALVES.items()}
    images = half_images = half_pixels = 0
    for batch in batches:
        if not len(batch):
            continue
        x = batch.to(device, torch.float32)
        latent = _sample(exact.encode(x), images)
        for name, inputs in ((ENCODER, x), (DECODER, latent)):
            for part in inputs.split(MOST):
                watched[name].run(part)
        part = _half_part(x, model.config.downsampling, half_pixels)
        if len(part):
            posterior = exact.encode(part)
            latent = _sample(posterior, images)
            decoded = exact.decode(latent)
            for comparison in comparisons.values():
                comparison.add(part, posterior.mean, latent, decoded)
        images += len(x)
        half_images += len(part)
        half_pixels += part[:, 0].numel()
    if not images:
        raise DataError("a half-precision audit has no images; give some")
    runs = {name: comparison.result() for name, comparison in comparisons.items()}
    return HalfAudit(images, half_images, watched[ENCODER].result(), watched[DECODER].result(), runs)


def _sample(posterior: DiagonalGaussian, seed: int) -> Tensor:
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
    return posterior.sample(noise=noise.to(posterior.mean.device))


def _half_part(x: Tensor, f: int, done: int) -> Tensor:
    """The part of a batch to run in half precision after `done` pixels; `f` divides its sides."""
    if x.device.type != "cpu":
        return x
    height, width = (min(side, max(CPU_SIDE // f, 1) * f) for side in x.shape[2:])
    top, left = ((whole - part) // 2 for whole, part in zip(x.shape[2:], (height, width), strict=True))
    left_over = max(CPU_PIXELS - done, 0)
    return x[: -(-left_over // (height * width)), :, top : top + height, left : left + width]


class _Coder(nn.Module):
    """A method of a model as a module, which `torch.export` needs."""

    def __init__(self, model: Autoencoder, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Images -> mean and log-variance, [B, z, h, w]; or latents -> images."""
        if self.name == DECODER:
            return self.model.decode(x)
        posterior = self.model.encode(x)
        return posterior.mean, posterior.logvar


def trace_coders(
    config: AutoencoderConfig, coders: Mapping[str, nn.Module], most_images: int | None = None
) -> dict[str, ExportedProgram]:
    """Trace encoder and decoder, as modules of one input, with dynamic batch, height and width.

    The batch is 1 to `most_images`. Image sides are multiples of f, latents have SMALLEST pixels or
    more per side.
    """
    device = next(coders[ENCODER].parameters()).device
    batch = Dim("batch_size", min=1, max=most_images)
    height, width = Dim("latent_height", min=SMALLEST), Dim("latent_width", min=SMALLEST)
    programs = {}
    for name, channels, f in (
        (ENCODER, config.in_channels, config.downsampling),
        (DECODER, config.latent_channels, 1),
    ):
        # torch.export takes a size of 1 for a constant, and equal sizes for one number
        example = torch.zeros(2, channels, 3 * f, 4 * f, device=device)
        shapes = {0: batch, 2: f * height, 3: f * width}
        with torch.no_grad():
            programs[name] = torch.export.export(coders[name], (example,), dynamic_shapes=(shapes,))
    return programs


def _programs(model: Autoencoder) -> dict[str, ExportedProgram]:
    try:
        return trace_coders(model.config, {name: _Coder(model, name) for name in (ENCODER, DECODER)}, MOST)
    except Exception as error:  # many types, one for each thing that can't be traced
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"torch.export can't trace this {type(model).__name__} ({reason}), so its activations can't "
            "be measured"
        ) from error


class _Watch(fx.Interpreter):
    """Runs an exported coder by operator and records the largest magnitude in each stage."""

    def __init__(self, program: ExportedProgram, coder: str, model: Autoencoder) -> None:
        super().__init__(
            program.module(check_guards=False)
        )  # guards concern speed: strides of one-pixel maps
        nodes = [n for n in self.module.graph.nodes if n.op == "call_function"]  # pyright: ignore  # a GraphModule
        self.coder, self.maxima = coder, dict[str, Tensor]()
        self.stages = dict(zip(nodes, _stages(nodes, coder, model), strict=True))

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator and record its result."""
        out = super().run_node(n)
        if n.op == "call_function":
            for value in tree_leaves(out):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._note(n, value)
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key = (self.env[argument] for argument in n.args[:2])  # pyright: ignore[reportArgumentType]
            for rows in query.split(LOGIT_ROWS, dim=-2):
                self._note(n, rows @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]))
        return out

    def result(self) -> dict[str, float]:
        """Stage -> largest magnitude, in the order of execution."""
        values = {stage: value.item() for stage, value in self.maxima.items()} or {self.coder: 0.0}
        return {stage: math.inf if math.isnan(value) else value for stage, value in values.items()}

    def _note(self, n: fx.Node, value: Tensor) -> None:
        stage, largest = self.stages[n], value.abs().amax()
        if stage is not None:
            self.maxima[stage] = torch.maximum(self.maxima.get(stage, largest), largest)


def _stages(nodes: Sequence[fx.Node], coder: str, model: Autoencoder) -> list[str | None]:
    """The stage of each operator: conv_in, down_blocks.0 ..., mid_block, conv_out, quant_conv.

    An operator of the coder itself belongs to the stage before it. After the last stage it belongs
    to conv_out, if there is one. An operator outside all modules belongs to the coder, or to no
    stage (None) if it only passes the moments on.
    """
    names = (f".{name}" for name, _ in model.named_modules())
    last = "conv_out" if any(name.endswith(f".{coder}.conv_out") for name in names) else coder
    found: list[str | None] = []
    stacks = [list(n.meta.get("nn_module_stack", {}).values()) for n in nodes]
    paths = [stack[-1][0].split(".") if stack else [] for stack in stacks]
    inside = [path[path.index(coder) + 1 :] if coder in path else None for path in paths]
    ends = max((number for number, parts in enumerate(inside) if parts), default=-1)
    for number, (n, path, parts) in enumerate(zip(nodes, paths, inside, strict=True)):
        if parts:
            found.append(".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0])
        elif parts is not None:
            before = next((stage for stage in reversed(found) if stage), coder)
            found.append(last if number > ends else before)
        else:
            own = next((part for part in path if part not in ("", "model", "module")), None)
            found.append(own or (None if n.target in POSTERIOR_OPERATORS else coder))
    return found


class _Comparison:
    """Differences between the model in half precision and in fp32, over batches."""

    def __init__(self, model: Autoencoder, dtype: torch.dtype) -> None:
        self.model, self.dtype = copy.deepcopy(model).to(dtype).eval(), dtype
        self.latent = self.image = self.squares = 0.0
        self.count = 0

    def add(self, x: Tensor, mean: Tensor, latent: Tensor, decoded: Tensor) -> None:
        """Compare on images, given fp32's mean, a latent and the image decoded from it."""
        posterior = self.model.encode(x.to(self.dtype))
        difference = (posterior.mean - mean).abs().amax()
        latent_error = torch.where(posterior.logvar.isnan().any(), torch.nan, difference)
        image_error = self.model.decode(latent.to(self.dtype)).float() - decoded
        squares = image_error.square().mean()  # a sum of many squares would lose digits in fp32
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
    """The larger value; NaN if either is NaN."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
