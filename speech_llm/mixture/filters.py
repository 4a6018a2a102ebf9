"""Is a turn that the LLM made up worth learning from? The rules that drop the rest, each with its reason.

In: a turn's text. Out: "ok" or why it is dropped. `Seen` tells turns that are (nearly) the same as an earlier one.
The rules are the ones that samples of a small LLM need: it repeats itself, wanders into other scripts, writes lists of
characters that are no language, and asks about recordings and pictures that are not there (this rule knows English only). They are made for languages with spaces between words, and for Chinese and Japanese.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

# A user's turn has so many words; shorter ones ask nothing, longer ones are mostly pasted text that drifts.
USER_WORDS = (3, 120)
# Runs of so many words, compared to find repetition within a turn and likeness between turns.
RUN_WORDS = 3
# A turn whose runs of words are this share repeated goes in circles.
MOST_REPEATED = 0.3
# Letters, digits, spaces and punctuation make up at least this share of language.
LEAST_LANGUAGE = 0.9
LEAST_LETTERS = 0.5
# Share of the letters that belong to the script of most of them (a translation may quote another).
LEAST_ONE_SCRIPT = 0.8
LONGEST_WORD = 40
# Turns that share this share of their runs of words (Jaccard) count as the same.
SAME = 0.7

# Letters, marks, numbers, punctuation, separators, signs of arithmetic and money; and what Markdown and code need.
_LANGUAGE = ("L", "M", "N", "P", "Z", "Sm", "Sc")
_SIGNS = set("\n\t\r`^|~°")
# Left-overs of a chat template: <|im_end|>, <s>, [INST], <start_of_turn>.
_TEMPLATE = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>", re.IGNORECASE)

# A request about something that a row of text alone does not have: it would teach to answer about sound that is not there.
_ABSENT = re.compile(
    r"\b(the|this|that|these|those|attached|following|above)\s+(\w+\s+)?"
    r"(audio|recordings?|sounds?|voice|images?|pictures?|photos?|photographs?|videos?|clips?|attachments?|screenshots?)\b",
    re.IGNORECASE,
)


def words_of(text: str) -> list[str]:
    """Words in small letters, without punctuation; of a script without spaces (Chinese, Japanese), its characters."""
    found: list[str] = []
    for word in re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold()):
        unspaced = any(unicodedata.name(c, "").startswith(("CJK", "HIRAGANA", "KATAKANA")) for c in word)
        found += list(word) if unspaced else [word]
    return found


def runs_of(words: list[str]) -> list[tuple[str, ...]]:
    """Every run of `RUN_WORDS` words; of a shorter turn, the whole turn."""
    return [tuple(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))]


def turn_verdict(text: str, role: str) -> str:
    """`"ok"`, or why a turn (`role`: user or assistant) is dropped; only a user's turn has bounds on its length."""
    if not text.strip():
        return "empty"
    if "�" in text or any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in text):
        return "broken characters"
    if _TEMPLATE.search(text):
        return "pieces of the chat template"
    words = words_of(text)
    if role == "user" and len(words) < USER_WORDS[0]:
        return "too short"
    if role == "user" and len(words) > USER_WORDS[1]:
        return "too long"
    if role == "user" and _ABSENT.search(text):
        return "about something that is not there"
    return _language_verdict(text, words) or _repetition_verdict(text, words) or "ok"


def _language_verdict(text: str, words: list[str]) -> str | None:
    known = sum(c in _SIGNS or unicodedata.category(c).startswith(_LANGUAGE) for c in text)
    if known < LEAST_LANGUAGE * len(text):
        return "not language"
    letters = [c for c in text if c.isalpha()]
    solid = sum(not c.isspace() for c in text)
    # "4 + 5 = 9" is a fine answer: only long turns must be made of letters.
    if len(text) > 40 and len(letters) < LEAST_LETTERS * solid:
        return "few letters"
    if any(len(word) > LONGEST_WORD for word in words):
        return "endless word"
    scripts = Counter(unicodedata.name(c, "?").split()[0] for c in letters)
    if letters and max(scripts.values()) < LEAST_ONE_SCRIPT * len(letters) and not _japanese(scripts):
        return "mixed scripts"
    return None


def _japanese(scripts: Counter[str]) -> bool:
    return set(scripts) <= {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "LATIN"} and bool(
        scripts["HIRAGANA"] or scripts["KATAKANA"]
    )


def _repetition_verdict(text: str, words: list[str]) -> str | None:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    if lines and max(Counter(lines).values()) >= 3:
        return "repeats itself"
    runs = runs_of(words)
    if len(words) >= 3 * RUN_WORDS and 1 - len(set(runs)) / len(runs) > MOST_REPEATED:
        return "repeats itself"
    return None


class Seen:
    """Turns met so far; `add` tells whether a new one is (nearly) one of them."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._with_run: dict[tuple[str, ...], list[int]] = {}

    def add(self, text: str) -> bool:
        """Whether the turn is new; if so it is remembered."""
        runs = set(runs_of(words_of(text)))
        shared: Counter[int] = Counter()
        for run in runs:
            shared.update(self._with_run.get(run, ()))
        for number, together in shared.most_common(8):
            if together >= SAME * (len(runs) + self._sizes[number] - together):
                return False
        number = len(self._sizes)
        self._sizes.append(len(runs))
        for run in runs:
            self._with_run.setdefault(run, []).append(number)
        return True
