"""Does an answer keep to JSON? Strict parse, parse after repair, right keys and right answer, told apart.

A missing brace is a stop-token defect, a fence is a habit, prose is a forgotten format: reporting them as one number
would call all three "forgot JSON" (METHODS: 79 of 89 failures of a published model were one missing brace).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from eval.matching import match_option
from eval.stats import wilson_interval

LEVELS = ("strict", "repaired", "keys", "answer")


@dataclass(frozen=True)
class JsonScore:
    """`strict`: the stripped answer is a JSON object. `repaired`: it is one after repair. `keys`: it satisfies the schema.
    `answer`: its value under `key` names the label."""

    strict: bool
    repaired: bool
    keys: bool
    answer: bool


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
    key: str = "answer",
) -> JsonScore:
    """Score one answer; `schema` is a JSON schema that the object must satisfy."""
    strict = parse_strict(answer)
    value = strict if strict is not None else parse_repaired(answer)
    if value is None:
        return JsonScore(False, False, False, False)
    keys = jsonschema.Draft202012Validator(dict(schema)).is_valid(value)
    right = keys and match_option(str(value.get(key, "")), options, synonyms).value == label
    return JsonScore(strict is not None, True, keys, right)


def summarise_json(scores: Sequence[JsonScore]) -> dict[str, Any]:
    """Rates of the four levels with n and 95 % intervals."""
    n = len(scores)
    counts = {level: sum(getattr(score, level) for score in scores) for level in LEVELS}
    rates = {level: round(count / n, 4) if n else None for level, count in counts.items()}
    intervals = {level: [round(x, 4) for x in wilson_interval(count, n)] for level, count in counts.items()}
    return {"n": n, **rates, "intervals": intervals}
