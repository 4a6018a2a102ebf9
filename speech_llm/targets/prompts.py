"""Prompt pools: what is asked about a clip, what a good answer names, and how the worked example answers.

In: a YAML file with a list `prompts`. Out: checked `Prompt` objects.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from speech_llm.errors import UserError, nearest

_KEYS = ("id", "text", "asks", "example", "json", "seen")


@dataclass(frozen=True)
class PoolPrompt:
    """One prompt of a pool.

    `asks`: the attributes that a good answer names. `example`: the answer of the worked example shown to the
    teacher, with `{attribute}`, `{a_attribute}` or `{an_attribute}` (with its article) as fields. `json_keys`: key ->
    attribute of an answer that must be JSON. `seen`: in an evaluation pool, whether its words were trained on.
    """

    id: str
    text: str
    asks: tuple[str, ...]
    example: str | None = None
    json_keys: Mapping[str, str] = field(default_factory=dict)
    seen: bool | None = None

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
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error})") from None
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
        prompt = PoolPrompt(
            name, text, tuple(asks), row.get("example"), dict(row.get("json") or {}), row.get("seen")
        )
        try:
            prompt.example_answer(dict.fromkeys(prompt.example_fields(), "x"))
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{where} ({name}): 'example' has a malformed field ({error})") from None
        pool.append(prompt)
    return pool
