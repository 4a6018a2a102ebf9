"""Prompt pools: what is asked about a clip, what a good answer names, and how the worked example answers.

In: a YAML file with a list `prompts`. Out: checked `PoolPrompt` objects.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speech_llm.errors import UserError, nearest
from speech_llm.files import explain_os_error

_KEYS = ("id", "text", "asks", "example", "json", "seen", "kind", "format")
KINDS = ("open", "attribute", "reasoning", "writing", "format")
# What a prompt may demand of an answer's form, and the type of its value; `verify.breaks_format` checks it.
FORMATS: dict[str, type] = {
    "words_at_most": int, "sentences": int, "bullets": int, "lines": int, "case": str, "starts_with": str, "ends_with": str,
}  # fmt: skip


@dataclass(frozen=True)
class PoolPrompt:
    """One prompt of a pool.

    `asks`: the attributes that a good answer names. `example`: the answer of the worked example shown to the
    teacher, with `{attribute}`, `{a_attribute}` or `{an_attribute}` (with its article) as fields. `json_keys`: key ->
    attribute of an answer that must be JSON. `seen`: in an evaluation pool, whether its words were trained on.
    `kind`: what sort of prompt it is (one of `KINDS`). `format`: what the answer's form must be (see `FORMATS`).
    """

    id: str
    text: str
    asks: tuple[str, ...]
    example: str | None = None
    json_keys: Mapping[str, str] = field(default_factory=dict)
    seen: bool | None = None
    kind: str | None = None
    format: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False

    def example_answer(self, attributes: Mapping[str, Any]) -> str:
        """The worked example's answer for a clip with these attributes."""
        fields: dict[str, str] = {}
        for name, value in attributes.items():
            text = str(value)
            fields[name] = text
            fields[f"a_{name}"] = fields[f"an_{name}"] = (
                f"{'an' if text[:1].lower() in 'aeiou' else 'a'} {text}"
            )
        return (self.example or "").format_map(fields)

    def example_fields(self) -> set[str]:
        """The attributes that the worked example needs."""
        names = {name for _, name, _, _ in string.Formatter().parse(self.example or "") if name}
        return {name.removeprefix("an_").removeprefix("a_") for name in names}


def load_pool(path: Path) -> list[PoolPrompt]:
    """Read and check a pool; every mistake is a `UserError` that names file and prompt."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt pool") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML in UTF-8 ({error})") from None
    except OSError as error:
        raise explain_os_error(error, path) from error
    rows = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list under the key 'prompts'")
    pool: list[PoolPrompt] = []
    ids: set[str] = set()
    texts: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, prompt {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected keys {', '.join(_KEYS)}")
        for key in row:
            if key not in _KEYS:
                raise UserError(f"{where}: unknown key {key!r}.{nearest(str(key), list(_KEYS))}")
        text, name = str(row.get("text") or "").strip(), str(row.get("id") or "").strip()
        if not text or not name:
            raise UserError(f"{where}: a prompt needs an 'id' and a 'text'")
        asks = row.get("asks")
        if not isinstance(asks, list) or not all(isinstance(ask, str) for ask in asks):
            raise UserError(f"{where} ({name}): 'asks' must be a list of attribute names (it may be empty)")
        if name in ids:
            raise UserError(f"{where}: the id {name!r} is used twice")
        if text in texts:
            raise UserError(f"{where} ({name}): the same text as prompt {texts[text]!r}")
        ids.add(name)
        texts[text] = name
        if not isinstance(row.get("example") or "", str):
            raise UserError(
                f"{where} ({name}): 'example' must be a text; put one that begins with {{ in quotes"
            )
        keys = row.get("json") or {}
        if not isinstance(keys, dict) or not all(
            isinstance(part, str) for pair in keys.items() for part in pair
        ):
            raise UserError(
                f"{where} ({name}): 'json' must name the attribute of each key, as in {{answer: gender}}"
            )
        if not isinstance(row.get("seen"), (bool, type(None))):
            raise UserError(f"{where} ({name}): 'seen' must be true or false")
        kind = row.get("kind")
        if kind is not None and kind not in KINDS:
            raise UserError(
                f"{where} ({name}): 'kind' is {kind!r}; expected one of {', '.join(KINDS)}.{nearest(str(kind), list(KINDS))}"
            )
        prompt = PoolPrompt(
            name,
            text,
            tuple(asks),
            row.get("example"),
            dict(keys),
            row.get("seen"),
            kind,
            _format(row.get("format"), f"{where} ({name})"),
        )
        try:
            prompt.example_answer(dict.fromkeys(prompt.example_fields(), "x"))
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{where} ({name}): 'example' has a malformed field ({error})") from None
        pool.append(prompt)
    return pool


def _format(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: 'format' must name what the answer's form must be: {', '.join(FORMATS)}")
    for key, wanted in value.items():
        if key not in FORMATS:
            raise UserError(f"{where}: unknown key {key!r} in 'format'.{nearest(str(key), list(FORMATS))}")
        if type(wanted) is not FORMATS[key] or (key == "case" and wanted not in ("lower", "upper")):
            expected = (
                "lower or upper"
                if key == "case"
                else f"a {'whole number' if FORMATS[key] is int else 'text'}"
            )
            raise UserError(f"{where}: format.{key} is {wanted!r}; expected {expected}")
    return dict(value)
