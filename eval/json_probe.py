"""Does an answer keep to JSON? Strict parse, parse after repair, the right schema and the right answer, told apart.

A missing brace is a stop-token defect, a fence is a habit, prose is a forgotten format: reporting them as one number
would call all three "forgot JSON" (METHODS: 79 of 89 failures of a published model were one missing brace).

In: answers, with what was asked (a `Wording`) and the label. Out: rates of the four levels as series (`json_series`), and how
often format and answer were right together, alone, or not at all (`grid`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from eval.matching import match_option
from eval.stats import Rate, rate

LEVELS = ("strict", "repaired", "schema", "answer")


@dataclass(frozen=True)
class Wording:
    """One way of asking for JSON. `{name}` in `text`, `key` and `path` is the attribute asked for.

    `path`: where the answer lies in the object, keys and places of lists. `also`: further properties that must be there, by
    their JSON schema; nothing else may be.
    """

    id: str
    text: str
    path: tuple[str | int, ...]
    also: tuple[tuple[str, str], ...] = ()

    def prompt(self, name: str) -> str:
        """The question about an attribute, e.g. "gender"."""
        return self.text.replace("{name}", name)

    def keys(self, name: str) -> tuple[str | int, ...]:
        """Where the answer about an attribute lies."""
        return tuple(key.replace("{name}", name) if isinstance(key, str) else key for key in self.path)

    def schema(self, name: str) -> dict[str, Any]:
        """The JSON schema that an answer about an attribute must satisfy."""
        inner: dict[str, Any] = {"type": "string"}
        keys = self.keys(name)
        for depth in range(len(keys) - 1, -1, -1):
            key = keys[depth]
            if isinstance(key, int):
                inner = {"type": "array", "items": inner, "minItems": key + 1, "maxItems": key + 1}
                continue
            properties = {key: inner}
            if depth == 0:
                properties |= {other: {"type": kind} for other, kind in self.also}
            inner = {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        return inner


PLAIN = Wording(
    "plain", 'Tell me the {name} of the speaker. Answer in JSON with the key "answer".', ("answer",)
)
# Keys, shapes and words that no target asks for.
OTHER_WORDINGS = (
    Wording("result", 'Give the {name} of the speaker as a JSON object with the key "result".', ("result",)),
    Wording(
        "value",
        'What is the {name} of the speaker? Reply with one JSON object that has one key, "value", and nothing else.',
        ("value",),
    ),
    Wording("own-key", 'Write a JSON object with the key "{name}": the {name} of the speaker.', ("{name}",)),
    Wording(
        "label",
        'Return only {"label": "..."} with the {name} of the speaker in place of the dots.',
        ("label",),
    ),
    Wording(
        "nested",
        'Fill in this JSON about the speaker and return it: {"speaker": {"{name}": "..."}}',
        ("speaker", "{name}"),
    ),
    Wording(
        "two-keys",
        'Answer in JSON with the keys "answer", the {name} of the speaker, and "confidence", a number from 0 to 1.',
        ("answer",),
        (("confidence", "number"),),
    ),
    Wording(
        "list",
        'Answer in JSON with the key "answers": a list that holds the {name} of the speaker.',
        ("answers", 0),
    ),
)


@dataclass(frozen=True)
class JsonScore:
    """`strict`: the stripped answer is a JSON object. `repaired`: it is one after repair. `schema`: it satisfies the schema.
    `answer`: its value at the wording's place names the label. `named`: the answer names the label, in JSON or not."""

    strict: bool
    repaired: bool
    schema: bool
    answer: bool
    named: bool


def parse_strict(answer: str) -> dict[str, Any] | None:
    """The object, if the stripped answer is nothing but one."""
    try:
        value = json.loads(answer.strip())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_repaired(answer: str) -> dict[str, Any] | None:
    """The object after taking off fences and surrounding text, closing braces, and mending quotes and commas."""
    text = re.sub(r"```(?:json)?", "", answer.strip(), flags=re.IGNORECASE).strip()
    start = text.find("{")
    if start < 0:
        return None
    text = text[start:]
    end = text.rfind("}")
    for candidate in ([text[: end + 1]] if end >= 0 else []) + [text]:
        for mended in (candidate, candidate.replace("'", '"')):
            mended = re.sub(r",\s*([}\]])", r"\1", mended)
            for closing in ("", "}", '"}', "}}", '"}}'):
                found = parse_strict(mended.rstrip(" ,\n") + closing)
                if found is not None:
                    return found
    return None


def score_json(
    answer: str,
    schema: Mapping[str, Any],
    *,
    label: str,
    options: Sequence[str],
    synonyms: Mapping[str, Sequence[str]] | None = None,
    path: Sequence[str | int] = ("answer",),
) -> JsonScore:
    """Score one answer; `schema` is a JSON schema that the object must satisfy, `path` where its answer lies."""
    strict = parse_strict(answer)
    value = strict if strict is not None else parse_repaired(answer)
    if value is None:
        named = match_option(answer, options, synonyms).value == label
        return JsonScore(False, False, False, False, named)
    fits = jsonschema.Draft202012Validator(dict(schema)).is_valid(value)
    # Of an object only what it says counts, not its keys ("gender" names no gender, but "female" as a key would).
    said = _at(value, path) if fits else " ".join(_leaves(value))
    named = match_option(str(said), options, synonyms).value == label
    return JsonScore(strict is not None, True, fits, fits and named, named)


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [str(value)]


def json_series(scores: Sequence[JsonScore], name: str) -> dict[str, Rate]:
    """`{"NAME strict": rate, ...}` of the four levels, each with n and a 95 % interval."""
    return {
        f"{name} {level}": rate(sum(getattr(score, level) for score in scores), len(scores))
        for level in LEVELS
    }


def grid(scores: Sequence[JsonScore]) -> dict[str, int]:
    """How often the format (strict JSON that satisfies the schema) and the answer were right: both, one alone, neither."""
    cells = {"both": 0, "format only": 0, "answer only": 0, "neither": 0}
    for score in scores:
        form = score.strict and score.schema
        name = "both" if form and score.named else "format only" if form else "answer only"
        cells[name if form or score.named else "neither"] += 1
    return cells
