"""A teacher on vLLM's offline engine, for writing many targets on a GPU.

In: questions. Out: answers. The package is the extra `vllm` and is imported only when a recipe chooses this backend; the
engine starts with the first question and ends with `close`, so that the GPU is free for what comes after.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from speech_llm.assets import resolve
from speech_llm.chat_server import NoAnswer
from speech_llm.errors import UserError
from speech_llm.precision import choose_dtype
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import Cut, OnAnswer, Sampling

# Answers reach the journal after so many questions: enough to keep the engine full, little to lose in a kill.
CHUNK = 2048


class VllmTeacher:
    """A text LLM on vLLM, which schedules batches itself.

    `precision`: as in the recipe, so that it is the same LLM as elsewhere. `engine`: further arguments of `vllm.LLM`.
    Raises `UserError` when vLLM is not installed.
    """

    def __init__(
        self,
        name: str,
        sampling: Sampling,
        precision: str = "auto",
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            found = importlib.util.find_spec("vllm")
        except ValueError:
            found = None
        if found is None:
            raise UserError(
                "targets.teacher.backend is 'vllm', but vLLM is not installed; "
                "install it with: pip install 'speech-llm[vllm]', or take the backend transformers"
            )
        self.name, self.sampling, self.precision, self.engine = name, sampling, precision, dict(engine or {})
        self._llm: Any = None

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        for start in range(0, len(questions), CHUNK):
            self._answer(questions[start : start + CHUNK], on_answer)

    def close(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        llm = self._open()
        try:
            outputs = llm.chat(
                [question.messages() for question in questions],
                [self._params(question) for question in questions],
                use_tqdm=False,
                chat_template_kwargs={"enable_thinking": False},
            )
        except _refusals() as error:
            # One that is longer than the model reads fails all that were asked with it.
            if len(questions) == 1:
                on_answer(questions[0], NoAnswer(" ".join(str(error).split())[:300]), 0)
                return
            middle = len(questions) // 2
            self._answer(questions[:middle], on_answer)
            self._answer(questions[middle:], on_answer)
            return
        except Exception as error:
            if type(error).__name__ != "EngineDeadError":  # its module has moved between versions
                raise
            raise UserError(
                f"{self.name}: vLLM's engine has died (its own messages are above; memory and time-outs are the usual causes); "
                "what was answered is kept, and the same command goes on"
            ) from error
        for question, output in zip(questions, outputs, strict=True):
            best = output.outputs[0]
            text = best.text.strip()
            on_answer(question, Cut(text) if best.finish_reason == "length" else text, len(best.token_ids))

    def _params(self, question: Question) -> Any:
        import vllm

        chosen = self.sampling
        drawn = chosen.temperature > 0
        return vllm.SamplingParams(
            temperature=chosen.temperature,
            top_p=chosen.top_p if drawn else 1.0,
            max_tokens=chosen.max_new_tokens,
            seed=chosen.seed_of(question) if drawn else None,
        )

    def _open(self) -> Any:
        if self._llm is None:
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when it is imported
            import vllm

            device = "cuda" if torch.cuda.is_available() else "cpu"
            settings: dict[str, Any] = {
                "dtype": str(choose_dtype(self.precision, device)).removeprefix("torch."),
                # Compiling takes minutes on a CPU, more than it saves there.
                "enforce_eager": device == "cpu",
                **self.engine,
            }
            folder = str(resolve(self.name))
            try:
                self._llm = vllm.LLM(model=folder, seed=self.sampling.seed, **settings)
            except (ValueError, TypeError, RuntimeError) as error:
                raise UserError(
                    f"{self.name}: vLLM cannot start with it ({' '.join(str(error).split())[:400]}); "
                    "arguments of its engine go into targets.teacher.engine"
                ) from error
        return self._llm


def _refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a question that it does not take: older versions `ValueError`, newer ones a class of their own."""
    try:
        named = importlib.import_module("vllm.exceptions").VLLMClientError
    except (ImportError, AttributeError):
        return (ValueError,)
    return (ValueError, named)
