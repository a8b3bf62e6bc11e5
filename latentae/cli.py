"""The command line: parses, calls the function of the same name, prints errors as one line."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from latentae.cli_latents import decode, encode, stats, verify
from latentae.cli_options import Device, MaxPixels, Model, Shards, Weights
from latentae.cli_tasks import anomaly, denoise, features, interpolate, sample
from latentae.data.headers import MAX_PIXELS
from latentae.errors import LatentAEError, RecipeError, ShardError

__all__ = ["app", "main"]

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="latentae",
    help="Train, measure and ship the latent space of a generative model. MODEL is a run folder, a checkpoint or an exported folder.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


class RecipeCommand(TyperCommand):
    """A command that also takes every option of a recipe; its help lists them."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Add the recipe's options, which are known only to the recipe tree."""
        from latentae.training.recipe import recipe_options, shipped_recipes

        with formatter.section("Shipped recipes"):
            formatter.write_text(", ".join(shipped_recipes()))
        with formatter.section("Options of a recipe (also keys of its TOML file)"):
            rows = [
                (f"--{name.replace('_', '-')}", _explain(field)) for name, field in recipe_options().items()
            ]
            formatter.write_dl(rows)


def _explain(field: Any) -> str:
    default = "unset" if field.default is None else field.default
    return f"{field.description} [{default}]"


_RECIPE: Any = {
    "cls": RecipeCommand,
    "context_settings": {
        "ignore_unknown_options": True,
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
}
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE [--OPTION VALUE]...", help="A shipped name or a .toml path, then options."
    ),
]


def _split(words: list[str], expected: str = "RECIPE") -> tuple[list[str], dict[str, str]]:
    """The words that are `expected`, and `--option value` or `--option=value`, in any order."""
    given, overrides, rest = [], {}, iter(words)
    for word in rest:
        if not word.startswith("--"):
            given.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(rest, "")
            if not value or value.startswith("--"):
                raise RecipeError(f"option --{name} needs a value")
        overrides[name.replace("-", "_")] = value
    if len(given) != len(expected.split()):
        raise RecipeError(
            f"expected {expected.replace('RECIPE', 'one RECIPE')}, got {' '.join(given) or 'none'}"
        )
    return given, overrides


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(help="Minutes of training; the speed is measured first.")] = 6.0,
    images: Annotated[int | None, typer.Option(help="Images to train on, instead of minutes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """The whole line on photos that ship with the dependencies, from shards to a component in diffusers, with a report."""
    import latentae

    latentae.quickstart(out, minutes=minutes, images=images, seed=seed)


@app.command()
def shards(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of images, searched with its subfolders; a Hugging Face dataset: its folder, or hf://NAME:SPLIT; "
            "or images that installed packages hold: sklearn:digits, sklearn:binary-digits or skimage:photos, or with :held-out."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    shard_size: Annotated[
        int | None,
        typer.Option(
            help="At most so many samples in a shard; when not given, 16 to 1000, for eight shards or more."
        ),
    ] = None,
    max_shard_mb: Annotated[float, typer.Option(help="At most so many MB in a shard.")] = 1000.0,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Shrink to so many pixels on the short side; files are copied as they are without it."
        ),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Shrunk images become JPEGs of this quality, 1 to 100; PNGs without.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unreadable images out and list them, rather than stop.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Images read at the same time; one for each core when not given.")
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Pack images into WebDataset shards; the same command goes on where it stopped."""
    import latentae

    latentae.shards(
        images,
        out,
        shard_size=shard_size,
        max_shard_mb=max_shard_mb,
        resize=resize,
        quality=quality,
        skip_bad=skip_bad,
        workers=workers,
        max_pixels=max_pixels,
    )


@app.command()
def index(
    shards: Shards,
    out: Annotated[
        Path | None, typer.Argument(help="Folder for the indexes; beside each shard when not given.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Shards read at the same time; one for each core when not given.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read shards that have an index too, and compare their SHA-256.")
    ] = False,
) -> None:
    """Index shards for training: where each sample lies, image sizes, SHA-256; list what is damaged, and fail if anything is."""
    import latentae

    summary = latentae.index(shards, out, workers=workers, verify=verify)
    if summary.damaged:
        raise ShardError(
            f"damage found: {summary}; see the lines above{f' and {out}/damaged.jsonl' if out else ''}"
        )


@app.command(**_RECIPE)
def train(
    words: Words,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run folder.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto (go on where this run stopped), never, or a run or checkpoint to go on from."
        ),
    ] = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Weights to begin with: a run, checkpoint, diffusers folder, safetensors or LDM file."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Take a few real steps, print speed, memory and total time, and write nothing."
        ),
    ] = False,
) -> None:
    """Train an autoencoder; the same command goes on where it stopped."""
    import latentae

    (recipe,), overrides = _split(words)
    options: dict[str, Any] = dict(overrides)
    latentae.train(recipe, output, resume=resume, init_from=init_from, dry_run=dry_run, **options)


