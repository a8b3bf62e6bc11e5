"""The forward pass of all autoencoders: encode, sample, transform the latent, decode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from latentae.errors import ImageError, ModelError
from latentae.models.pretrained import load_model, save_model

__all__ = ["Autoencoder", "AutoencoderOutput", "DiagonalGaussian", "Part"]

Part = Literal["all", "decoder", "decoder-head", "encoder", "latent"]

_NO_LAST_LAYER = "a {} has no last layer to weigh losses at; set adaptive = false"


class DiagonalGaussian:
    """A normal distribution with a diagonal covariance for each latent element.

    Args:
        moments: [B, 2z, h, w], mean and log-variance stacked over channels. Half precision is
            widened to fp32 and the log-variance is clamped to [-30, 20], as in LDM.
    """

    SMALLEST_LOGVAR = -30.0
    """A standard deviation of 3e-7: a sample equals the mean."""

    def __init__(self, moments: Tensor) -> None:
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(self.SMALLEST_LOGVAR, 20.0)

    @classmethod
    def of_mean(cls, mean: Tensor) -> DiagonalGaussian:
        """The posterior of a deterministic encoder: `mean` [B, z, h, w], smallest variance."""
        return cls(torch.cat([mean, torch.full_like(mean, cls.SMALLEST_LOGVAR)], dim=1))

    @property
    def std(self) -> Tensor:
        """Standard deviation, [B, z, h, w]."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (Kingma & Welling 2013, eq. 4), [B, z, h, w], noise drawn if None."""
        if noise is None:
            noise = torch.randn(
                self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
            )
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The most likely latent: the mean, [B, z, h, w]."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) of each image's latent, [B] (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class AutoencoderOutput:
    """The result of one forward pass."""

    reconstruction: Tensor
    """[B, C, H, W] in about [-1, 1]."""
    posterior: DiagonalGaussian
    latent: Tensor
    """[B, z, h, w], a sample of the posterior or its mean, with the encoder's graph."""
    decoded: Tensor
    """[B, z, h, w], the decoder's input."""
    leaf: Tensor | None = None
    """With `cut_latent`: the end of the decoder's graph, where its backward pass leaves a gradient.
    `latent.backward(leaf.grad)` continues through the encoder. None if nothing before the latent is
    trained."""
    decoder_features: Tensor | None = None
    """With `keep_features`: the detached input of the decoder's last normalization."""
    encoder_features: Tensor | None = None
    """With `keep_features`: the detached input of the encoder's last normalization."""
    also: Tensor | None = None
    """The decoder's output for `also_decode(latent)`."""


