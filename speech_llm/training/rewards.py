"""What a sampled answer is worth, by rule: is it right, and is it in the right form?

In: an Example whose answer is known to be right. Out: a `Verifier` that reads other answers to the same prompt by the rules that
score an evaluation. What the known answer names is what an answer must name; a known answer in JSON asks for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.json_probe import parse_repaired, parse_strict
from eval.matching import match_option, normalise_text
from speech_llm.examples import Example
from speech_llm.targets.verify import options_synonyms


@dataclass(frozen=True)
class Verifier:
    """What a right answer names: `values` (attribute -> value, one of `options`) and `words` (none where they are not asked).

    `keys`: of the JSON object that it must be; None where it may be any text.
    """

    values: Mapping[str, str]
    options: Mapping[str, Sequence[str]]
    words: str = ""
    keys: frozenset[str] | None = None

    def right(self, answer: str) -> bool:
        """Whether an answer names all that it must, and of each attribute only the right value."""
        if self.keys is not None:
            found = parse_repaired(answer)
            if found is None:
                return False
            answer = "; ".join(str(value) for value in found.values())
        named = all(
            match_option(answer, self.options[name], options_synonyms(name, self.options[name])).value
            == value
            for name, value in self.values.items()
        )
        return named and self.words in normalise_text(answer)

    def in_form(self, answer: str, ended: bool) -> bool:
        """Whether an answer ended by itself and, where JSON is asked for, is an object with the right keys and nothing else."""
        if not ended or not answer.strip():
            return False
        if self.keys is None:
            return True
        found = parse_strict(answer)
        return found is not None and set(found) == self.keys


def make_verifier(example: Example, options: Mapping[str, Sequence[str]]) -> Verifier | None:
    """The verifier of an Example's last answer; None where that names nothing that could be checked.

    `options`: the values that each attribute may have.
    """
    answer = str(example.messages[-1]["content"]) if example.messages else ""
    found = parse_strict(answer)
    text = answer if found is None else "; ".join(str(value) for value in found.values())
    values = {
        name: str(example.attributes[name])
        for name, choices in options.items()
        if example.attributes.get(name) in choices
        and match_option(text, choices, options_synonyms(name, choices)).value == example.attributes[name]
    }
    spoken = normalise_text(str(example.attributes.get("transcript") or ""))
    words = spoken if spoken and spoken in normalise_text(text) else ""
    if not values and not words:
        return None
    return Verifier(
        values,
        {name: options[name] for name in values},
        words,
        frozenset(found) if found is not None else None,
    )
