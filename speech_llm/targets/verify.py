"""Is an answer true to the description? The check that every target passes before anything learns from it.

In: an answer, the prompt it answers, the clip's attributes. Out: "ok" or the reason why not.
An answer must name what it was asked for and must not contradict anything that is known of the clip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from describers.vocabulary import synonyms
from eval.matching import match_option, normalise_text
from speech_llm.targets.prompts import PoolPrompt

# An attribute with more values than this is free text (a transcript, a name), not a choice.
MAX_OPTIONS = 40


def closed_options(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values that each attribute takes in the data, for attributes that are a choice among few."""
    found: dict[str, dict[str, None]] = {}
    for attributes in rows:
        for name, value in attributes.items():
            if isinstance(value, str) and name != "transcript":
                found.setdefault(name, {})[value] = None
    return {name: sorted(values) for name, values in found.items() if 1 < len(values) <= MAX_OPTIONS}


def options_synonyms(attribute: str, options: Sequence[str]) -> dict[str, list[str]]:
    """Other words for each option of an attribute."""
    return {option: synonyms(attribute, option) for option in options}


def verdict(
    answer: str, prompt: PoolPrompt, attributes: Mapping[str, Any], options: Mapping[str, Sequence[str]]
) -> str:
    """`"ok"`, or why the answer is not kept: what it drops, contradicts, or gets wrong in its form."""
    if not answer.strip():
        return "empty"
    if prompt.json_keys:
        return _json_verdict(answer, prompt, attributes, options)
    for name in prompt.asks:
        if name == "transcript" or name not in options:
            if normalise_text(str(attributes[name])) not in normalise_text(answer):
                return f"drops {name}"
            continue
        match = match_option(answer, options[name], options_synonyms(name, options[name]))
        if match.value != attributes[name]:
            return f"drops {name}" if match.value is None else f"contradicts {name}"
    for name, choices in options.items():
        if name in attributes and name not in prompt.asks:
            match = match_option(answer, choices, options_synonyms(name, choices))
            if match.reason == "ok" and match.value != attributes[name]:
                return f"contradicts {name}"
    return "ok"


def _json_verdict(
    answer: str, prompt: PoolPrompt, attributes: Mapping[str, Any], options: Mapping[str, Sequence[str]]
) -> str:
    try:
        value = json.loads(answer)
    except ValueError:
        return "not JSON"
    if not isinstance(value, dict) or set(value) != set(prompt.json_keys):
        return "other JSON keys"
    for key, name in prompt.json_keys.items():
        choices = options.get(name, [str(attributes[name])])
        match = match_option(str(value[key]), choices, options_synonyms(name, choices))
        if match.value != attributes[name]:
            return f"contradicts {name}"
    return "ok"
