"""Arguments from a recipe (YAML) and a command line, and back into a recipe.

`load` is what a command calls: the command line wins over the recipe, the recipe over the
defaults, and everything that is wrong is reported at once, with where it came from.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from attrs import frozen

from omnistep.core.config import (
    ARGUMENTS,
    SECTIONS,
    TRAIN,
    Argument,
    Arguments,
    Command,
    value_of,
)
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_rules import derive, described, problems
from omnistep.core.config_types import (
    CONVERTER,
    Dumper,
    Loader,
    from_text,
    scalar,
    shown,
    structured,
)

COMMAND_LINE = "command line"
HELP = ("-h", "--help")


@frozen
class Setting:
    """A value that was given for an argument, and where: `recipe.yaml:12` or `command line`."""

    name: str
    value: Any
    origin: str


@frozen
class Given:
    """Arguments as they were given: those that are well formed, and what is wrong with others."""

    args: Arguments
    """Everything not given, or malformed, at its default."""
    origins: Mapping[str, str]
    malformed: frozenset[str]
    errors: tuple[str, ...]


# ---- reading -------------------------------------------------------------------------------


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the words of a command line (without the program) ask for help."""
    return any(word in HELP for word in argv)


def read_command_line(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """Sorts words into recipes and `--name value` or `--name=value` pairs; the last pair wins.

    A value that begins with `--` needs the form with `=`; a name without a value maps to None.
    """
    recipes: list[str] = []
    texts: dict[str, str | None] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            recipes.append(word)
            continue
        name, equals, text = word.partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else None
        texts[name.removeprefix("--") or word] = text
    return recipes, texts


def read_recipe(path: str) -> list[Setting]:
    """The settings of a YAML file, in its order.

    An argument stands under its section, or at the top as `section.name`. Raises ConfigError
    where the file is not readable, not YAML, or gives an argument twice.
    """
    try:
        loader = Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        twice = [f"{path}:{line}: {key} is given twice" for key, line in _given_twice(root)]
        settings = [] if twice else list(_settings(loader, root, path))
    except OSError as error:
        raise ConfigError([f"recipe {path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        text = f"byte {error.start + 1} is not UTF-8; a recipe is a YAML file"
        raise ConfigError([f"recipe {path}: {text}"]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}: not valid YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"recipe {path}: not valid YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"recipe {path}: nested too deeply"]) from None
    names = [setting.name for setting in settings]
    for index, setting in enumerate(settings):
        if setting.name in names[:index]:
            twice.append(f"{setting.origin}: {setting.name} is given twice")
    if twice:
        raise ConfigError(twice)
    return settings


def _settings(loader: Loader, root: yaml.Node | None, path: str) -> Iterator[Setting]:
    for key, node in _pairs(loader, root, path, "the sections " + ", ".join(SECTIONS)):
        section, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if section not in SECTIONS:
            yield Setting(section, loader.construct_object(node, deep=True), where)
            continue
        for inner, value in _pairs(loader, node, path, f"the arguments of {section}"):
            where = f"{path}:{inner.start_mark.line + 1}"
            name = f"{section}.{inner.value}"
            yield Setting(name, loader.construct_object(value, deep=True), where)


def _pairs(
    loader: Loader, node: yaml.Node | None, path: str, holds: str
) -> list[tuple[yaml.Node, yaml.Node]]:
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ConfigError([f"{path}:{line}: expected {holds}, as `name: value` lines"])
    loader.flatten_mapping(node)
    return node.value


def _given_twice(
    node: yaml.Node | None, seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, int]]:
    """Keys that stand twice in one mapping, with the line of the second; YAML forbids them."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen |= {id(node)}
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if keys[index] in keys[:index]:
                yield keys[index], key.start_mark.line + 1
        children = [value for _, value in node.value]
    for child in children:
        yield from _given_twice(child, seen)


# ---- structuring ---------------------------------------------------------------------------


def collect(argv: Sequence[str], command: Command = TRAIN) -> Given:
    """Reads recipe and command line. Raises ConfigError only where the recipe is not readable."""
    recipes, texts = read_command_line(argv)
    if len(recipes) > 1:
        raise ConfigError([f"one recipe at most; given: {', '.join(recipes)}"])
    settings = {setting.name: setting for path in recipes for setting in read_recipe(path)}
    errors: dict[str, str] = {}
    for option, text in texts.items():
        name, keys = _inside(option)
        try:
            value = _from_command_line(name, text, bool(keys), command)
        except ValueError as error:
            errors[name] = f"{_option(option, text)} ({COMMAND_LINE}): {error}"
            continue
        held = settings[name].value if name in settings else {}
        settings[name] = Setting(name, _with_value(held, keys, value), COMMAND_LINE)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, setting in settings.items():
        if name in errors:
            continue
        try:
            value = structured(setting.value, _known(name))
        except ValueError as error:
            errors[name] = f"{name} = {shown(setting.value)} ({setting.origin}): {error}"
            continue
        section, key = name.split(".")
        values[section][key] = value
    return Given(
        Arguments(**{name: kind(**values[name]) for name, kind in SECTIONS.items()}),
        {name: setting.origin for name, setting in settings.items()},
        frozenset(errors),
        tuple(errors.values()),
    )


def _inside(option: str) -> tuple[str, tuple[str, ...]]:
    """`model.encoders.image.model_path`: the argument, a mapping, and the keys in it."""
    section, key, *keys = (*option.split("."), "", "")
    name, keys = f"{section}.{key}", tuple(filter(None, keys))
    if keys and name in ARGUMENTS and ARGUMENTS[name].type == dict[str, Any]:
        return name, keys
    return option, ()


def _with_value(held: Any, keys: tuple[str, ...], value: Any) -> Any:
    """`held` with the value at these keys; the value itself where there are none."""
    if not keys:
        return value
    held = held if isinstance(held, dict) else {}
    return {**held, keys[0]: _with_value(held.get(keys[0]), keys[1:], value)}


def _from_command_line(name: str, text: str | None, inside: bool, command: Command) -> Any:
    """`inside`: the text is of a value in the mapping that the argument is."""
    argument = _known(name)
    if not command.takes(name):
        reads = " and ".join(r if "." in r else f"{r}.*" for r in command.reads)
        raise ValueError(f"{command.program} reads {reads} only")
    if text is None:
        raise ValueError(f"needs a value; write --{name}=VALUE where it begins with --")
    return scalar(text) if inside else from_text(text, argument)


def _option(name: str, text: str | None) -> str:
    return f"{name} = {shown(text)}" if text is not None else name


def _known(name: str) -> Argument:
    """The argument of that name; ValueError with the nearest one where there is none."""
    if name in ARGUMENTS:
        return ARGUMENTS[name]
    near = _nearest(name)
    raise ValueError(f"no such argument; {f'did you mean {near}?' if near else '--help lists all'}")


def _nearest(name: str) -> str | None:
    """The known name whose last part is likest; the section that was named comes first."""
    section, _, key = name.rpartition(".")
    own = [known for known in ARGUMENTS if known.startswith(f"{section}.")]
    for candidates in (own, [*SECTIONS, *ARGUMENTS]):
        # of equal last parts the first stays: model, data, train, infer
        by_key = {known.rpartition(".")[2]: known for known in reversed(candidates)}
        close = difflib.get_close_matches(key, by_key, n=1)
        if close:
            return by_key[close[0]]
    return None


def parse(argv: Sequence[str], command: Command = TRAIN) -> Arguments:
    """The arguments as given, well formed but not yet resolved.

    `argv` is the command line without the program: at most one recipe, and overrides. Raises
    ConfigError with every malformed argument.
    """
    given = collect(argv, command)
    if given.errors:
        raise ConfigError(list(given.errors))
    return given.args


def load(
    argv: Sequence[str], *, world_size: int, cuda: bool, command: Command = TRAIN
) -> Arguments:
    """`parse`, then `config_rules.resolve`, with every problem of both in one ConfigError."""
    given = collect(argv, command)
    args = derive(given.args, world_size=world_size, cuda=cuda)
    found = problems(args, world_size=world_size, command=command)
    errors = list(given.errors) + [
        described(problem, args, given.origins)
        for problem in found
        if given.malformed.isdisjoint(problem.names)
    ]
    if errors:
        raise ConfigError(errors)
    return args


# ---- writing -------------------------------------------------------------------------------


def to_yaml(args: Arguments) -> str:
    """A recipe that `parse` reads back as these arguments. Required ones not given are left out."""
    sections = CONVERTER.unstructure(args)
    for name, argument in ARGUMENTS.items():
        if argument.info.required and value_of(args, name) == "":
            section, key = name.split(".")
            del sections[section][key]
    return yaml.dump(sections, Dumper=Dumper, sort_keys=False, allow_unicode=True)


LIES_ELSEWHERE = ("train.load_checkpoint_path", "train.output_dir", "train.checkpoint_dir")


def changes(args: Arguments, path: Path) -> list[str]:
    """What differs from the recipe at `path`, if there is one, as `name: old -> new`; of what a
    run is made of, not of where it lies or goes on."""
    if not path.is_file():
        return []
    before = parse([str(path)])
    return [
        f"{name}: {shown(value_of(before, name))} -> {shown(value_of(args, name))}"
        for name in ARGUMENTS
        if name.startswith(("model.", "data.", "train."))
        and name not in LIES_ELSEWHERE
        and value_of(before, name) != value_of(args, name)
    ]


def dump(args: Arguments, path: str | os.PathLike[str]) -> None:
    """Writes resolved arguments as the recipe that reproduces their run."""
    header = "# All arguments of a run, resolved: started from this file it is the same run.\n"
    try:
        Path(path).write_text(header + to_yaml(args), encoding="utf-8")
    except OSError as error:  # which names no file where the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error
