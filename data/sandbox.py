"""Jinja templates of strangers: what they may do, how long they may run, how much they may make.

A chat template comes with a model's files, so it is a program that nobody here has read. jinja2's
sandbox keeps it from Python's insides; this one also bounds its steps and the size of what it
makes, before the time and the memory are spent. Filters and functions are those that
transformers' templates have (transformers/utils/chat_template_utils.py).
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache, wraps
from typing import Any

import jinja2
from attrs import define
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 2_000_000
"""Rounds of loops, calls and filters in one rendering: some two seconds."""
CALL = 20
"""What a call costs, in steps."""
LONGEST = 1 << 25
"""Characters of a text, items of a list."""
WIDEST = 10_000
"""What a template may ask for in one number: a width, an indentation, a count."""
LONGEST_TEMPLATE = 1 << 19
"""Characters of a template; those of models have some thousands."""
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^}]*(\d{5,}|\{)")
"""In the text of a format: a width above WIDEST, or one that an argument sets."""


@define
class _Rendering:
    """What one rendering may still do, and what the template's functions need of it."""

    steps: int
    opening: str
    closing: str
    now: datetime.datetime | None


_RENDERING: ContextVar[_Rendering | None] = ContextVar("rendering", default=None)


def render(
    jinja: str,
    variables: Mapping[str, Any],
    *,
    marks: tuple[str, str] = ("", ""),
    now: datetime.datetime | None = None,
) -> str:
    """Renders a template, with `marks` around what stands in `{% generation %}`; `now` is the
    moment that `strftime_now` tells (default: that of the call).

    Raises jinja2.TemplateError, or what a template's own mistakes are: TypeError, KeyError, …
    """
    token = _RENDERING.set(_Rendering(STEPS, *marks, now))
    try:
        return _fits(_compiled(jinja).render(**variables))
    finally:
        _RENDERING.reset(token)


@lru_cache(maxsize=32)
def _compiled(jinja: str) -> jinja2.Template:
    if len(jinja) > LONGEST_TEMPLATE:
        raise _too_much(f"it is longer than {LONGEST_TEMPLATE:,} characters")
    return _environment().from_string(jinja)


@cache
def _environment() -> "_Sandbox":
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _counted(name, function) for name, function in environment.filters.items()
    }
    environment.filters |= {"_each": _each, "_joined": _joined, "_fits": _fits}
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts what a template does, and looks at sizes before they are made."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # names with underscores, as in jinja2: a template's own keywords must not meet them
        _step(CALL)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        _check_request(getattr(__obj, "__name__", ""), (owner, *args, *kwargs.values()))
        return _fits(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    _check_size(len(sized) * times)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * abs(right))
        elif operator == "%":
            _check_request("format", (left, right))
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


class _Bounds(NodeTransformer):
    """Puts what is looped over, and what `~` joins, through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_each", [], [], None, None).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(joined, "_joined", [], [], None, None).set_lineno(node.lineno)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, "_fits", [], [], None, None)  # pyright: ignore
        return node


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _joined(values: Sequence[Any]) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with the marks by which jinja2 hands a filter its environment
    def counted(*args: Any, **kwargs: Any) -> Any:
        _step()
        _check_request(name, (*args, *kwargs.values()))
        return _fits(function(*args, **kwargs))

    return counted


def _check_request(name: str, given: Sequence[Any]) -> None:
    """Before a filter or method called `name` makes much of little; `given` is what it works on,
    and its arguments."""
    texts = [value for value in given if isinstance(value, str)]
    if name in _WIDTHS:
        if any(isinstance(value, int) and abs(value) > WIDEST for value in given[1:]):
            raise _too_much(f"{name} is asked for more than {WIDEST:,}")
    elif name in ("format", "format_map"):
        if texts and _WIDE.search(texts[0]):
            raise _too_much(f"{name} is asked for a width above {WIDEST:,}, or for any")
    elif name == "replace" and len(texts) > 2:
        _check_size(texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join" and given:
        lists = [value for value in given if isinstance(value, list | tuple)] or [tuple(texts[0])]
        items = [len(item) for items in lists for item in items if isinstance(item, str)]
        _check_size(sum(items) + len(items) * max(map(len, texts), default=0))
    if name == "indent" and texts:
        _check_size(texts[0].count("\n") * max((len(text) for text in texts[1:]), default=WIDEST))


_WIDTHS = frozenset(
    (
        *("center", "ljust", "rjust", "zfill", "expandtabs", "indent"),
        *("wordwrap", "batch", "slice", "tojson"),
    )
)
"""What takes a width, an indentation or a count of what to make."""


def _step(cost: int = 1) -> None:
    rendering = _RENDERING.get()
    if rendering is not None:  # else jinja2 folds a constant
        rendering.steps -= cost
        if rendering.steps < 0:
            raise _too_much(f"it takes more than {STEPS:,} steps")


def _fits(made: Any) -> Any:
    if isinstance(made, str | list | tuple | dict):
        _check_size(len(made))
    return made


def _check_size(size: int) -> None:
    if size > LONGEST:
        raise _too_much(f"it makes a text or list of more than {LONGEST:,}")


def _too_much(what: str) -> jinja2.TemplateError:
    return jinja2.TemplateError(f"{what}, which no conversation needs")


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: puts marks around what is between."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Any) -> str:
        rendering = _RENDERING.get()
        assert rendering is not None
        return rendering.opening + caller() + rendering.closing


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    rendering = _RENDERING.get()
    return ((rendering and rendering.now) or datetime.datetime.now()).strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def uses(jinja: str, name: str) -> bool:
    """Whether a template mentions a name, such as `strftime_now`."""
    return re.search(rf"\b{name}\b", jinja) is not None