@app.command(**_RECIPE)
def init(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE SHARDS OUT [--OPTION VALUE]...",
            help="A recipe, training shards (or images), a folder to make.",
        ),
    ],
) -> None:
    """Write an AutoencoderDC that starts at PCA of the images: a model folder, before any training."""
    import latentae

    (recipe, shards, out), overrides = _split(words, "RECIPE SHARDS OUT")
    options: dict[str, Any] = dict(overrides)
    latentae.init(recipe, shards, out, **options)


@app.command(**_RECIPE)
def config(words: Words) -> None:
    """Print a recipe with every option resolved, as TOML, headed by what each phase amounts to."""
    from latentae.training.config import config as resolved

    (recipe,), overrides = _split(words)
    typer.echo(resolved(recipe, **overrides), nl=False)


@app.command()
def evaluate(
    model: Model,
    shards: Shards,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MODEL", help="Another model to measure on the same images; give it again for more."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json, per_image.csv and report.html; a table without it."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the model's own when not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="At most so many images, spread evenly over the shards.")
    ] = None,
    perceptual: Annotated[
        str, typer.Option(help="auto, vgg, alex, squeeze, efficientnet-lite0 or none.")
    ] = "auto",
    frechet: Annotated[
        str,
        typer.Option(help="Features for the Frechet distance: auto, inception, none, or a backbone of timm."),
    ] = "auto",
    details: Annotated[
        bool,
        typer.Option(
            help="Look closer at a few images: disturbed latents, half precision, rate and distortion."
        ),
    ] = True,
    diffusability: Annotated[
        bool,
        typer.Option(
            "--diffusability", help="Also interpolate latents and train tiny flows on them; takes minutes."
        ),
    ] = False,
    pca_shards: Annotated[
        str | None,
        typer.Option(help="Images to fit the PCA and DCT baselines on; the run's own when not given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap, of noise and of what is trained.")] = 0,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Measure reconstructions, the latent space and baselines on held-out shards, with a report that opens offline."""
    import latentae

    latentae.evaluate(
        model,
        shards,
        compare=compare,
        out=out,
        resolution=resolution,
        batch_size=batch_size,
        limit=limit,
        perceptual=perceptual,
        frechet=frechet,
        details=details,
        diffusability=diffusability,
        pca_shards=pca_shards,
        seed=seed,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, or output folders of evaluate.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Put runs side by side: what differs in their recipes, their curves, and their metrics."""
    import latentae

    latentae.compare(runs, out)


