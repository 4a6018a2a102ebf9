"""One number out of a free answer, or none: for tasks whose label is a number.

"It is about 3.5 out of 5." -> 3.5; "twenty-one years" -> 21; "between 3 and 4" -> None, since it names two.
"""

from __future__ import annotations

import re

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_TENS_AND_UNITS = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b", re.IGNORECASE)
_WORD = re.compile(rf"\b({'|'.join(sorted(_WORDS, key=len, reverse=True))})\b", re.IGNORECASE)
# Digits inside a name ("MP3", "v2") are no numbers; a thousands' comma is none of its own.
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])(?!\.\d)", re.IGNORECASE
)
# "3.5 out of 5", "3.5/5": the scale is not the answer. "scale of 1 to 5", "from 1 to 5" before or after it.
_SCALE = re.compile(
    r"(?:\bout of(?: an?)?|/)\s*\d+(?:\.\d+)?|\b(?:on|in|of)?\s*(?:a |the )?(?:scale|range)\s*(?:of|from|between)?\s*[-+]?\d+(?:\.\d+)?"
    r"\s*(?:to|and|-|–)\s*[-+]?\d+(?:\.\d+)?",
    re.IGNORECASE,
)


# "two hundred and five", "3.5 thousand": a part of it would be another number. Beyond thousands nothing is read.
_PART = rf"(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+(?:\.\d+)?)"
_LARGE = re.compile(
    rf"\b(?:{_PART}[- ]+)*(?:hundred|thousand)\b(?:[- ]+(?:and[- ]+)?(?:{_PART}|hundred|thousand)\b)*",
    re.IGNORECASE,
)
_NOT_READ = re.compile(r"\b(?:hundreds|thousands|millions?|billions?|dozens?)\b", re.IGNORECASE)


def _large(hit: re.Match[str]) -> str:
    """A number with "hundred" or "thousand" in it, as digits; of what must be two ("one hundred and two hundred") two unlike ones."""
    total = current = 0.0
    for word in re.split(r"[- ]+", hit[0].lower()):
        if (word == "hundred" and current >= 100) or (word == "thousand" and total):
            return "0 1"
        if word == "hundred":
            current = max(current, 1.0) * 100
        elif word == "thousand":
            total, current = total + max(current, 1.0) * 1000, 0.0
        elif word != "and":
            current += _WORDS[word] if word in _WORDS else float(word)
    return f"{total + current:g}" if total + current < 1e5 else f"{total + current:.0f}"


def read_number(answer: str) -> float | None:
    """The one number that an answer gives; None when it gives none or several different ones."""
    if _NOT_READ.search(answer):
        return None
    text = _SCALE.sub(" ", _LARGE.sub(_large, answer.replace("−", "-")))
    text = _TENS_AND_UNITS.sub(lambda hit: str(_WORDS[hit[1].lower()] + _WORDS[hit[2].lower()]), text)
    found = [float(hit.replace(",", "")) for hit in _NUMBER.findall(text)]
    if not found:  # words count only where there are no digits: "one of them says 5"
        found = [float(_WORDS[hit.lower()]) for hit in _WORD.findall(text)]
    return found[0] if len(set(found)) == 1 else None
