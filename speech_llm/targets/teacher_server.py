"""A teacher behind any server that speaks OpenAI's protocol: `transformers serve`, `vllm serve`, a hosted model.

In: questions, as chat completions, a bounded number at a time. Out: answers, in whatever order they come.
A request that fails is tried again after a pause that doubles (the client library's own rule, which also obeys
`Retry-After`). One that fails for good, or is answered with something that is no answer, costs its own rows only. When
nothing gets through any more the stage stops with a sentence, and goes on later from its journal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from speech_llm.assets import resolve
from speech_llm.errors import UserError
from speech_llm.targets.questions import Question
from speech_llm.targets.teacher import NoAnswer, OnAnswer, Sampling

# So many failures in a row (and at least twice as many as there are requests at a time) mean that the server is gone.
GIVE_UP_AFTER = 16


class ServerTeacher:
    """A model by name on a server by URL (`http://127.0.0.1:8000/v1`).

    `api_key_env`: the environment variable that holds the key; it is read here and written nowhere. `concurrency`: requests at
    a time. `retries`: further tries of a request. `timeout_s`: how long one try may take to say anything.
    Raises `UserError`: the client library or the key is missing, the server refuses key or model, or nothing gets through.
    """

    def __init__(
        self,
        url: str,
        name: str,
        sampling: Sampling,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 4,
        timeout_s: float = 120.0,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "targets.teacher.backend is 'openai', but its client library is not installed; "
                "install it with: pip install 'speech-llm[openai]'"
            ) from None
        key = os.environ.get(api_key_env, "") if api_key_env else "none"
        if not key:
            raise UserError(
                f"the environment variable {api_key_env} is not set; targets.teacher.api_key_env says that it holds the key of {url}"
            )
        self.url, self.name, self.sampling, self.concurrency = url, name, sampling, concurrency
        # A package's model is known to a local server by its folder.
        self._served = str(resolve(name)) if name.startswith("pypi:") else name
        self._openai = openai
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=retries)
        # The library takes these from the environment; a server that was named by URL has no business with them.
        self._client.organization = self._client.project = None

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        failed_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                waiting: dict[Future[tuple[str | NoAnswer, int]], Question] = {
                    pool.submit(self._ask, question): question for question in questions
                }
                for future in as_completed(waiting):
                    answer, tokens = future.result()
                    on_answer(waiting[future], answer, tokens)
                    failed_in_a_row = failed_in_a_row + 1 if isinstance(answer, NoAnswer) else 0
                    if isinstance(answer, NoAnswer) and failed_in_a_row >= max(
                        GIVE_UP_AFTER, 2 * self.concurrency
                    ):
                        raise UserError(
                            f"{self.url}: the last {failed_in_a_row} requests all failed (the last one: {answer.why}); "
                            "what was answered is kept: see to the server and run the same command again"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._client.close()  # so that requests under way are not tried again
                raise

    def _ask(self, question: Question) -> tuple[str | NoAnswer, int]:
        openai, chosen = self._openai, self.sampling
        extra: dict[str, Any] = {}
        if chosen.temperature > 0:
            extra = {"top_p": chosen.top_p, "seed": chosen.seed_of(question)}
        try:
            reply = self._client.chat.completions.create(
                model=self._served,
                messages=question.messages(),  # type: ignore[arg-type]
                max_tokens=chosen.max_new_tokens,
                temperature=chosen.temperature,
                **extra,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"{self.url}: the server refused the request for model {self._served!r} "
                f"(HTTP {error.status_code}: {_short(error.message)}); check targets.teacher.url, model and api_key_env"
            ) from None
        except openai.APITimeoutError:
            return NoAnswer("timed out"), 0
        except openai.APIStatusError as error:
            return NoAnswer(f"HTTP {error.status_code}"), 0
        except openai.APIConnectionError:
            return NoAnswer("connection failed"), 0
        except (openai.APIError, ValueError, TypeError):  # no JSON, half of it, or JSON of another kind
            return NoAnswer("not an answer"), 0
        try:
            text, usage = reply.choices[0].message.content, reply.usage
            tokens = int(usage.completion_tokens) if usage is not None else 0
        except (AttributeError, IndexError, TypeError, ValueError):
            return NoAnswer("not an answer"), 0
        if not isinstance(text, str) or not text.strip():
            return NoAnswer("not an answer"), 0
        return text.strip(), tokens


def _short(message: str) -> str:
    return " ".join(str(message).split())[:200]