class Autoencoder(nn.Module, ABC):
    """An encoder, a Gaussian bottleneck and a decoder.

    Images are float in [-1, 1], [B, C, H, W], with H and W multiples of `config.downsampling`.
    Latents are unscaled: the pipeline that uses them scales them.

    Attributes:
        config: the shape.
        gradient_checkpointing: whether training stores only the input of each block and recomputes
            the rest. Outputs and gradients stay the same. Models without blocks ignore it.
    """

    branches: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The residual branches."""
    config: Any
    encoder: Any
    decoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images [B, C, H, W] in [-1, 1] -> posterior over latents [B, z, H/f, W/f].

        Raises:
            ImageError: wrong number of channels, or a side that f does not divide.
        """
        self.check_image(x)
        return self._encode(x, False)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, z, h, w] -> images [B, C, f*h, f*w], about [-1, 1] (not clamped).

        Raises:
            ModelError: wrong number of latent channels.
        """
        self.check_latent(z)
        return self._decode(z, False)[0]

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        sample_posterior: bool = True,
        *,
        latent_transform: Callable[[Tensor], Tensor] | None = None,
        also_decode: Callable[[Tensor], Tensor] | None = None,
        cut_latent: bool = False,
        keep_features: bool = False,
    ) -> AutoencoderOutput:
        """Encode, sample (or take the mean) and decode.

        Args:
            x: images [B, C, H, W] in [-1, 1].
            noise: standard normal [B, z, H/f, W/f] for the sample; torch's generator draws it by
                default.
            sample_posterior: whether to sample or take the mean.
            latent_transform: [B, z, h, w] -> [B, z, h', w'], applied to the latent before it is
                decoded (noise, a mask, a rotation).
            also_decode: [B, z, h, w] -> [B, z, h', w'], a second input of the decoder in the same
                pass.
            cut_latent: end the decoder's graph at a leaf, so that the gradient at the latent can be
                read and changed.
            keep_features: also return the inputs of the last normalizations.
        """
        self.check_image(x)
        posterior, encoder_features = self._encode(x, keep_features)
        latent = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        leaf = latent.detach().requires_grad_() if cut_latent and latent.requires_grad else None
        given = latent if leaf is None else leaf
        decoded = (given if latent_transform is None else latent_transform(given)).to(x.dtype)
        self.check_latent(decoded)
        reconstruction, decoder_features = self._decode(decoded, keep_features)
        also = None if also_decode is None else self.decode(also_decode(given).to(x.dtype))
        return AutoencoderOutput(
            reconstruction, posterior, latent, decoded, leaf, decoder_features, encoder_features, also
        )

    def compile_coders(self, **options: Any) -> None:
        """`torch.compile` encoder and decoder separately; state-dict keys stay the same.

        One graph for both could not be differentiated in two parts, as `cut_latent` needs.
        `torch.compile` has no second derivatives (R1 on the reconstruction, Jacobian penalties).

        Args:
            **options: of `torch.compile`.
        """
        self.encoder.compile(**options)
        self.decoder.compile(**options)

    def select_trainable(self, part: Part) -> None:
        """Set `requires_grad` so that only a part of the model is trained.

        A reconstruction gives every parameter of it a gradient.

        Args:
            part: "all"; "decoder" (with the 1x1 convolution before it) or "decoder-head" (its
                finest level and the layers after it), which leave the latent unchanged; "encoder"
                (with the 1x1 convolution after it); or "latent", the coarsest level and the middle
                of both, which DC-AE adapts to a higher resolution (Chen et al. 2024, "decoupled
                high-resolution adaptation"). In an AutoencoderDC only levels with blocks count.

        Raises:
            ModelError: an unknown part, or one that this architecture does not have.
        """
        if part not in get_args(Part):
            raise ModelError(f"unknown part {part!r} to train; the parts are {', '.join(get_args(Part))}")
        parts = {"all": [self], **self._parts()}
        if part not in parts:
            raise ModelError(f"a {type(self).__name__} has no part {part!r}; train 'all'")
        self.requires_grad_(False)
        for module in parts[part]:
            if module is not None:
                module.requires_grad_(True)

    def _parts(self) -> dict[str, Sequence[nn.Module | None]]:
        """The modules of each part that can be trained alone."""
        return {}

    def trunk_names(self) -> set[str]:
        """Names of the parameters outside residual branches."""
        branches = (name for name, module in self.named_modules() if isinstance(module, self.branches))
        prefixes = tuple(f"{name}." for name in branches)
        return {name for name, _ in self.named_parameters() if not name.startswith(prefixes)}

    def decoder_weight_gradient(self, features: Tensor, gradient: Tensor) -> Tensor:
        """d sum(gradient * reconstruction) / d weight of the decoder's last convolution.

        Adaptive weights compare losses by the norm of their gradients at the last layer of the
        decoder (Esser et al. 2021, "Taming Transformers", eq. 7) or of the encoder (Yao & Wang
        2025, "Reconstruction vs. Generation", "adaptive weighting"). Other code retains the graph
        for one backward pass per loss. The weight gradient of a convolution needs only its input
        and the gradient at its output, so no backward pass is needed here.

        Args:
            features: `AutoencoderOutput.decoder_features`, of the same weights.
            gradient: [B, C, H, W]. Several stacked over channels, [B, n C, H, W], share the work
                and give [n C, ...].

        Returns:
            [C, C_in, 3, 3] in at least fp32; [4 C, C_in, 3, 3] if a pixel shuffle follows the last
            convolution.

        Raises:
            ModelError: a model without such a layer.
        """
        raise ModelError(_NO_LAST_LAYER.format(type(self).__name__))

    def encoder_weight_gradient(self, features: Tensor, noise: Tensor | None, gradient: Tensor) -> Tensor:
        """d sum(gradient * latent) / d weight of the encoder's last convolution.

        The layers from it to the sample run again, which costs little at the latent's resolution.

        Args:
            features: `AutoencoderOutput.encoder_features`, of the same weights.
            noise: the posterior sample's noise, [B, z, h, w]; None if the mean was decoded.
            gradient: [B, z, h, w].

        Returns:
            [2z, C_in, 3, 3] in at least fp32, the weight of mean and log-variance; [z, C_in, 3, 3],
            that of the mean, for an AutoencoderDC.

        Raises:
            ModelError: a model without such a layer.
        """
        raise ModelError(_NO_LAST_LAYER.format(type(self).__name__))

    def check_image(self, x: Tensor) -> None:
        """Check the shape of images.

        Raises:
            ImageError: wrong number of channels, or a side that f does not divide.
        """
        f, channels = self.config.downsampling, self.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ImageError(f"images have shape {tuple(x.shape)}, expected [B, {channels}, H, W]")
        height, width = x.shape[2:]
        if height % f or width % f or not height or not width:
            raise ImageError(
                f"image is {height} x {width}, expected sides that are multiples of {f}; crop, pad or "
                "resize it"
            )

    def check_latent(self, z: Tensor) -> None:
        """Check the shape of latents.

        Raises:
            ModelError: wrong number of channels.
        """
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ModelError(f"latent has shape {tuple(z.shape)}, expected [B, {channels}, h, w]")

    def _run(self, coder: nn.Module, x: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        """The output of a coder, and with `keep_features` the input of its last normalization.

        Without extras a coder is called with one tensor, so that users can replace or hook it.
        """
        if not keep_features and not self.gradient_checkpointing:
            return coder(x), None
        out = coder(x, keep_features=keep_features, checkpointing=self.gradient_checkpointing)
        return out if keep_features else (out, None)

    @abstractmethod
    def _encode(self, x: Tensor, keep_features: bool) -> tuple[DiagonalGaussian, Tensor | None]:
        """The posterior of checked images, and the encoder's features if `keep_features`."""

    @abstractmethod
    def _decode(self, z: Tensor, keep_features: bool) -> tuple[Tensor, Tensor | None]:
        """The images of checked latents, and the decoder's features if `keep_features`."""

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema") -> Self:
        """Load a diffusers folder, a run, a checkpoint, a Hub repository, or a file of weights.

        Args:
            path: folder, file or `owner/name`.
            weights: "ema" or "raw"; only runs and checkpoints have both.

        Raises:
            ModelError: none of these, weights that do not fit the config, or a model of another
                class.
        """
        model = load_model(path, weights)[0]
        if not isinstance(model, cls):
            raise ModelError(f"{path} is a {type(model).__name__}, not a {cls.__name__}; load it as one")
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' `config.json` and `diffusion_pytorch_model.safetensors`."""
        save_model(self, folder, dtype)
