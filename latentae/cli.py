"""The command line: every command is built from a verb's option table. Errors are printed as one line."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import click

from latentae.errors import LatentAEError, OutputError, RecipeError, ShardError
from latentae.options import help_of, is_positional, nearest, table_fields

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, the convention of shells

GROUPS = {
    "Data": ("latentae.data.options", ("shards", "index", "order")),
    "Train": ("latentae.training.options", ("train", "config", "init")),
    "Latents": ("latentae.encoding.options", ("encode", "verify", "stats", "decode")),
    "Measure": ("latentae.evaluation.options", ("evaluate", "compare", "reconstruct")),
    "Ship": ("latentae.exporting.options", ("export",)),
    "Use": ("latentae.tasks.options", ("features", "anomaly", "denoise", "interpolate", "sample")),
    "Try everything": ("latentae.examples.options", ("quickstart",)),
}
_HELP = {
    "max_content_width": 110,
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class Commands(click.Group):
    """All verbs, in groups; each is built when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the groups."""
        return [name for _, names in GROUPS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, from its table."""
        for module, names in GROUPS.values():
            if cmd_name in names:
                return _command(
                    cmd_name, getattr(importlib.import_module(module), f"{cmd_name.capitalize()}Options")
                )
        advice = nearest(cmd_name, self.list_commands(ctx), "see latentae --help")
        raise click.UsageError(f"no such command {cmd_name!r}; {advice}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per group, each line whole."""
        for group, (_, names) in GROUPS.items():
            with formatter.section(group):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl(
                    [(name, _first_sentence(command)) for name, command in commands if command]
                )


def _first_sentence(command: click.Command) -> str:
    return f"{(command.help or '').split('. ')[0].removesuffix('.')}."


class RecipeCommand(click.Command):
    """A command that also takes every option of a recipe; its help lists them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the recipes and their options."""
        from latentae.training.recipe import recipe_options, shipped_recipes

        with formatter.section("Shipped recipes"):
            formatter.write_text(", ".join(shipped_recipes()))
        with formatter.section("Options of a recipe (also keys of its TOML file)"):
            rows = recipe_options().items()
            formatter.write_dl(
                [(f"--{_dashed(name)}", f"{field.description}{_default(field)}") for name, field in rows]
            )


def _command(name: str, table: type[Any]) -> click.Command:
    fields = table_fields(table)
    own = {field: info for field, info in fields.items() if field != "overrides"}
    names = [field for field in own if is_positional(table, field)]
    options = [_option(field, info) for field, info in own.items() if field not in names]
    summary = (table.__doc__ or "").strip()
    if "overrides" in fields:
        arguments = click.Argument(
            ["words"],
            nargs=-1,
            type=click.UNPROCESSED,
            metavar=f"{' '.join(names).upper()} [--OPTION VALUE]...",
        )
        settings = {**_HELP, "ignore_unknown_options": True}
        call = _recipe_call(name, names)
        return RecipeCommand(name, settings, call, [arguments, *options], help=summary)
    arguments = [_argument(field, own[field]) for field in names]
    return click.Command(name, _HELP, _call(name), [*arguments, *options], help=summary)


def _argument(name: str, field: Any) -> click.Argument:
    many = help_of(field, "many")
    metavar = help_of(field, "metavar") or name.upper()
    return click.Argument([name], nargs=-1 if many else 1, required=field.is_required(), metavar=metavar)


def _option(name: str, field: Any) -> click.Option:
    """An option whose value stays text; the table checks it."""
    names = [
        f"--{word}" if len(word) > 1 else f"-{word}"
        for word in (help_of(field, "name") or _dashed(name)).split()
    ]
    if isinstance(field.default, bool):
        if field.default and "/" not in names[0]:
            names[0] += f"/--no-{names[0][2:]}"
        return click.Option([*names, name], is_flag=True, default=field.default, help=field.description)
    several = help_of(field, "many")
    return click.Option(
        [*names, name],
        type=click.UNPROCESSED,
        multiple=bool(several),
        metavar=help_of(field, "metavar") or _metavar(field.annotation),
        help=f"{field.description}{_default(field)}",
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _default(field: Any) -> str:
    return "" if field.default is None or field.default == () else f" [{field.default}]"


def _metavar(annotation: Any) -> str:
    """What stands for a value in the help: the choices, or the type."""
    choices = [
        choice
        for part in (annotation, *get_args(annotation))
        for choice in get_args(part)
        if isinstance(choice, str)
    ]
    if choices:
        return f"[{'|'.join(choices)}]"
    types = (annotation, *get_args(annotation))
    return next((word for kind, word in ((int, "N"), (float, "X"), (Path, "PATH")) if kind in types), "TEXT")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Options on the line; for the others the table has defaults."""
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _call(name: str) -> Callable[..., None]:
    def call(**values: Any) -> None:
        import latentae

        result = getattr(latentae, name)(**_given(values))
        if name in _PRINTERS:
            _PRINTERS[name](result, **values)

    return call


def _recipe_call(name: str, expected: list[str]) -> Callable[..., None]:
    def call(words: tuple[str, ...], **values: Any) -> None:
        import latentae

        given, overrides = _split(words, expected)
        result = getattr(latentae, name)(*given, **_given(values), **overrides)
        if name in _PRINTERS:
            _PRINTERS[name](result)

    return call


def _split(words: tuple[str, ...], expected: list[str]) -> tuple[list[str], dict[str, str]]:
    """The positional words, and `--option value` or `--option=value`, in any order."""
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
    if len(given) != len(expected):
        names = " ".join(expected).upper()
        raise RecipeError(f"expected {'one ' * (len(expected) == 1)}{names}, got {' '.join(given) or 'none'}")
    return given, overrides


def _print_index(summary: Any, *, out: str | None, **_: Any) -> None:
    if summary.damaged:
        raise ShardError(
            f"damage found: {summary}; see the lines above{f' and {out}/damaged.jsonl' if out else ''}"
        )


def _print_verify(report: Any, *, out: str, **_: Any) -> None:
    for fault in report.faults:
        click.echo(str(fault))
    if not report.ok:
        again = (
            "; run the same encode command again, it encodes these shards anew" if report.forgotten else ""
        )
        raise OutputError(f"{len(report.faults)} fault{'s'[: len(report.faults) > 1]} in {out}{again}")
    click.echo(f"{out}: {report.shards} shards with {report.samples} latents are in order", err=True)


def _print_stats(summary: Any, **_: Any) -> None:
    from latentae.encoding.stats import stats_table

    click.echo(stats_table(summary))


def _print_order(listing: Any, *, epoch: str | None, **_: Any) -> None:
    try:
        for step, key in listing:
            sys.stdout.write(f"{step}\t{key}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    click.echo(
        f"epoch {epoch or 0} has {listing.steps} steps; last {listing.tail} samples skipped (incomplete batch)",
        err=True,
    )


_PRINTERS: dict[str, Callable[..., None]] = {
    "config": lambda text, **_: click.echo(text, nl=False),
    "index": _print_index,
    "order": _print_order,
    "stats": _print_stats,
    "verify": _print_verify,
}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from latentae.version import __version__

        click.echo(__version__)
        ctx.exit()


app = Commands(
    "latentae",
    help="Train, measure and ship the latent space of a generative model. MODEL is a run folder, a checkpoint, an exported folder, "
    "a file of weights, or owner/name on the Hugging Face Hub.",
    no_args_is_help=True,
    context_settings=_HELP,
    params=[
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            help="Show the traceback of an error (anywhere on the line).",
        ),
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_print_version,
            help="Print the version.",
        ),
    ],
)


def _open_streams() -> None:
    """Open missing standard streams (`2>&-`) to nowhere, and let any text through the others.

    An unused descriptor 0, 1 or 2 would go to the first file that is opened, and C libraries would write their messages into it.
    """
    for descriptor, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # keys may have letters that an ASCII terminal or UTF-8 lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, an error's own code, 2 for wrong usage, 130 for Ctrl-C."""
    _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = app.main(
            [word for word in words if word != "--debug"], prog_name="latentae", standalone_mode=False
        )
    except LatentAEError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command again to resume", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        _exit(2)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see latentae --help)", 2)
    except OSError as error:
        if debug:
            raise
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    _exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK")
    who = f"latentae (rank {rank})" if rank not in (None, "0") else "latentae"
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process; with several processes, skip the interpreter's teardown.

    Gloo's threads outlive their process group and may still free a tensor of the last exchange. If the interpreter is torn down at
    that moment, the process aborts although all its work is done (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
