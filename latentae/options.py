"""Option tables: one table per verb gives its command line, Python signature, defaults and checks.

A table is a pydantic dataclass; its docstring is the verb's help. Fields before `_: KW_ONLY` are
positional arguments, the other fields are options:

    @table
    class StatsOptions:
        '''Print the statistics of latents.'''

        out: PathLike = argument("Output folder or URL of latentae encode.", metavar="LATENTS")
        _: KW_ONLY
        digits: int = option("Digits after the decimal point.", default=6, ge=0)

    @verb(StatsOptions)
    def stats(options: StatsOptions) -> dict[str, Any]: ...

    stats("latents", digits=3)      # the signature that users and editors see

Tables are in the `options.py` of their package and load no torch, so that `latentae --help` is
fast.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, cast, dataclass_transform, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from latentae.errors import RecipeError

__all__ = [
    "KW_ONLY",
    "OVERRIDES",
    "Device",
    "Inputs",
    "PathLike",
    "PerceptualName",
    "RecipeTable",
    "Weights",
    "argument",
    "choices",
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
PerceptualName = Literal["auto", "vgg", "alex", "squeeze", "efficientnet-lite0", "none"]
Device = Annotated[str, BeforeValidator(str)]  # also accepts a torch.device

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

    On the command line it is also positional. With a default it is an option there, unless its
    `metavar` is in brackets.

    Args:
        description: one sentence with the unit.
        default: its default; without one it is required.
        metavar: placeholder for the value in the help.
        name: names on the command line, such as "output o", if they differ from the Python name.
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
    """An option of a verb or recipe: by keyword in Python, `--name` on the command line.

    Args:
        description: one sentence with the unit; the help adds the default.
        default: its default.
        metavar: placeholder for the value in the help.
        name: names on the command line, such as "forget/--keep", if they differ from the Python
            name.
        many: whether the command line takes the option several times.
        identity: whether the value is part of a job's identity. "changed" includes it only if it is
            not the default; use it for options added after the first outputs were written.
        checks: constraints of pydantic's `Field`, such as `ge=1`.
    """
    extra = {"metavar": metavar, "name": name, "many": many, "identity": identity}
    return Field(default=default, description=description, json_schema_extra=extra, kw_only=True, **checks)


class RecipeTable(BaseModel):
    """A table of a recipe: refuses unknown keys and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass_transform(frozen_default=True, field_specifiers=(argument, option))
def table(cls: type[T]) -> type[T]:
    """Make a class an option table: a frozen dataclass whose values are checked."""
    return cast("type[T]", pydantic_dataclass(cls, frozen=True, config=_CONFIG))


def table_fields(of: Any) -> dict[str, FieldInfo]:
    """Name -> field in the order of the help: the table's own fields, then those of its bases."""
    found: dict[str, FieldInfo] = of.__pydantic_fields__
    own = [name for base in of.__mro__ for name in vars(base).get("__annotations__", {}) if name in found]
    return {name: found[name] for name in dict.fromkeys(own)}


def is_positional(of: Any, name: str) -> bool:
    """Whether a field is positional on the command line."""
    field = table_fields(of)[name]
    optional = (help_of(field, "metavar") or "").startswith("[")
    return not field.kw_only and (field.is_required() or optional)


def help_of(field: FieldInfo, key: Literal["metavar", "name", "many", "identity"]) -> Any:
    """The value given to `argument` or `option`."""
    return cast("dict[str, Any]", field.json_schema_extra).get(key)


def choices(annotation: Any) -> tuple[str, ...]:
    """The words of a Literal, alone or in a union."""
    parts = (annotation, *get_args(annotation))
    return tuple(word for part in parts for word in get_args(part) if isinstance(word, str))


