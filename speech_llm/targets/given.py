"""Strategy `given`: a person's answer, as in ordinary supervised fine-tuning (the thing that forgets).

In: a clip with labels, or with a question and an answer of its own. Out: the answer as it stands, no LLM asked.
The other strategies that start from a person's answer take it from here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from describers.vocabulary import display
from speech_llm.files import read_jsonl
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import needs
from speech_llm.targets.rows import Desk, Row, Target, Writing
from speech_llm.targets.verify import MAX_OPTIONS

QUESTION_COLUMNS = ("question", "instruction", "prompt")
ANSWER_COLUMNS = ("answer", "response")


def given(row: Row, desk: Desk) -> Writing:
    """The person's answer; the description stands in `context` all the same, so that arms differ in their answer only."""
    yield from ()
    return human_target(row, desk, 0, "ok", {})


def human_target(row: Row, desk: Desk, attempt: int, outcome: str, notes: dict[str, Any]) -> Target:
    """The person's answer as a row's target; `outcome`: why no LLM's answer was kept."""
    context = desk.questioner.context(row.attributes, row.prompt, row.clip["id"])
    return Target(row.human or "", context, attempt, outcome, notes)


def human_answer(clip: Mapping[str, Any], prompt: PoolPrompt, wording: str) -> str | None:
    """What a person's labels answer to a prompt, None where they do not.

    `wording`: "template", the pool's example filled with the clip's own labels, or "label", the bare labels (an answer
    that must be JSON, or has another form of its own, is always the template). A transcript counts as a label, as the
    words are what they are; what a describer guessed does not.
    """
    attributes, how = clip["attributes"], clip.get("how") or {}
    asked = sorted(needs(prompt) | (prompt.example_fields() if _is_template(prompt, wording) else set()))
    if not prompt.asks or not set(asked) <= set(attributes):
        return None
    if any(name != "transcript" and not str(how.get(name, "given")).startswith("given") for name in asked):
        return None
    if _is_template(prompt, wording):
        return prompt.example_answer(attributes) if prompt.example else None
    return ", ".join(display(name, attributes[name]) for name in prompt.asks)


def _is_template(prompt: PoolPrompt, wording: str) -> bool:
    return wording == "template" or bool(prompt.json_keys or prompt.format)


def manifest_answers(manifest: Path, ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Clip id -> (question, answer) for lines of a manifest that have both (`QUESTION_COLUMNS`, `ANSWER_COLUMNS`)."""
    wanted, found = set(ids), {}
    for _, row in read_jsonl(manifest):
        question, answer = _first(row, QUESTION_COLUMNS), _first(row, ANSWER_COLUMNS)
        if question and answer and str(row.get("id")) in wanted:
            found[str(row["id"])] = (question, answer)
    return found


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    texts = (_as_text(row.get(column)) for column in columns)
    return next((text for text in texts if text), None)


def _as_text(value: Any) -> str:
    """What a person wrote in a table's cell: numbers and yes or no count too, NaN and null do not."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and value == value:
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value.strip() if isinstance(value, str) else ""


def few_choices(answers: Sequence[str]) -> tuple[str, ...]:
    """The different answers of people, when they are a choice among few that comes again and again; else nothing."""
    different = sorted(set(answers))
    return (
        tuple(different) if 1 < len(different) <= MAX_OPTIONS and len(answers) >= 2 * len(different) else ()
    )
