"""Speech-IFEval's constraints (2505.19037), each decided by rule as its authors' fork of IFEval does: strict, an empty answer fails.

In: the id of a constraint (`detectable_format:json_format`; what stands before the colon does not matter), its arguments, an answer.
Out: whether the answer keeps it. Where the fork and the original differ, the fork counts: case is not preceded by language
detection, bullets may be numbers, paragraphs are divided by `***` or line breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]


def keeps(constraint: str, arguments: Arguments, answer: str) -> bool:
    """Whether an answer keeps a constraint. Raises `ValueError` for a constraint, or arguments, that there are not."""
    name = constraint.rpartition(":")[2]
    if name not in RULES:
        raise ValueError(f"unknown constraint {constraint!r}; known: {', '.join(RULES)}")
    try:
        return bool(answer.strip()) and RULES[name](answer, arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{constraint}: its arguments {dict(arguments)} lack {error}") from None


def _json(answer: str, _: Arguments) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _quotation(answer: str, _: Arguments) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _title(answer: str, _: Arguments) -> bool:
    return any(found.strip(" <>") for found in re.findall(r"<<[^\n]+>>", answer))


def _repeats_prompt(answer: str, arguments: Arguments) -> bool:
    wanted = str(arguments["prompt_to_repeat"]).strip().strip("\"'").casefold()
    return answer.strip().strip("\"'").casefold().startswith(wanted)


def _ends_with(answer: str, arguments: Arguments) -> bool:
    return answer.strip().strip('"').casefold().endswith(str(arguments["end_phrase"]).strip().casefold())


def _bullets(answer: str, arguments: Arguments) -> bool:
    lines = answer.replace("\\n", "\n").split("\n")
    count = sum(bool(re.match(r"\s*(?:\*(?!\*)|-|•|\d)", line)) for line in lines)
    return count == int(arguments["num_bullets"])


def _has_words(answer: str, arguments: Arguments) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in arguments["keywords"])


def _lacks_words(answer: str, arguments: Arguments) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in arguments["forbidden_words"])


def _words(answer: str, arguments: Arguments) -> bool:
    return _compared(len(re.findall(r"\w+", answer)), arguments["relation"], arguments["num_words"])


def _sentences(answer: str, arguments: Arguments) -> bool:
    return _compared(count_sentences(answer), arguments["relation"], arguments["num_sentences"])


def _paragraphs(answer: str, arguments: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?|\n+", answer.strip())
    # A blank at either end is none; one between two others fails.
    while parts and not parts[0].strip():
        parts.pop(0)
    while parts and not parts[-1].strip():
        parts.pop()
    return all(part.strip() for part in parts) and len(parts) == int(arguments["num_paragraphs"])


def _compared(count: int, relation: str, wanted: int) -> bool:
    if relation == "less than":
        return count < int(wanted)
    if relation == "at least":
        return count >= int(wanted)
    raise ValueError(f"unknown relation {relation!r}; known: less than, at least")


def count_sentences(text: str) -> int:
    """Sentences as Punkt divides a text (Kiss & Strunk 2006, its English model)."""
    import punkt

    return len(punkt.sent_tokenize(text))


RULES: dict[str, Callable[[str, Arguments], bool]] = {
    "json_format": _json,
    "english_capital": lambda answer, _: answer.isupper(),
    "english_lowercase": lambda answer, _: answer.islower(),
    "quotation": _quotation,
    "title": _title,
    "repeat_prompt": _repeats_prompt,
    "end_checker": _ends_with,
    "number_bullet_lists": _bullets,
    "existence": _has_words,
    "forbidden_words": _lacks_words,
    "number_words": _words,
    "number_sentences": _sentences,
    "number_paragraphs": _paragraphs,
}
# The paper's groups of constraints.
GROUPS = {
    "english_capital": "CC",
    "english_lowercase": "CC",
    "repeat_prompt": "SE",
    "end_checker": "SE",
    "quotation": "WR",
    "title": "WR",
    "json_format": "JS",
    "number_bullet_lists": "BP",
    "existence": "KW",
    "forbidden_words": "KW",
    "number_words": "LN",
    "number_sentences": "LN",
    "number_paragraphs": "LN",
}