def parse(of: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """An option table from a caller's arguments.

    Raises:
        RecipeError: an unknown option (names the nearest), a missing argument or a wrong value.
    """
    known = table_fields(of)
    names = [name for name, field in known.items() if not field.kw_only]
    if len(arguments) > len(names):
        raise TypeError(
            f"got {len(arguments)} positional arguments, expected at most {len(names)}: {', '.join(names)}"
        )
    values: dict[str, Any] = {**dict(zip(names, arguments, strict=False)), **options}
    if OVERRIDES in known:
        values[OVERRIDES] = {name: values.pop(name) for name in set(values) - set(known)}
    try:
        return cast("Callable[..., T]", of)(**{name: _plain(value) for name, value in values.items()})
    except ValidationError as error:
        raise RecipeError(explain(error, known, list(known))) from None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's own, also in a list or tuple."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def verb(of: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Give a function of a table the table's signature, for users and editors."""

    def decorate(function: Callable[[T], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            return function(parse(of, *arguments, **options))

        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(of).replace(return_annotation=returned)
        lines = [f"    {name}: {field.description}" for name, field in table_fields(of).items()]
        vars(call)["__signature__"] = signature
        call.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
        return call

    return decorate


def recipe_verb(of: Callable[..., T]) -> Callable[[Callable[[T], R]], Callable[..., R]]:
    """`verb` for a table whose field `overrides` collects other keywords: the recipe's options."""
    return verb(of)


def identity(options: Any) -> dict[str, Any]:
    """The options that are part of a job's identity, by name."""
    found = {}
    for name, field in table_fields(type(options)).items():
        included, value = help_of(field, "identity"), getattr(options, name)
        if included is True or (included == "changed" and value != field.default):
            found[name] = value
    return found


def nearest(key: str, names: Sequence[str], otherwise: str) -> str:
    """Advice for an unknown name: the nearest known name, or `otherwise`."""
    near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
    near = near or [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"did you mean {near[0]}?" if near else otherwise


def explain(
    error: ValidationError, known: Mapping[str, FieldInfo], names: Sequence[str], otherwise: str = ""
) -> str:
    """A validation error as one line: the option, the value found and what was expected.

    Args:
        error: of a table or a recipe.
        known: fields by their dotted names.
        names: names to suggest for an unknown one.
        otherwise: advice for a name that is not near any of them; by default a list of the names.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        advice = nearest(key, names, otherwise or f"the options are {', '.join(names)}")
        return f"unknown option {key}; {advice}"
    if first["type"] == "value_error":  # a check of several options; its message names them
        return first["msg"].removeprefix("Value error, ")
    name = next((name for name in known if key == name or key.startswith(f"{name}.")), key)
    field = known.get(name)
    if first["type"] == "missing" and name == key:
        return f"{name} is missing" if field is None else f"{name} is missing: {field.description}"
    expected = _expected(first["type"], field)
    message = f"expected {expected}" if expected else f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{name} is {_shown(first['input'], first['type'])}, {message}"


def _shown(value: Any, check: str) -> str:
    """A value for a message; a number on the command line is text, but is shown without quotes."""
    if isinstance(value, str) and check.startswith(("int_", "float_", "greater_", "less_", "finite_")):
        with suppress(ValueError):
            float(value)
            return value
    return repr(value)


_TYPES = {
    "finite": "a finite number",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _expected(check: str, field: FieldInfo | None) -> str | None:
    """Allowed values of a field, by the failed check; None if pydantic's message is better."""
    if field is not None and check == "literal_error":
        return f"one of {', '.join(choices(field.annotation))}"
    if field is not None and check.startswith(("greater_than", "less_than")):
        return _range(field)
    if field is not None and check == "string_pattern_mismatch":
        return help_of(field, "metavar")
    return _TYPES.get(check.split("_")[0])


def _range(field: FieldInfo) -> str:
    """The allowed values of a number: "1 or more", "0 to 1", "above 0"."""
    bounds = {
        key: f"{getattr(item, key)}" for key in _BOUNDS for item in field.metadata if hasattr(item, key)
    }
    if bounds.keys() == {"ge", "le"}:
        return f"{bounds['ge']} to {bounds['le']}"
    if bounds.keys() == {"ge"}:
        return f"{bounds['ge']} or more"
    return " and ".join(f"{_BOUNDS[key]} {value}" for key, value in bounds.items())
