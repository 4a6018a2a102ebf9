"""Wrong answers from labels: the same words with another value of an attribute.

In: a right answer and the attributes of its clip. Out: an answer that differs in one attribute and is read, by the rules that
score answers, as naming the other value. What a pair teaches is then the attribute and nothing of the wording.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from describers.vocabulary import display, synonyms
from eval.matching import match_option
from speech_llm.targets.verify import options_synonyms


def wrong_answer(
    answer: str, attributes: Mapping[str, Any], options: Mapping[str, Sequence[str]], seed: str = ""
) -> str | None:
    """`answer` with another value of one of the attributes that it names; None where it names none rightly.

    `options`: the values that each attribute may have. `seed` decides which attribute and which value.
    """
    rng = random.Random(f"{seed}-wrong")
    names = [name for name in options if attributes.get(name) in options[name]]
    rng.shuffle(names)
    for name in names:
        value = attributes[name]
        others = [option for option in options[name] if option != value]
        rng.shuffle(others)
        words = options_synonyms(name, options[name])
        if match_option(answer, options[name], words).value != value:
            continue
        for other in others:
            changed = _replaced(answer, name, value, other)
            if changed != answer and match_option(changed, options[name], words).value == other:
                return changed
    return None


def _replaced(answer: str, name: str, value: str, other: str) -> str:
    """Every word for `value` replaced by the one in the same place among the words for `other` (woman: man)."""
    here, there = ([v, *synonyms(name, v)] for v in (value, other))
    counterpart = {word.casefold(): there[i] if i < len(there) else other for i, word in enumerate(here)}
    # The display name is what descriptions, and so most answers, say.
    counterpart[display(name, value).casefold()] = display(name, other)
    longest_first = sorted(counterpart, key=len, reverse=True)
    pattern = re.compile(
        rf"(?:\b(?P<article>an?)(?P<space>\s+))?(?<![\w-])(?P<word>{'|'.join(map(re.escape, longest_first))})(?![\w-])",
        re.IGNORECASE,
    )

    def swap(hit: re.Match[str]) -> str:
        word = counterpart[hit["word"].casefold()]
        if hit["word"][0].isupper():
            word = word[0].upper() + word[1:]
        if not hit["article"]:
            return word
        article = hit["article"][0] + ("n" if word[0].lower() in "aeiou" else "")
        return f"{article}{hit['space']}{word}"

    return pattern.sub(swap, answer)
