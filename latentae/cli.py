"""The command line: commands come from the verbs' option tables; errors are one line."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import click
from pydantic.fields import FieldInfo

from latentae import VERBS
from latentae.errors import LatentAEError, OutputError, RecipeError, ShardError
from latentae.options import OVERRIDES, choices, help_of, is_positional, nearest, table_fields
from latentae.version import __version__

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
_SETTINGS = {
    "max_content_width": 110,  # of the terminal's width, which is 80 if unknown
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


class Commands(click.Group):
    """All verbs, in groups; a command is built when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the groups."""
        return [name for _, names in VERBS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, built from its table."""
        for package, names in VERBS.values():
            if cmd_name in names:
                module = importlib.import_module(f"latentae.{package}.options")
                return _command(cmd_name, getattr(module, f"{cmd_name.capitalize()}Options"))
        advice = nearest(cmd_name, self.list_commands(ctx), "see latentae --help")
        raise click.UsageError(f"no such command {cmd_name!r}; {advice}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per group, with the first sentence of each verb's help."""
        for title, (_, names) in VERBS.items():
            with formatter.section(title):
                commands = [(name, self.get_command(ctx, name)) for name in names]
                formatter.write_dl(
                    [(name, _first_sentence(command)) for name, command in commands if command]
                )


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").split())
    return text[: text.find(". ") + 1] or text


class VerbCommand(click.Command):
    """A command whose help also describes the arguments."""

    def __init__(self, *arguments: Any, described: Mapping[str, FieldInfo], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.described = described

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Describe the arguments, then the options."""
        if self.described:
            with formatter.section("Arguments"):
                formatter.write_dl([(_placeholder(*item), _help(item[1])) for item in self.described.items()])
        super().format_options(ctx, formatter)


class RecipeCommand(VerbCommand):
    """A command that also takes every option of a recipe; its help lists them."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the shipped recipes and the recipes' options."""
        from latentae.training.recipe import recipe_options, shipped_recipes

        with formatter.section("Shipped recipes"):
            formatter.write_text(", ".join(shipped_recipes()))
        with formatter.section("Options of a recipe (also keys of its TOML file)"):
            rows = recipe_options().items()
            formatter.write_dl([(f"--{_dashed(name)}", _help(field)) for name, field in rows])


def _command(verb: str, table: type[Any]) -> click.Command:
    fields = table_fields(table)
    positional = {name: field for name, field in fields.items() if is_positional(table, name)}
    options = [_option(name, field) for name, field in fields.items() if name not in (*positional, OVERRIDES)]
    texts: dict[str, Any] = {"help": table.__doc__, "described": positional}
    if OVERRIDES in fields:
        metavar = f"{' '.join(positional).upper()} [--OPTION VALUE]..."
        words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar=metavar)
        settings = {**_SETTINGS, "ignore_unknown_options": True}
        return RecipeCommand(verb, settings, _call(verb, list(positional)), [words, *options], **texts)
    arguments = [_argument(name, field) for name, field in positional.items()]
    return VerbCommand(verb, _SETTINGS, _call(verb), [*arguments, *options], **texts)


def _placeholder(name: str, field: FieldInfo) -> str:
    return help_of(field, "metavar") or name.upper()


def _argument(name: str, field: FieldInfo) -> click.Argument:
    count = -1 if help_of(field, "many") else 1
    return click.Argument(
        [name], nargs=count, required=field.is_required(), metavar=_placeholder(name, field)
    )


def _option(name: str, field: FieldInfo) -> click.Option:
    """An option whose value stays text; the table checks it."""
    words = (help_of(field, "name") or _dashed(name)).split()
    names = [f"--{word}" if len(word) > 1 else f"-{word}" for word in words]
    if isinstance(field.default, bool):
        if field.default and "/" not in names[0]:
            names[0] += f"/--no-{names[0][2:]}"
        return click.Option([*names, name], is_flag=True, default=field.default, help=field.description)
    return click.Option(
        [*names, name],
        type=click.UNPROCESSED,
        multiple=bool(help_of(field, "many")),
        metavar=help_of(field, "metavar") or _metavar(field.annotation),
        help=_help(field),
    )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _help(field: FieldInfo) -> str:
    shown = not field.is_required() and field.default not in (None, (), "")
    return f"{field.description} [{field.default}]" if shown else f"{field.description}"


def _metavar(annotation: Any) -> str:
    """The choices, or a word for the type."""
    if words := choices(annotation):
        return f"[{'|'.join(words)}]"
    types = (annotation, *get_args(annotation))
    return next((word for kind, word in ((int, "N"), (float, "X"), (Path, "PATH")) if kind in types), "TEXT")


def _call(verb: str, positional: Sequence[str] | None = None) -> Callable[..., None]:
    """Call the verb with the options of the line and print its result.

    `positional`: arguments of a recipe verb, whose words are arguments and recipe options.
    """

    def call(words: Sequence[str] = (), **values: Any) -> None:
        import latentae

        given, overrides = ([], {}) if positional is None else _split(words, positional)
        options = {name: value for name, value in values.items() if value is not None and value != ()}
        result = getattr(latentae, verb)(*given, **options, **overrides)
        if verb in _PRINTERS:
            _PRINTERS[verb](result, values)

    return call


def _split(words: Sequence[str], positional: Sequence[str]) -> tuple[list[str], dict[str, str]]:
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
    if len(given) != len(positional):
        names = " ".join(positional).upper()
        raise RecipeError(
            f"expected {'one ' * (len(positional) == 1)}{names}, got {' '.join(given) or 'none'}"
        )
    return given, overrides


def _print_index(summary: Any, options: Mapping[str, Any]) -> None:
    if summary.damaged:
        record = f" and {options['out']}/damaged.jsonl" if options["out"] else ""
        raise ShardError(f"damage found: {summary}; see the lines above{record}")


def _print_verify(report: Any, options: Mapping[str, Any]) -> None:
    out, count = options["out"], len(report.faults)
    for fault in report.faults:
        click.echo(str(fault))
    if not report.ok:
        again = "; run the same encode command again to encode these shards anew" if report.forgotten else ""
        raise OutputError(f"{count} fault{'s'[: count > 1]} in {out}{again}")
    click.echo(f"{out}: {report.shards} shards with {report.samples} latents are in order", err=True)


def _print_stats(summary: Any, _: Mapping[str, Any]) -> None:
    from latentae.encoding.stats import stats_table

    click.echo(stats_table(summary))


def _print_order(listing: Any, options: Mapping[str, Any]) -> None:
    try:
        for step, key in listing:
            sys.stdout.write(f"{step}\t{key}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    skipped = f"last {listing.tail} samples skipped (incomplete batch)"
    click.echo(f"epoch {options['epoch'] or 0} has {listing.steps} steps; {skipped}", err=True)


_PRINTERS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "config": lambda text, _: click.echo(text, nl=False),
    "index": _print_index,
    "order": _print_order,
    "stats": _print_stats,
    "verify": _print_verify,
}


app = Commands(
    "latentae",
    help="Train, measure and ship the latent space of a generative model. MODEL is a run folder, "
    "a checkpoint, an exported folder, a file of weights, or owner/name on the Hugging Face Hub.",
    no_args_is_help=True,
    context_settings=_SETTINGS,
)
app = click.version_option(__version__, message="%(version)s", help="Print the version.")(app)
app = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error (anywhere on the line)."
)(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, the error's code, 2 for wrong usage, 130 for Ctrl-C."""
    _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = app.main(words, prog_name="latentae", standalone_mode=False)
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


def _open_streams() -> None:
    """Open closed standard streams (`2>&-`) on the null device, and let stdout print any text.

    A free descriptor 0, 1 or 2 would go to the first file that is opened, and C libraries would
    write their messages into it.
    """
    for descriptor, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # keys may have letters that an ASCII terminal or UTF-8 lacks
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK")
    who = f"latentae (rank {rank})" if rank not in (None, "0") else "latentae"
    print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End the process; with several processes, without the interpreter's teardown.

    Gloo's threads outlive their process group and may still free a tensor of the last exchange.
    Teardown at that moment aborts a process whose work is done (pytorch/pytorch#179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
