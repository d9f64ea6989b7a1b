"""From YAML files and command-line overrides to a valid RunConfig, or to errors that say where."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moebius.errors import ConfigError
from moebius.trainer.config import RunConfig, problems

BASE_KEY = "base"
KeyPath = tuple[str | int, ...]
Node = TypeVar("Node", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `3e-4` is a number (YAML 1.1 wants `3.0e-4`), a date is text, and so is
    `12:00:00`, which YAML 1.1 takes for a number of base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, its bases and overrides (`optim.lr=3e-4`), and check everything.

    Raises ConfigError with one line per problem, all problems at once: file:line:column, dotted
    path, what is wrong, what was given and the nearest valid name.
    """
    tree, places = read_tree(Path(path))
    # What chooses a kind goes first: it may replace the options of another one.
    for override in sorted(overrides, key=lambda text: ".kind=" not in text):
        _override(tree, places, override)
    config = validated(RunConfig, tree, places, str(path))
    lines = [
        f"{_place(tuple(problem.path.split('.')), places, str(path))}: "
        f"{problem.path}: {problem.message}"
        for problem in problems(config)
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def validated(
    model: type[Node], tree: dict[str, Any], places: Mapping[KeyPath, str], fallback: str
) -> Node:
    """A node of a tree whose keys stand at `places`, or else at `fallback`.

    Raises ConfigError with one line per problem.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [
            _describe(details, tree, places, fallback, model) for details in _causes(error.errors())
        ]
        raise ConfigError("\n".join(lines)) from None


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The tree of a file merged over its bases, and where each key stands."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: the file is its own base")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, _Loader)
        if node is None:
            return {}, {}
        places = dict(_marks(node, path, ()))
        tree = yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the config file: {reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1:1: a config file is a mapping, not a {type(tree).__name__}")
    base = tree.pop(BASE_KEY, None)
    if base is None:
        return tree, places
    if not isinstance(base, str):
        raise ConfigError(f"{places[(BASE_KEY,)]}: base: must be the name of one file")
    merged, base_places = read_tree(path.parent / base, (*seen, path.resolve()))
    return _merge(merged, tree), base_places | places


def _marks(node: yaml.Node, path: Path, prefix: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Where each key of a YAML document stands. Raises ConfigError for a key given twice."""
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(number, value, value) for number, value in enumerate(node.value)]
    names = set()
    for name, marked, value in children:
        place = f"{path}:{marked.start_mark.line + 1}:{marked.start_mark.column + 1}"
        if name in names:
            raise ConfigError(f"{place}: {'.'.join(map(str, (*prefix, name)))}: given twice")
        names.add(name)
        yield (*prefix, name), place
        yield from _marks(value, path, (*prefix, name))


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; another `kind` replaces a mapping as a whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping) and not _another_kind(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _another_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both name a kind, and not the same one; a kind left to its default is any."""
    return "kind" in old and "kind" in new and old["kind"] != new["kind"]


def _override(tree: dict[str, Any], places: dict[KeyPath, str], override: str) -> None:
    """Apply `a.b.c=value` to the tree in place."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"command line: '{override}' is not of the form path.to.option=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"command line: {name}: '{text[:80]}' is not a YAML value") from None
    path: KeyPath = tuple(int(part) if _is_index(part) else part for part in name.split("."))
    change: Any = value
    for depth, part in reversed(list(enumerate(path))):
        if isinstance(part, int):
            change = _with_item(_at(tree, path[:depth]), part, change, override)
        else:
            change = {part: change}
    place = f"command line: {override}"
    for end in range(1, len(path)):
        if not isinstance(_at(tree, path[:end]), dict | list):
            places[path[:end]] = place
    for key in _keys(value, path):
        places[key] = place
    merged = _merge(tree, change)
    tree.clear()
    tree.update(merged)


