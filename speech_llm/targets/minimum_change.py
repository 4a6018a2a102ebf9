"""Strategy `minimum_change`: the LLM's own answer, edited as little as possible until it is right (2402.11192).

In: description, prompt, a person's answer. Out: the own answer where it is right; else the right edit of it that changes
the fewest words. The edit is made by the base LLM itself or by a stronger one (`targets.teacher`). A row whose edits are
all wrong is rejected: a person's answer in its place would be what this strategy exists to avoid.
"""

from __future__ import annotations

import difflib

from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Question
from speech_llm.targets.rows import Desk, Reject, Row, Target, Writing

INSTRUCTION = "Correct the previous answer where it is wrong. Change as few words as possible."


def minimum_change(row: Row, desk: Desk) -> Writing:
    """Ask for the own answer, and where it is wrong for `desk.attempts` edits of it at once."""
    first = desk.ask(row, 0)
    (own,) = yield [first]
    outcome = desk.judge(own, row)
    if outcome == "ok":
        return Target(own, first.context, notes={"kept": "own"})
    shown = _shown(first.context, row.prompt, own, row.human or "")
    edits = yield [
        Question(shown, INSTRUCTION, _example(row, desk, attempt), attempt if desk.sampled else 0, "editor")
        for attempt in range(desk.attempts)
    ]
    judged = [
        (desk.judge(edit, row), changed(own, edit), attempt, edit) for attempt, edit in enumerate(edits)
    ]
    right = [item for item in judged if item[0] == "ok"]
    if not right:
        return Reject(judged[-1][0], edits[-1], desk.attempts)
    _, share, attempt, edit = min(right, key=lambda item: item[1:3])
    return Target(
        edit, first.context, attempt, notes={"kept": "edited", "own": outcome, "changed": round(share, 3)}
    )


def changed(before: str, after: str) -> float:
    """The share of words that differ, 0 for the same text, 1 for nothing in common (1 - difflib's ratio)."""
    return 1.0 - difflib.SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()


def _shown(context: str, prompt: PoolPrompt, previous: str, right: str) -> str:
    return f"{context}\n{prompt.text}\nPrevious answer: {previous}\nRight: {right}"


def _example(row: Row, desk: Desk, attempt: int) -> tuple[str, str] | None:
    """A worked example: another clip's answer with the labels of yet another one, and put right."""
    prompt = row.prompt
    shown = desk.questioner.example_clip(prompt, row.clip["id"], attempt)
    if shown is None or not prompt.example:
        return None
    others = [desk.questioner.example_clip(prompt, shown["id"], attempt + step) for step in (1, 2, 3)]
    right = prompt.example_answer(shown["attributes"])
    wrong = [prompt.example_answer(other["attributes"]) for other in others if other is not None]
    different = [answer for answer in wrong if answer != right]
    if not different:
        return None
    context = desk.questioner.context(shown["attributes"], prompt, shown["id"])
    previous = max(different, key=lambda answer: changed(answer, right))
    return _shown(context, prompt, previous, right), right
