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
    r"(?:\bout of|/)\s*\d+(?:\.\d+)?|\b(?:on|in|of)?\s*(?:a |the )?(?:scale|range)\s*(?:of|from|between)?\s*[-+]?\d+(?:\.\d+)?"
    r"\s*(?:to|and|-|–)\s*[-+]?\d+(?:\.\d+)?",
    re.IGNORECASE,
)


def read_number(answer: str) -> float | None:
    """The one number that an answer gives; None when it gives none or several different ones."""
    text = _SCALE.sub(" ", answer.replace("−", "-"))
    text = _TENS_AND_UNITS.sub(lambda hit: str(_WORDS[hit[1].lower()] + _WORDS[hit[2].lower()]), text)
    found = [float(hit.replace(",", "")) for hit in _NUMBER.findall(text)]
    if not found:  # words count only where there are no digits: "one of them says 5"
        found = [float(_WORDS[hit.lower()]) for hit in _WORD.findall(text)]
    return found[0] if len(set(found)) == 1 else None
