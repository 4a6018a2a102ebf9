"""Strategies `self` and `teacher`: an LLM's own answer to the description, verified.

`self` is DeSTA2's (2409.20007) and DeSTA2.5's (2507.02768): the answering LLM is the one that will learn. `teacher` is the
same with another, stronger LLM (2402.11192).
"""

from __future__ import annotations

from speech_llm.targets.rows import Desk, Reject, Row, Target, Writing


def own_answer(row: Row, desk: Desk) -> Writing:
    """Ask until an answer passes, each time with another worked example; reject the row after the last attempt."""
    outcome, answer = "", ""
    for attempt in range(desk.attempts):
        question = desk.ask(row, attempt)
        (answer,) = yield [question]
        outcome = desk.judge(answer, row)
        if outcome == "ok":
            return Target(answer, question.context, attempt)
    return Reject(outcome, answer, desk.attempts)
