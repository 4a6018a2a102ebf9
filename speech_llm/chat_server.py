"""A client of any server that speaks OpenAI's chat protocol: `vllm serve`, `transformers serve`, a hosted model.

In: chats, a bounded number at a time. Out: answers, in whatever order they come.
A request that fails is tried again after a pause that doubles (the client library's own rule, which also obeys
`Retry-After`). One that fails for good, or is answered with something that is no answer, costs itself only. When nothing
gets through any more, no more is asked and `ServerGone` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from speech_llm.errors import UserError

# Why a chat got no answer that was never sent: what it is made of cannot be used.
UNASKABLE = "could not be asked"
# So many failures in a row (and at least twice as many as there are requests at a time) mean that the server is gone.
GIVE_UP_AFTER = 16

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class NoAnswer:
    """A question that got no answer, and why: it costs its own rows and no others.

    `detail`: what the server said. `reached`: there was a server, and it replied something.
    """

    why: str
    detail: str = field(default="", compare=False)
    reached: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class ServerSettings:
    """How a server is asked; `ChatServer` says what each means."""

    api_key_env: str | None = None
    concurrency: int = 8
    retries: int = 4
    timeout_s: float = 120.0


class ServerGone(UserError):
    """Nothing gets through to the server any more."""


class ChatServer:
    """A model by name on a server by URL (`http://127.0.0.1:8000/v1`).

    `api_key_env`: the environment variable that holds the key; it is read here and written nowhere. `concurrency`: requests at
    a time. `retries`: further tries of a request. `timeout_s`: how long one try may take to say anything. `asked_by`, `settings`:
    what the user wrote to come here, and where, for the sentences about mistakes.
    Raises `UserError`: the client library or the key is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        retries: int = 4,
        timeout_s: float = 120.0,
        asked_by: str = "a server is to be asked",
        settings: str = "its URL and the name of the model",
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                f"{asked_by}, but its client library is not installed; "
                "install it with: pip install 'speech-llm[openai]'"
            ) from None
        key = os.environ.get(api_key_env, "") if api_key_env else "none"
        if not key:
            raise UserError(
                f"the environment variable {api_key_env} is not set; it is to hold the key of {url} (see {settings})"
            )
        self.url, self.model, self.concurrency, self.settings = url, model, concurrency, settings
        self._openai = openai
        try:
            self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=retries)
        except Exception as error:  # the library's own reader of URLs
            raise UserError(
                f"{url}: not the URL of a server ({_short(error)}); give one like http://127.0.0.1:8000/v1"
            ) from None
        # The library takes these from the environment; a server that was named by URL has no business with them.
        self._client.organization = self._client.project = None

    def only_model(self) -> str:
        """The name of the one model that is served. Raises `UserError` when it cannot be asked, or serves none or several."""
        openai = self._openai
        try:
            names = [str(model.id) for model in self._client.models.list()]
        except openai.APIConnectionError:
            raise ServerGone(
                f"{self.url}: no server can be reached there; start it, or check the URL"
            ) from None
        except (openai.APIError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url}: the server does not say which models it has ({_short(error)}); name one behind '#', "
                f"and see that the URL is right (most end in /v1)"
            ) from None
        if len(names) != 1:
            some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(
                f"{self.url}: the server has {len(names)} models ({some or 'none'}); name the one to ask behind '#'"
            )
        return names[0]

    def ask_all(
        self,
        count: int,
        messages_of: Callable[[int], Messages],
        on_answer: Callable[[int, str | NoAnswer, int], None],
        *,
        max_tokens: int,
        options_of: Callable[[int], Mapping[str, Any]] = lambda _: {"temperature": 0},
        empty_counts: bool = True,
    ) -> None:
        """Ask chats 0 to `count` - 1; `on_answer(index, answer, tokens)` is called in this thread, as answers come.

        `messages_of` is called in a thread of the request, when its turn has come; what it raises as a `UserError` is that
        chat's own `NoAnswer`. `empty_counts`: whether an empty text is an answer.
        Raises `UserError` when the server refuses key or model, `ServerGone` when nothing gets through any more (chats that
        were not asked are then not told of).
        """
        failed_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                waiting: dict[Future[tuple[str | NoAnswer, int]], int] = {
                    pool.submit(
                        self._ask, messages_of, index, max_tokens, options_of(index), empty_counts
                    ): index
                    for index in range(count)
                }
                for future in as_completed(waiting):
                    answer, tokens = future.result()
                    on_answer(waiting[future], answer, tokens)
                    if not isinstance(answer, NoAnswer):
                        failed_in_a_row = 0
                        continue
                    failed_in_a_row += answer.why != UNASKABLE
                    if failed_in_a_row >= max(GIVE_UP_AFTER, 2 * self.concurrency):
                        raise ServerGone(
                            f"{self.url}: the last {failed_in_a_row} requests all failed (the last one: {answer.why}"
                            f"{', ' + answer.detail if answer.detail else ''}); "
                            "what was answered is kept: see to the server and run the same command again"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._client.close()  # so that requests under way are not tried again
                raise

    def _ask(
        self,
        messages_of: Callable[[int], Messages],
        index: int,
        max_tokens: int,
        options: Mapping[str, Any],
        empty_counts: bool,
    ) -> tuple[str | NoAnswer, int]:
        openai = self._openai
        try:
            messages = messages_of(index)
        except UserError as error:
            return NoAnswer(UNASKABLE, str(error)), 0
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                **options,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"{self.url}: the server refused the request for model {self.model!r} "
                f"(HTTP {error.status_code}: {_said(error)}); check {self.settings}"
            ) from None
        except openai.APITimeoutError:
            return NoAnswer("timed out", reached=False), 0
        except openai.APIStatusError as error:
            return NoAnswer(f"HTTP {error.status_code}", _said(error)), 0
        except openai.APIConnectionError:
            return NoAnswer("connection failed", reached=False), 0
        except (openai.APIError, ValueError, TypeError):  # no JSON, half of it, or JSON of another kind
            return NoAnswer("not an answer"), 0
        try:
            text, usage = reply.choices[0].message.content, reply.usage
            tokens = int(usage.completion_tokens) if usage is not None else 0
        except (AttributeError, IndexError, TypeError, ValueError):
            return NoAnswer("not an answer"), 0
        if not isinstance(text, str) or not (empty_counts or text.strip()):
            return NoAnswer("not an answer"), 0
        return text.strip(), tokens


def _said(error: Any) -> str:
    """What the server said with an error status, in its own words where it has some."""
    body = error.body if isinstance(error.body, dict) else {}
    return _short(body.get("message") or body.get("detail") or error.response.text or error.message)


def _short(message: object) -> str:
    return " ".join(str(message).split())[:200]
