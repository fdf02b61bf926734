"""Values of arguments: their types checked without coercion, their texts read and written.

cattrs structures each value. Nothing is bent to fit: true is no integer and 1 no string; an
integer is a number, and so is the text 3e-4, which YAML 1.1 takes for a string.
"""

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import cattrs
import yaml

from omnistep.core.config import Argument, Names

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
_INTEGER = r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"
_LEADING_ZERO = r"^[-+]?0[0-9_]+$"
_REAL = (
    r"^([-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


# ---- types ---------------------------------------------------------------------------------


def _exactly(kind: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return structure


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float) and not _is_number_text(value):
        raise TypeError
    if not math.isfinite(number := float(value)):
        raise TypeError
    return number


def _is_number_text(value: Any) -> bool:
    return type(value) is str and _NUMBER.fullmatch(value) is not None


def _choice(value: Any, kind: Any) -> str:
    if type(value) is not str or value not in typing.get_args(kind):
        raise TypeError
    return value


def _names(value: Any, kind: Any) -> Names | None:
    if value is None and kind != Names:
        return None
    several = [value] if type(value) is str else value
    if type(several) not in (list, tuple) or not several:
        raise TypeError
    if not all(type(name) is str and name for name in several):
        raise TypeError
    return value if type(value) is str else tuple(several)


def _mapping(value: Any, _: Any) -> dict[str, Any]:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise TypeError
    return value


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(float, _number)
    special = (
        (lambda kind: kind == dict[str, Any], _mapping),
        (lambda kind: kind in (Names, Names | None), _names),
        (lambda kind: typing.get_origin(kind) is Literal, _choice),
    )
    for is_kind, structure in special:
        converter.register_structure_hook_func(is_kind, structure)
    return converter


CONVERTER = _converter()


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _main_member(kind: Any) -> Any:
    return next(member for member in _members(kind) if member is not types.NoneType)


def type_usage(kind: Any) -> str:
    """A type as usage lines have it: `INTEGER`, `true|false`, `linear|cosine`."""
    main = _main_member(kind)
    words = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT"}
    if typing.get_origin(main) is Literal:
        return "|".join(typing.get_args(main))
    return "NAMES" if tuple[str, ...] in _members(kind) else words.get(main, "MAPPING")


def type_name(kind: Any) -> str:
    """A type in words: `an integer`, `one of linear, cosine`, `a string or null`."""
    main = _main_member(kind)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if typing.get_origin(main) is Literal:
        choices: tuple[str, ...] = typing.get_args(main)
        text = f"one of {', '.join(choices)}" if choices[1:] else "".join(choices)
    elif tuple[str, ...] in _members(kind):
        text = "a name or a list of names"
    else:
        text = words.get(main, "a mapping")
    return f"{text} or null" if types.NoneType in _members(kind) else text


def structured(value: Any, argument: Argument) -> Any:
    """The value as the argument's type has it. Raises ValueError that says what is allowed."""
    try:
        return CONVERTER.structure(value, argument.type)
    except (TypeError, ValueError, OverflowError):
        hint = _hint(value, argument)
        raise ValueError(f"expected {type_name(argument.type)}{hint}") from None


def _hint(value: Any, argument: Argument) -> str:
    main = _main_member(argument.type)
    if value is None:
        return f"; leave it out for the default, {shown(argument.default)}"
    if type(value) is str:
        return nearest(value, typing.get_args(main))
    if main is int and type(value) is float and value.is_integer():
        return f"; write {int(value)}"
    if main is str and type(value) in (bool, int, float):
        return "; put it in quotes"
    return ""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- texts ---------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as one writes it in a recipe, cut at 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def from_text(text: str, argument: Argument) -> Any:
    """A word of the command line as the value it stands for, still to be `structured`.

    Mappings are JSON, lists of names are `[a, b]` or `a,b`, `null` and `none` are None where
    None is allowed. Strings are taken as they are. Raises ValueError where JSON is malformed.
    """
    members, main = _members(argument.type), _main_member(argument.type)
    if types.NoneType in members and text.lower() in ("null", "none"):
        return None
    if main == dict[str, Any]:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at character {error.pos + 1}"
            raise ValueError(f"expected a mapping in JSON; {where}") from None
    if tuple[str, ...] in members:
        inner = text.removeprefix("[").removesuffix("]")
        names = [name.strip().strip("'\"") for name in inner.split(",")]
        return names if inner != text or len(names) > 1 else text
    if main is str or typing.get_origin(main) is Literal:
        return text
    return scalar(text)


def scalar(text: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def _resolvers() -> dict[Any, Any]:
    """PyYAML's scalars, but numbers as in YAML 1.2 (3e-4 is one, 010 and 1:30 are not), no dates.

    Loader and dumper share them, so that what is written is read back as what it was.
    """
    prefix = "tag:yaml.org,2002:"
    dropped = {prefix + kind for kind in ("int", "float", "timestamp")}
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in dropped]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        for kind, pattern in (("int", _INTEGER), ("str", _LEADING_ZERO), ("float", _REAL)):
            table.setdefault(first, []).append((prefix + kind, re.compile(pattern)))
    return table


class Loader(yaml.SafeLoader):
    """YAML without code, with the numbers of YAML 1.2."""

    yaml_implicit_resolvers = _resolvers()


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back unchanged."""

    yaml_implicit_resolvers = _resolvers()

    def text(self, text: str) -> yaml.Node:
        # a plain or single-quoted scalar would fold rare line breaks such as U+0085
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, Dumper.text)
