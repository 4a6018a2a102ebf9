"""Strategy `continuation`: the LLM goes on with what was said, as in BLSP (2309.00916).

In: a clip's words and a prompt that asks to go on. Out: what the LLM writes next. The words are all that it is told, so a
speech model that learns to go on in the same way has learned to hear them.
"""

from __future__ import annotations

from eval.matching import normalise_text
from speech_llm.targets.questions import Question
from speech_llm.targets.rows import Desk, Reject, Row, Target, Writing

# What goes on in the worked example: our own, as there is no label to make one from.
EXAMPLE = (
    "The children ran to the beach.",
    "They took off their shoes, raced each other to the water and built a castle of sand before the tide came in.",
)


def continuation(row: Row, desk: Desk) -> Writing:
    """Ask until the answer is a text of its own, neither empty nor the words again."""
    words = str(row.attributes["transcript"])
    outcome, answer = "", ""
    for attempt in range(desk.attempts):
        example = EXAMPLE if desk.questioner.worked_example and attempt % 2 == 0 else None
        question = Question(words, row.prompt.text, example, attempt if desk.sampled else 0)
        (answer,) = yield [question]
        outcome = goes_on(answer, words)
        if outcome == "ok":
            return Target(answer, words, attempt)
    return Reject(outcome, answer, desk.attempts)


def goes_on(answer: str, words: str) -> str:
    """`"ok"`, or why an answer is no continuation of `words`."""
    said, before = normalise_text(answer), normalise_text(words)
    if not said:
        return "empty"
    rest = said.removeprefix(before).strip()
    if not rest or rest in before:
        return "only repeats the words"
    if said == normalise_text(EXAMPLE[1]):
        return "repeats the worked example"
    return "ok"
