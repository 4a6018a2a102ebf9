"""Reading a recipe's YAML so that every mistake can be told with its file and line.

In: a YAML file and `--set a.b=c` overrides. Out: one dictionary, and `Source`, which knows on which line (or in which
`--set`) each key stands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speech_llm.errors import UserError
from speech_llm.files import explain_os_error

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `1e-3` as a number, as YAML 1.2 does (PyYAML wants `1.0e-3`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class Source:
    """Where the keys of a recipe were written.

    `lines`: dotted path of each key (list items by index) -> its 1-based line. `overrides`: `(path, argument)` of each
    `--set`, in the order given.
    """

    path: Path
    lines: dict[Key, int] = field(default_factory=dict)
    overrides: list[tuple[Key, str]] = field(default_factory=list)

    def where(self, key: Key) -> str:
        """The place of a key as a message begins: `--set a.b=c`, or `recipes/x.yaml, line 12`."""
        argument = self.overridden(key)
        if argument is not None:
            return f"--set {argument}"
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return f"{self.path}, line {self.lines[key[:length]]}"
        return str(self.path)

    def overridden(self, key: Key) -> str | None:
        """The `--set` argument that gave a key or part of it; None when the file did."""
        for path, argument in reversed(self.overrides):
            if key[: len(path)] == path or path[: len(key)] == key:
                return argument
        return None

    def within(self, part: Key) -> Source:
        """Where keys stand that one part of the file (a phase) may give instead of the whole."""
        inner = {key[len(part) :]: line for key, line in self.lines.items() if key[: len(part)] == part}
        given = [(key[len(part) :], told) for key, told in self.overrides if key[: len(part)] == part]
        return Source(self.path, {**self.lines, **inner}, [*self.overrides, *given])

    def line(self, key: Key) -> int:
        """The line of a key, or of the section it is in; 0 for one that `--set` gave."""
        return next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), 0)


def read_recipe_file(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Source]:
    """The recipe's dictionary with the overrides applied, and where its keys stand.

    Raises `UserError`: no such file, not YAML, not a mapping, a key given twice, a `--set` that is not `a.b=c`.
    """
    source = Source(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_similar(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not a text file; a recipe is YAML") from None
    except OSError as error:
        raise explain_os_error(error, path) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: a recipe is YAML with keys such as 'name', 'model' and 'data'")
        _note_lines(node, (), source)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise UserError(
            f"{path}{line}: this is not YAML ({said}); check indentation, colons and quotes"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: this is not YAML ({' '.join(str(error).split())})") from None
    for argument in overrides:
        _apply(data, argument, source)
    return data, source


def _similar(path: Path) -> str:
    """` (in recipes: a.yaml, b.yaml)` when the folder has recipes under other names."""
    names = sorted(item.name for item in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f" (in {path.parent}: {', '.join(names[:8])})" if names else ""


def _note_lines(node: yaml.Node, key: Key, source: Source) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            inner = (*key, str(name.value))
            line = name.start_mark.line + 1
            if inner in source.lines:
                raise UserError(
                    f"{source.path}, line {line}: the key {name.value!r} was already given on line {source.lines[inner]}"
                )
            source.lines[inner] = line
            _note_lines(value, inner, source)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item = (*key, index)
            source.lines[item] = value.start_mark.line + 1
            _note_lines(value, item, source)


def _apply(data: dict[str, Any], argument: str, source: Source) -> None:
    """Set one key of the dictionary from `a.b=c`; the value is read as YAML."""
    dotted, equals, text = argument.partition("=")
    key = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(key):
        raise UserError(f"--set {argument}: expected KEY=VALUE, for example --set optimizer.lr=0.001")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {argument}: {text!r} is not a YAML value; put it in quotes") from None
    place: Any = data
    for depth, name in enumerate(key[:-1], start=1):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise UserError(
                f"--set {argument}: {'.'.join(key[:depth])} is {place!r}, which has no keys inside"
            )
    place[key[-1]] = value
    source.overrides.append((key, argument))
