"""Option tables: one table per verb gives its command line, Python signature, defaults, help and checks.

A table is a pydantic dataclass. Fields before `_: KW_ONLY` are positional arguments, the others options:

    @table
    class StatsOptions:
        '''Print the statistics of latents.'''

        out: PathLike = argument("Output folder or URL of latentae encode.", metavar="LATENTS")
        _: KW_ONLY
        digits: int = option("Digits after the decimal point.", default=6, ge=0)

    @verb(StatsOptions)
    def stats(options: StatsOptions) -> dict[str, Any]: ...

    stats("latents", digits=3)      # what users and editors see

Tables load no torch, so that `latentae --help` is fast. They live in the `options.py` of their package.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, dataclass_transform, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from latentae.errors import RecipeError

__all__ = [
    "KW_ONLY",
    "OVERRIDES",
    "Device",
    "Inputs",
    "PathLike",
    "Weights",
    "argument",
    "explain",
    "help_of",
    "identity",
    "is_positional",
    "nearest",
    "option",
    "parse",
    "recipe_verb",
    "table",
    "table_fields",
    "verb",
]

PathLike = str | Path
Inputs = str | Path | Sequence[str | Path]
Weights = Literal["ema", "raw"]
Device = Annotated[str, BeforeValidator(str)]  # also takes a torch.device

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

OVERRIDES = "overrides"
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def argument(
    description: str,
    *,
    default: Any = ...,
    metavar: str | None = None,
    name: str | None = None,
    many: bool = False,
) -> Any:
    """A positional argument of a verb's function.

    On the command line it is positional too; with a default it is an option there, unless its `metavar` is in brackets.

    Args:
        description: one sentence with the unit.
        default: its default; without one it is required.
        metavar: what stands for the value in the help.
        name: names on the command line, such as "output o", where they differ from the Python name.
        many: whether the command line takes several values.
    """
    extra = {"metavar": metavar, "name": name, "many": many}
    return Field(default=default, description=description, json_schema_extra=extra)


def option(
    description: str,
    *,
    default: Any,
    metavar: str | None = None,
    name: str | None = None,
    many: bool = False,
    identity: bool | Literal["changed"] = False,
    **checks: Any,
) -> Any:
    """An option of a verb: by keyword in Python, `--name` on the command line.

    Args:
        description: one sentence with the unit; the tool prints the default.
        default: its default.
        metavar: what stands for the value in the help.
        name: names on the command line, such as "forget/--keep", where they differ from the Python name.
        many: whether the command line takes the option several times.
        identity: whether the value is part of a job's identity: always, or "changed": unless it is the default, as for
            options that were added after the first outputs were written.
        checks: constraints of pydantic's `Field`, such as `ge=1`.
    """
    extra = {"metavar": metavar, "name": name, "many": many, "identity": identity}
    return Field(default=default, description=description, json_schema_extra=extra, kw_only=True, **checks)


@dataclass_transform(frozen_default=True, field_specifiers=(argument, option))
def table(cls: type[T]) -> type[T]:
    """Make a class an option table: a frozen, strictly checked dataclass. Its docstring is the verb's help."""
    return pydantic_dataclass(cls, frozen=True, config=_CONFIG)  # pyright: ignore[reportReturnType]


def table_fields(of: type[Any]) -> dict[str, FieldInfo]:
    """Name -> field, in the order of the help: the table's own fields, then those of its bases."""
    found: dict[str, FieldInfo] = of.__pydantic_fields__
    own = [name for base in of.__mro__ for name in vars(base).get("__annotations__", {}) if name in found]
    return {name: found[name] for name in dict.fromkeys(own)}


def is_positional(of: type[Any], name: str) -> bool:
    """Whether a field is positional on the command line."""
    field = table_fields(of)[name]
    optional = (help_of(field, "metavar") or "").startswith("[")
    return not field.kw_only and (field.is_required() or optional)


def help_of(field: FieldInfo, key: str) -> Any:
    """What `argument` or `option` was given as `metavar`, `name` or `identity`."""
    extra = field.json_schema_extra
    return extra.get(key) if isinstance(extra, dict) else None