@app.command()
def reconstruct(
    model: Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
    resolution: Annotated[
        int | None, typer.Option(help="Resize the short side to it and crop; each image's own size without.")
    ] = None,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Show images beside their reconstructions."""
    import latentae

    latentae.reconstruct(
        model, images, out=out, resolution=resolution, weights=weights, device=device, max_pixels=max_pixels
    )


for _verb in (encode, verify, stats, decode, features, anomaly, denoise, interpolate, sample):
    app.command()(_verb)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    format: Annotated[
        str, typer.Option(help="diffusers, ldm (one file under LDM's names), onnx, pt2 (AOTInductor) or all.")
    ] = "diffusers",
    fold_normalization: Annotated[
        bool,
        typer.Option(
            "--fold-normalization", help="Normalise latents inside the weights: scaling 1, shift 0."
        ),
    ] = False,
    variant: Annotated[
        str | None, typer.Option(help="Also write half-precision weights: fp16 or bf16.")
    ] = None,
    scaling_factor: Annotated[
        float | None, typer.Option(help="Latent scaling; measured or the config's when not given.")
    ] = None,
    shift_factor: Annotated[
        float | None, typer.Option(help="Latent shift; measured or the config's when not given.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Output folder of encode or evaluate, for measured factors.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="Output folder of evaluate, for the model card.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS", help="Measure on them: quality, latents, previews, fp16 and bf16, tiling."
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Measure on at most so many images of the data.")] = 256,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            help="Image side in pixels to measure at; give it again for more. The model's own without."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time when measuring.")] = 8,
    perceptual: Annotated[
        str, typer.Option(help="auto, vgg, alex, squeeze, efficientnet-lite0 or none.")
    ] = "auto",
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the folder to this repository on the Hugging Face Hub."
        ),
    ] = None,
    weights: Weights = "ema",
    device: Device = "auto",
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Write a model, with a model card, as a component that diffusers, ONNX Runtime, torch or LDM's readers load."""
    import latentae

    latentae.export(
        model,
        out,
        format=format,
        fold_normalization=fold_normalization,
        variant=variant,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        statistics=statistics,
        metrics=metrics,
        data=data,
        images=images,
        resolution=resolution,
        batch_size=batch_size,
        perceptual=perceptual,
        push_to_hub=push_to_hub,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
    )


@app.command()
def order(
    shards: Shards,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    epoch: Annotated[int, typer.Option(help="Which epoch, from 0.")] = 0,
    global_batch: Annotated[int, typer.Option(help="Samples of a step over all ranks.")] = 16,
    world_size: Annotated[int, typer.Option(help="Number of ranks.")] = 1,
    rank: Annotated[int, typer.Option(help="Whose share to list, from 0.")] = 0,
    workers: Annotated[int, typer.Option(help="Data workers of the rank; they do not change the order.")] = 0,
    start: Annotated[int, typer.Option(help="First step, absolute within the epoch.")] = 0,
    limit: Annotated[int | None, typer.Option(help="At most so many steps.")] = None,
    pad: Annotated[bool, typer.Option("--pad", help="Fill the last batch from the next epoch.")] = False,
    held_out: Annotated[
        float, typer.Option(help="Fraction left out of training by key; 0.02 is what training leaves out.")
    ] = 0.0,
    index: Annotated[
        str | None, typer.Option(help="Folder of the shards' indexes, if they are elsewhere.")
    ] = None,
) -> None:
    """List which sample is in which step of an epoch: `step<TAB>key`, one line a sample; nothing is decoded."""
    import latentae

    listing = latentae.order(
        shards,
        seed=seed,
        epoch=epoch,
        global_batch=global_batch,
        world_size=world_size,
        rank=rank,
        workers=workers,
        start=start,
        limit=limit,
        pad=pad,
        held_out=held_out,
        index=index,
    )
    try:
        for step, key in listing:
            print(f"{step}\t{key}")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    typer.echo(
        f"epoch {epoch} has {listing.steps} steps; {listing.tail} samples of its tail are left out", err=True
    )


def _version(value: bool) -> None:
    if value:
        from latentae.version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _open_streams() -> None:
    """Give a process that was started without standard streams (`2>&-`) ones to nowhere, and let any text through those that it has.

    An unused descriptor 0, 1 or 2 would go to the first file that is opened, and C libraries would write their messages into it.
    """
    for descriptor, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # keys may have letters that an ASCII terminal or UTF-8 does not have


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, an error's own code, 2 for wrong usage, 130 for Ctrl-C."""
    _open_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except LatentAEError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's and click's own usage errors
            _fail(f"{error.format_message()} (see latentae --help)", 2)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(error, OSError) and not debug:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
        raise
    if code == INTERRUPTED:  # some versions of typer turn Ctrl-C into this code themselves
        _fail("interrupted; the same command goes on from what is finished", INTERRUPTED)
    _exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK")
    who = f"latentae (rank {rank})" if rank not in (None, "0") else "latentae"
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process; one of several without taking the interpreter apart.

    Gloo's threads outlive their process group and may still let go of a tensor of the last exchange. If the interpreter is being
    taken apart at that moment, the process aborts although all its work is done (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