def _keys(value: Any, prefix: KeyPath) -> Iterator[KeyPath]:
    """The path of a value and those of everything in it."""
    yield prefix
    children: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from _keys(child, (*prefix, key))


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 6


def _at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def _with_item(old: Any, number: int, value: Any, override: str) -> list[Any]:
    if not isinstance(old, list) or number >= len(old):
        raise ConfigError(f"command line: {override}: there is no item {number} to change")
    items = list(old)
    both = isinstance(items[number], dict) and isinstance(value, dict)
    items[number] = _merge(items[number], value) if both else value
    return items


def _place(path: KeyPath, places: Mapping[KeyPath, str], fallback: str) -> str:
    """Where a key, or the nearest enclosing one that was written down, stands."""
    path = tuple(int(part) if isinstance(part, str) and _is_index(part) else part for part in path)
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return fallback


def _causes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The errors without those that follow from others: a list of bad items counts as too short."""
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(
            other is not error and other["loc"][: len(error["loc"])] == error["loc"]
            for other in errors
        )
    ]


def _describe(
    details: ErrorDetails,
    tree: dict[str, Any],
    places: Mapping[KeyPath, str],
    fallback: str,
    model: type[BaseModel],
) -> str:
    """One line for one of pydantic's findings."""
    path = _without_tags(details["loc"], tree)
    name = ".".join(map(str, path))
    given = details["input"]
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _options(model, details["loc"][:-1])
        message = f"unknown option{_nearest(str(path[-1]), allowed)}"
    elif kind == "missing":
        message = "missing"
    elif kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        message = f"{given!r} is not allowed{_nearest(str(given), allowed)}"
    elif kind == "union_tag_invalid":
        allowed = re.findall(r"'([^']*)'", context["expected_tags"])
        path, name = (*path, "kind"), f"{name}.kind"
        message = f"{context['tag']!r} is not allowed{_nearest(context['tag'], allowed)}"
    elif kind == "union_tag_not_found":
        message = "missing `kind`"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = f"must be a mapping of options, got {given!r}"
    elif kind == "value_error":
        message = str(context["error"])
    elif kind in ("tuple_type", "list_type"):
        message = f"must be a list, got {given!r}"
    else:
        message = details["msg"][0].lower() + details["msg"][1:]
        if not isinstance(given, dict | list):
            message += f", got {given!r}"
    return f"{_place(path, places, fallback)}: {name}: {message}"


def _nearest(given: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {close[0]}?" if close else f"; allowed: {', '.join(allowed)}"


def _without_tags(location: KeyPath, tree: Any) -> KeyPath:
    """The path of keys in an error's location, which also names the chosen member of each union."""
    path: list[str | int] = []
    is_entered = True  # whether the tag of the node has been passed
    for number, part in enumerate(location):
        if isinstance(part, str) and part.startswith("("):
            continue  # a tag of `ByShape`
        last = number == len(location) - 1
        if not is_entered and isinstance(tree, dict) and tree.get("kind") == part and not last:
            is_entered = True  # also where an option has the name of the kind
            continue
        child = _at(tree, (part,))
        if child is not None:
            tree, is_entered = child, False
        elif not last or part == "[key]":
            continue
        path.append(part)
    return tuple(path)


def _options(node: type[BaseModel], location: KeyPath) -> list[str]:
    """Names of the fields that exist at a location of the tree."""
    annotation: Any = node
    for part in location:
        members = list(_models(annotation))
        tagged = [m for m in members if len(members) > 1 and _tag(m) == part]
        fields = [m.model_fields[part] for m in members if part in m.model_fields]
        if tagged:
            annotation = tagged[0]
        elif fields:
            annotation = fields[0].annotation
    return [name for model in _models(annotation) for name in model.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every configuration node in a type: itself, members of a union, items of a container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        arguments = get_args(annotation)
        for argument in arguments[:1] if get_origin(annotation) is Annotated else arguments:
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> Any:
    kind = model.model_fields.get("kind")
    return kind.default if kind else None
