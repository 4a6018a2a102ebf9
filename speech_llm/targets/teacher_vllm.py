"""A teacher on vLLM's offline engine, for writing many targets on a GPU.

In: questions. Out: answers. The package is the extra `vllm` and is imported only when a recipe chooses this backend.
It has not been run by this project's tests, which have no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speech_llm.assets import resolve
from speech_llm.errors import UserError
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import OnAnswer, Sampling

# Answers reach the journal after so many questions: enough to keep the engine full, little to lose in a kill.
CHUNK = 2048


class VllmTeacher:
    """A text LLM on vLLM, which schedules batches itself."""

    def __init__(self, name: str, sampling: Sampling) -> None:
        try:
            import vllm
        except ImportError:
            raise UserError(
                "targets.teacher.backend is 'vllm', but vLLM is not installed; "
                "install it with: pip install 'speech-llm[vllm]', or take the backend transformers"
            ) from None
        self.name, self.sampling = name, sampling
        self._params: Any = vllm.SamplingParams
        self._llm: Any = vllm.LLM(model=str(resolve(name)), seed=sampling.seed)

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        chosen = self.sampling
        for start in range(0, len(questions), CHUNK):
            part = questions[start : start + CHUNK]
            outputs = self._llm.chat(
                [question.messages() for question in part],
                [
                    self._params(
                        temperature=chosen.temperature,
                        top_p=chosen.top_p if chosen.temperature > 0 else 1.0,
                        max_tokens=chosen.max_new_tokens,
                        seed=chosen.seed_of(question) if chosen.temperature > 0 else None,
                    )
                    for question in part
                ],
                use_tqdm=False,
            )
            for question, output in zip(part, outputs, strict=True):
                best = output.outputs[0]
                on_answer(question, best.text.strip(), len(best.token_ids))
