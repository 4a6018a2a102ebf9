"""Reading an answer by rule: which option does it name, if exactly one?

In: a free answer, the options, other words for them. Out: a `Match` with the option, or the reason why there is none.
Naming two options is no answer, a negated option is no answer, and nothing is ever guessed. Text in double quotes is what
somebody said, not what the answer says, and is passed over unless the whole answer is quoted.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reason = str  # "ok" | "none" | "several" | "negated" | "refused"

_QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»')
# A negation reaches over a few words to the option behind it: "not a female", "isn't really male", "no Scottish accent".
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|can't|without|isn't|aren't|wasn't|doesn't|don't|didn't|rather than|instead of|"
    r"other than|anything but|unlike)\W+(?:(?:a|an|the|at|any|of|really|very|exactly|quite|in|with|have|has|sound|sounds|speak|"
    r"speaking|be|being|by|is|is a|particularly|necessarily|definitely|like|from)\W+){0,4}$",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am)? (?:can't|cannot|can not|am unable|unable|am not able|not able|do not|don't) (?:to )?"
    r"(?:hear|listen|tell|determine|identify|know|have access|process|answer|say)|"
    r"(?:unknown|unclear|impossible to (?:tell|say|know)|cannot be determined|not possible to))\b",
    re.IGNORECASE,
)
# Weak evidence, used only where no option is named: the pronoun of the speaker.
_PRONOUNS = {"female": r"\b(?:she|her|hers|herself)\b", "male": r"\b(?:he|his|him|himself)\b"}


@dataclass(frozen=True)
class Match:
    """The one option that an answer names, or None and the reason: none, several, negated, refused."""

    value: str | None
    reason: Reason

    def __bool__(self) -> bool:
        return self.value is not None


@functools.lru_cache(maxsize=4096)
def _pattern(word: str) -> re.Pattern[str]:
    """A whole-word pattern: "female" does not contain "male", "slow" does not match "slowest one" by accident."""
    flexible = re.sub(
        r"[\s_-]+", r"[\\s_-]+", re.escape(word.strip()).replace(r"\ ", " ").replace(r"\-", "-")
    )
    return re.compile(rf"(?<![\w-]){flexible}(?:'s|s'|’s)?(?![\w-])", re.IGNORECASE)


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("`", "'")
    return re.sub(r"[*_#]+", "", text).strip()


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):  # an answer in JSON says what its values say
        return " , ".join(str(part) for part in value.values())
    stripped = text.strip(" .!?")
    if _QUOTED.fullmatch(stripped):
        return stripped.strip('"“”«»')
    without = _QUOTED.sub(" ", text)
    # An opening quote that was never closed (an answer cut short) quotes the rest.
    return re.sub(r'["“«].*$', " ", without, flags=re.DOTALL)


def match_option(
    answer: str, options: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> Match:
    """The option of `options` that `answer` names by itself or by one of its `synonyms`.

    A longer option wins over a shorter one inside it ("New Zealand English" over "English"). Reasons: "none" named,
    "several" named, the only ones named are "negated", or the answer "refused" to say.
    """
    text = _unquoted(_clean(answer))
    # A letter option ("A", "b)") must stand alone: as a word it is an article.
    found: dict[str, list[tuple[int, int]]] = {}
    for option in options:
        words = [option, *((synonyms or {}).get(option) or [])]
        spans = [hit.span() for word in words if word.strip() for hit in _hits(word, text)]
        if spans:
            found[option] = spans
    every = [(span, option) for option, spans in found.items() for span in spans]
    kept = [
        (span, option)
        for span, option in every
        if not any(
            other != span and other[0] <= span[0] and span[1] <= other[1] and name != option
            for other, name in every
        )
    ]
    named = {option for span, option in kept if not _NEGATION.search(text[: span[0]])}
    negated = {option for _, option in kept} - named
    if len(named) == 1:
        (value,) = named
        also_denied = any(option == value and _NEGATION.search(text[: span[0]]) for span, option in kept)
        return Match(None, "several") if also_denied else Match(value, "ok")
    if len(named) > 1:
        return Match(None, "several")
    if negated:
        return Match(None, "negated")
    if _REFUSAL.search(text):
        return Match(None, "refused")
    if {"female", "male"} <= {option.casefold() for option in options}:
        spoken = [name for name, pattern in _PRONOUNS.items() if re.search(pattern, text, re.IGNORECASE)]
        if len(spoken) == 1:
            return Match(next(o for o in options if o.casefold() == spoken[0]), "ok")
    return Match(None, "none")


def _hits(word: str, text: str) -> list[re.Match[str]]:
    if len(word) == 1 and word.isalpha():
        alone = re.compile(
            rf"^\W*{re.escape(word)}\W*(?:$|[).:]\s)|\((?:{re.escape(word)})\)|\b(?:option|answer is)\W+{re.escape(word)}\b",
            re.IGNORECASE,
        )
        return list(alone.finditer(text))
    return list(_pattern(word).finditer(text))


def spoken_words(answer: str) -> str:
    """The words that an answer says were spoken: what it quotes, else what follows "says:", else the whole answer."""
    text = answer.strip()
    quoted = [piece.strip('"“”«»') for piece in _QUOTED.findall(text)]
    if quoted:
        return " ".join(quoted).strip()
    opened = re.search(r'["“«](.+)$', text, re.DOTALL)
    if opened:
        return opened.group(1).strip()
    told = re.search(
        r"\b(?:says|said|saying|states|words are|words spoken are|sentence is)\b\s*[:,]?\s*(.+)$",
        text,
        re.DOTALL | re.IGNORECASE,
    )
    return (told.group(1) if told else text).strip()


def word_errors(reference: str, said: str) -> int:
    """Substitutions, deletions and insertions of blank-separated units (jiwer); of nothing said, all of the reference's."""
    if not reference or not said:
        return len(reference.split()) + len(said.split())
    import jiwer

    found = jiwer.process_words(reference, said)
    return int(found.substitutions + found.deletions + found.insertions)


@functools.lru_cache(maxsize=1)
def _normaliser() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


@functools.lru_cache(maxsize=65536)
def normalise_text(text: str) -> str:
    """Whisper's English normaliser (Radford et al. 2022, appendix C): case, punctuation, contractions, numbers."""
    return str(_normaliser()(text)).strip()