def parse(of: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """An option table from a caller's arguments.

    Raises:
        RecipeError: an unknown option (the nearest is named), a missing argument or a value that is not allowed.
    """
    known = table_fields(of)  # pyright: ignore[reportArgumentType]
    names = [name for name, field in known.items() if not field.kw_only]
    if len(arguments) > len(names):
        raise TypeError(
            f"{len(arguments)} positional arguments are given, expected at most {len(names)}: {', '.join(names)}"
        )
    values = {**dict(zip(names, arguments, strict=False)), **options}
    if OVERRIDES in known:
        values[OVERRIDES] = {name: values.pop(name) for name in set(values) - set(known)}
    try:
        return of(**{name: _plain(value) for name, value in values.items()})  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        raise RecipeError(explain(error, known, list(known))) from None


def verb(of: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Give a function of a table the table's own signature: users and editors see its arguments and options."""

    def decorate(function: Callable[[T], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            return function(parse(of, *arguments, **options))

        returned = inspect.signature(function).return_annotation
        setattr(call, "__signature__", inspect.signature(of).replace(return_annotation=returned))  # noqa: B010
        lines = [f"    {name}: {field.description}" for name, field in table_fields(of).items()]  # pyright: ignore[reportArgumentType]
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
        return call

    return decorate


def recipe_verb(of: Callable[..., T]) -> Callable[[Callable[[T], R]], Callable[..., R]]:
    """`verb` for a table with a field `overrides`, which collects every other keyword: the options of a recipe."""
    return verb(of)


def identity(options: Any) -> dict[str, Any]:
    """The options that are part of a job's identity, by name."""
    values = {name: (getattr(options, name), field) for name, field in table_fields(type(options)).items()}
    wanted = {name: help_of(field, "identity") for name, (_, field) in values.items()}
    return {
        name: value
        for name, (value, field) in values.items()
        if wanted[name] is True or (wanted[name] == "changed" and value != field.default)
    }


def nearest(key: str, names: Sequence[str], otherwise: str) -> str:
    """Advice for an unknown name: the nearest known one, or `otherwise`."""
    near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise


def explain(error: ValidationError, known: Mapping[str, FieldInfo], names: Sequence[str]) -> str:
    """A validation error as one line: the option, what was found and what was expected.

    Args:
        error: of a table or a recipe.
        known: fields by their dotted names.
        names: names to suggest for an unknown one.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown option {key}; {nearest(key, names, 'the options are ' + ', '.join(names))}"
    if first["type"] == "value_error":  # a check of several options, whose message names them
        return first["msg"].removeprefix("Value error, ")
    name = next((name for name in known if key == name or key.startswith(f"{name}.")), key)
    if first["type"] == "missing":
        return f"{name} is missing: {known[name].description}" if name in known else f"{name} is missing"
    return f"{name} is {first['input']!r}, {_expected(first['type'], first, known.get(name))}"


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}


def _expected(kind: str, error: Mapping[str, Any], field: FieldInfo | None) -> str:
    if kind == "literal_error" and field is not None:
        choices = [str(choice) for choice in _choices(field.annotation)]
        return f"expected one of {', '.join(choices)}"
    if kind.startswith(("greater_than", "less_than")) and field is not None:
        return f"expected {_range(field)}"
    for name, words in _WORDS.items():
        if kind.startswith(f"{name}_"):
            return f"expected {words}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    found = get_args(annotation)
    return found if not any(map(get_args, found)) else tuple(c for part in found for c in get_args(part))


def _range(field: FieldInfo) -> str:
    """The allowed values of a number, from its constraints: "1 or more", "0 to 1", "above 0"."""
    bounds = {
        key: getattr(item, key)
        for item in field.metadata
        for key in ("ge", "gt", "le", "lt")
        if hasattr(item, key)
    }
    low = f"{bounds['ge']:g}" if "ge" in bounds else f"above {bounds['gt']:g}" if "gt" in bounds else ""
    high = f"{bounds['le']:g}" if "le" in bounds else f"below {bounds['lt']:g}" if "lt" in bounds else ""
    if low and high:
        return (
            f"{low} to {high}"
            if "ge" in bounds and "le" in bounds
            else f"{low} and {'at most ' * ('le' in bounds)}{high}"
        )
    if "ge" in bounds:
        return f"{low} or more"
    return low or (f"at most {high}" if "le" in bounds else high)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's own."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value
