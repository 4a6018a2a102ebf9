"""Strategy `rewrite`: the LLM says a person's answer in its own words (SDFT of Yang et al., 2402.13669).

In: description, prompt, a person's answer. Out: the paraphrase where it still says what the person said, in other words, and
does not talk about its task; else the person's answer itself, so that no row is lost and none is wrong.
"""

from __future__ import annotations

from speech_llm.targets.given import human_answer, human_target
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Question
from speech_llm.targets.rows import Desk, Row, Target, Writing

INSTRUCTION = "Say what the reference answer says in your own words."
# An answer that speaks of these is about the rewriting, not about the clip (the paper's list, and our own instruction).
BANNED = (
    "reference answer",
    "your response",
    "my response",
    "your own response",
    "now it's your turn",
    "own words",
)
BANNED_START = "your turn"


def rewrite(row: Row, desk: Desk, pool: tuple[PoolPrompt, ...], wording: str) -> Writing:
    """Ask for a paraphrase until one passes; fall back on the person's answer."""
    human = row.human or ""
    context = desk.questioner.context(row.attributes, row.prompt, row.clip["id"])
    outcome = ""
    for attempt in range(desk.attempts):
        question = Question(
            _shown(context, row.prompt, human),
            INSTRUCTION,
            _example(row, desk, pool, wording, attempt),
            attempt if desk.sampled else 0,
        )
        (answer,) = yield [question]
        outcome = banned(answer) or repeats(answer, human) or desk.judge(answer, row)
        if outcome == "ok":
            return Target(answer, context, attempt, notes={"kept": "paraphrase"})
    return human_target(row, desk, desk.attempts - 1, outcome, {"kept": "human"})


def banned(answer: str) -> str | None:
    """Why an answer is about its task instead of the clip, None when it is not."""
    text = answer.casefold().replace("’", "'")
    if text.lstrip(" #*\n").startswith(BANNED_START) or any(phrase in text for phrase in BANNED):
        return "speaks of its task"
    return None


def repeats(answer: str, human: str) -> str | None:
    """Why an answer is no paraphrase but the person's own words again, None when it is one."""
    same = answer.casefold().split() == human.casefold().split()
    return "only repeats the human answer" if same else None


def _shown(context: str, prompt: PoolPrompt, human: str) -> str:
    return f"{context}\n{prompt.text}\nReference answer: {human}"


def _example(
    row: Row, desk: Desk, pool: tuple[PoolPrompt, ...], wording: str, attempt: int
) -> tuple[str, str] | None:
    """A worked example: another clip's answer, and the same in other words, which the pool has under another prompt."""
    shown = desk.questioner.example_clip(row.prompt, row.clip["id"], attempt)
    if shown is None:
        return None
    human = human_answer(shown, row.prompt, wording)
    others = [
        other.example_answer(shown["attributes"])
        for other in pool
        if other.example
        and other.asks == row.prompt.asks
        and bool(other.json_keys) == bool(row.prompt.json_keys)
        and other.format == row.prompt.format
        and other.example_fields() <= set(shown["attributes"])
    ]
    different = [other for other in others if other != human]
    if human is None or not different:
        return None
    context = desk.questioner.context(shown["attributes"], row.prompt, shown["id"])
    return _shown(context, row.prompt, human), different[attempt % len(different)]
