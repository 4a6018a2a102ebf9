"""Is an answer true to the description? The check that every target passes before anything learns from it.

In: an answer, the prompt it answers, the clip's attributes. Out: "ok" or the reason why not.
An answer must name what it was asked for, must not contradict anything that is known of the clip, and must have the form
that the prompt demands. Where a person wrote question and answer, what counts is that the person's answer is still in it.
"""

from __future__ import annotations

import json
import re
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
            if f" {normalise_text(str(attributes[name]))} " not in f" {normalise_text(answer)} ":
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
    return breaks_format(answer, prompt.format) or "ok"


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
        if match.value != str(attributes[name]):
            return f"contradicts {name}"
    return "ok"


def breaks_format(answer: str, wanted: Mapping[str, Any]) -> str | None:
    """Why an answer has not the form that a prompt demands (see `prompts.FORMATS`), None when it has."""
    text = answer.strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bullets = [line for line in lines if re.match(r"(?:[-*•]|\d+[.)])\s+\S", line)]
    letters = "".join(filter(str.isalpha, text))
    for name, value in wanted.items():
        held = {
            "words_at_most": lambda limit: len(text.split()) <= limit,
            "sentences": lambda count: len(re.findall(r"[.!?]+(?=[\s\"”']|$)", text)) == count,
            "bullets": lambda count: len(bullets) == count == len(lines),
            "lines": lambda count: len(lines) == count,
            "case": lambda case: letters == getattr(letters, case)(),
            "starts_with": text.startswith,
            "ends_with": text.endswith,
        }[name](value)
        if not held:
            return f"breaks the form ({name.replace('_', ' ')})"
    return None


# An answer of a person of so many words is a label, and must survive word for word; a longer one may be put otherwise.
LABEL_WORDS = 4


def loses(answer: str, human: str, choices: Sequence[str] = ()) -> str | None:
    """Why `answer` does not say what a person's answer says, None when it does; `Extract(ỹ) = y` of 2402.13669.

    `choices`: the answers that people gave in the data, when they are a choice among few; then the answer must name this
    one and no other. Else a label must be in it, and of a longer answer every number and every name within a sentence.
    """
    if 1 < len(choices) <= MAX_OPTIONS and human in choices:
        match = match_option(answer, list(choices))
        return None if match.value == human else "drops the human answer" if match.value is None else "contradicts the human answer"  # fmt: skip
    said = f" {normalise_text(answer)} "
    if len(human.split()) <= LABEL_WORDS:
        return None if f" {normalise_text(human)} " in said else "drops the human answer"
    inner = re.findall(r"(?<![.!?:])\s[\"'(]?([A-Z][\w-]+|\d[\d.,:]*)", human)
    for piece in [*re.findall(r"^\d[\d.,:]*", human), *inner]:
        if piece != "I" and f" {normalise_text(piece)} " not in said:
            return f"drops {piece.rstrip('.,:')!r} of the human answer"
    return None
