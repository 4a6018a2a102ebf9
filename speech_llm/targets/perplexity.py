"""How familiar the targets are to the LLM that will learn them: its perplexity of their tokens.

In: Examples. Out: one figure, the one that best foretells how much learning them makes it forget (2402.11192, 2501.14315).
The LLM reads the description and the prompt, as it stands in for the sound, but not the teacher's worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speech_llm.examples import Example
from speech_llm.targets.questions import Question
from speech_llm.targets.score import mean_perplexity, score_answers


def targets_perplexity(
    llm: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    rows: int = 100,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> dict[str, float | int]:
    """`{"perplexity": of the answers' tokens together, end of turn included, "perplexity_rows": n}`.

    At most `rows` of `examples` are scored, evenly spaced; rows that read the same are scored once and count as often.
    """
    step = max(1.0, len(examples) / max(1, rows))
    chosen = [examples[int(i * step)] for i in range(min(rows, len(examples)))]
    pairs = [(Question(row.context or "", _prompt(row)), str(row.messages[-1]["content"])) for row in chosen]
    unique = list(dict.fromkeys(pairs))
    scores = score_answers(
        llm,
        tokenizer,
        [question.messages() for question, _ in unique],
        [answer for _, answer in unique],
        batch_tokens=batch_tokens,
        progress=progress,
    )
    of_pair = dict(zip(unique, scores, strict=True))
    return {
        "perplexity": round(mean_perplexity([of_pair[pair] for pair in pairs]), 3),
        "perplexity_rows": len(chosen),
    }


def _prompt(example: Example) -> str:
    """The text of the user's turn."""
    content = example.messages[0]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])
