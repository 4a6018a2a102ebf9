"""What is wrong with a recipe, as one sentence; and what its keys mean.

In: what the schema check found, and where each key was written. Out: a sentence that names file and line (or the
`--set`), the key, what stands there and what is expected.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from speech_llm.errors import nearest
from speech_llm.recipe_file import Key, Source

# Known from the design but not built yet, so that asking for one is told apart from a slip of the pen.
PLANNED: dict[str, tuple[str, ...]] = {
    "trainable": ("encoder",),
}


_EXPECTED = {
    "string_type": "a text (put it in quotes)",
    "string_too_short": "a text that is not empty",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list, as in [a, b]",
    "dict_type": "keys and values, as in {a: b}",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "union_tag_not_found": "a section that says its type, as in {type: ...}",
    "plain": "a text, a number, true or false (or a list of them)",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-'",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def sentence(error: ValidationError, source: Source, root: type[BaseModel]) -> str:
    """The first mistake in the file as one sentence; unknown keys first, as they often explain the others."""
    details = error.errors(include_url=False)

    def order(item: ErrorDetails) -> tuple[bool, int]:
        return item["type"] != "extra_forbidden", source.line(_key(item, root, source))

    more = len(details) - 1
    return _one_sentence(min(details, key=order), root, source) + (f" ({more} more to mend)" if more else "")


def _one_sentence(item: ErrorDetails, root: type[BaseModel], source: Source) -> str:
    key, kind, value = _key(item, root, source), item["type"], item["input"]
    where, name, section = source.where(key), _dotted(key), _dotted(key[:-1])
    context: dict[str, Any] = item.get("ctx") or {}
    model = _section_at(item["loc"][:-1], root)
    if kind == "contradiction":
        return f"{where}: {item['msg']}"
    if kind == "describer":
        return f"{where}: {name}: {item['msg']}"
    if kind == "extra_forbidden":
        known = list(model.model_fields) if model is not None else []
        inside = f" in {section}" if section else ""
        if str(key[-1]) in PLANNED.get(section, ()):
            return f"{where}: {name} is not implemented yet; implemented{inside}: {', '.join(known) or '{}'}"
        hint = nearest(str(key[-1]), known)
        hint = hint or (
            f" Known: {', '.join(known)}." if known else f" {section} has no keys yet: write {{}}."
        )
        return f"{where}: unknown key {key[-1]!r}{inside}.{hint}"
    if kind == "missing":
        info = model.model_fields.get(str(key[-1])) if model is not None else None
        meaning = f" ({info.description})" if info is not None and info.description else ""
        return f"{where}: the key {name!r} is missing{meaning}"
    if kind == "union_tag_invalid":
        name, value = f"{name}.{context['discriminator'].strip(chr(39))}", context["tag"]
        return f"{where}: {_not_among(name, value, context['expected_tags'])}"
    if kind == "literal_error" and item["loc"][-1] == "[key]":
        return (
            f"{where}: unknown key {key[-1]!r} in {section}; expected one of {_choices(context['expected'])}"
        )
    if kind == "literal_error":
        return f"{where}: {_not_among(name, value, context['expected'])}"
    expected = _EXPECTED.get(kind, item["msg"])
    for bound, words in _BOUNDS.items():
        if bound in context:
            expected = f"{words} {context[bound]:g}"
    return f"{where}: {name} is {value!r}; expected {expected}"


def _not_among(name: str, value: Any, expected: str) -> str:
    choices = _choices(expected)
    if isinstance(value, str) and value in PLANNED.get(name, ()):
        return f"{name} is {value!r}, which is not implemented yet; implemented: {choices}"
    hint = nearest(value, choices.split(", ")) if isinstance(value, str) else ""
    return f"{name} is {value!r}; expected {'one of ' if ',' in choices else ''}{choices}" + (
        hint and f".{hint}"
    )


def _choices(expected: str) -> str:
    """Pydantic's `'a', 'b' or 'c'` as `a, b, c`."""
    return expected.replace(" or ", ", ").replace("'", "")


def _dotted(key: Key) -> str:
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, key)))


def _key(item: ErrorDetails, root: type[BaseModel], source: Source) -> Key:
    """The key an error is about, as it is written in the file.

    Pydantic's location has two kinds of parts that the file has not: the type of a section that comes in several types
    (a connector), and `[key]` after a wrong key of a free dictionary.
    """
    if item["type"] == "contradiction":
        keys: list[Key] = [tuple(key.split(".")) for key in item["ctx"]["keys"]]
        return next((key for key in keys if source.overridden(key)), keys[0])
    out: list[str | int] = []
    options: list[type[BaseModel]] = [root]
    for part in item["loc"]:
        if len(options) > 1 and not isinstance(part, int):
            options = [option for option in options if _type_of(option) == part]
            continue
        out.append(part)
        if isinstance(part, int):  # an item of a list of sections
            continue
        fields = options[0].model_fields if options else {}
        options = _sections_in(fields[str(part)].annotation) if part in fields else []
    return tuple(out[:-1] if out and out[-1] == "[key]" else out)


def _section_at(location: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that stands at a location, None where there is a value or a free dictionary."""
    options: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            continue
        if len(options) > 1:
            options = [option for option in options if _type_of(option) == part]
            continue
        if isinstance(part, int):
            continue
        fields = options[0].model_fields if options else {}
        options = _sections_in(fields[str(part)].annotation) if part in fields else []
    return options[0] if options else None


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's type may hold: `Synthesize | None` -> [Synthesize], `list[Phase]` -> [Phase]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list):
        return [model for part in get_args(annotation) for model in _sections_in(part)]
    return []


def _type_of(section: type[BaseModel]) -> str:
    """Which type of a several-typed section this is: the one value that its `type` may have."""
    return str(get_args(section.model_fields["type"].annotation)[0])


def describe_keys(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a recipe as `(dotted key, default, what it means)`, in the order of the file."""
    for name, info in root.model_fields.items():
        inner = _sections_in(info.annotation)
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        values = f" ({' | '.join(map(str, choices))})" if len(choices) > 1 else ""
        default = (
            "(required)" if info.is_required() else _as_yaml(info.get_default(call_default_factory=True))
        )
        yield f"{prefix}{name}", default, f"{info.description or ''}{values}"
        for section in inner:
            kind = f"[type={_type_of(section)}]" if len(inner) > 1 else ""
            yield from describe_keys(section, f"{prefix}{name}{kind}.")


def _as_yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
