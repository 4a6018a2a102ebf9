"""A model on any server that speaks OpenAI's protocol, as a responder: `openai:URL[#MODEL]`.

In: conversations. Out: one answer each, greedy; None where there was none. An audio part is sent as the sound itself
(`input_audio`, WAV in base64, mono at 16 kHz), or, where the model reads only text, as what stands in for it.
"""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

from speech_llm.audio import wav_bytes
from speech_llm.chat_server import ChatServer, Messages, NoAnswer, ServerGone, ServerSettings
from speech_llm.errors import UserError
from speech_llm.examples import Message
from speech_llm.streaming import Drawing, OnText, Streamed

# Decoders of rare formats warn through Python's one list of filters, which threads must not change at once.
_decoding = threading.Lock()
_NOT_ASKED = "not asked, as the server was gone"


class ServedResponder:
    """Answers of the model on `server`, several asked for at a time.

    `as_text`: turns a conversation into one without sound; without it the server gets the sound. `unusable`: which sounds that
    cannot be done with, and why.
    `failures`: how many conversations got no answer so far, by the reason. `gone`: the sentence that says that the server went
    away before all was asked.
    """

    def __init__(
        self,
        server: ChatServer,
        max_new_tokens: int = 128,
        as_text: Callable[[list[Message]], list[Message]] | None = None,
        unusable: Callable[[Sequence[str]], dict[str, str]] | None = None,
    ) -> None:
        self.server, self.max_new_tokens, self.as_text = server, max_new_tokens, as_text
        self._unusable = unusable
        self.name = f"openai:{server.url}#{server.model}"
        self.failures: Counter[str] = Counter()
        self.gone: str | None = None
        self._detail = ""

    def unusable(self, paths: Sequence[str]) -> dict[str, str]:
        """Which sounds cannot be turned into text, and why; one that is sent as it is costs its own request."""
        return {} if self._unusable is None else self._unusable(paths)

    def respond(
        self, conversations: Sequence[list[Message]], on_answer: Callable[[int, str], None] | None = None
    ) -> list[str | None]:
        """One answer each, None where the request failed for good (`trouble` says why).

        Raises `UserError` when key or model is refused, and `ServerGone` when not one request got through.
        """
        if self.as_text is not None:
            conversations = [self.as_text(conversation) for conversation in conversations]
        keys = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        places = list(first.values())  # greedy: the same question is asked once
        answers: dict[str, str] = {}
        failed: dict[str, NoAnswer] = {}

        def done(number: int, answer: str | NoAnswer, _tokens: int) -> None:
            key = keys[places[number]]
            if isinstance(answer, NoAnswer):
                failed[key] = answer
                self._detail = answer.detail
                return
            answers[key] = answer
            if on_answer is not None:
                on_answer(places[number], answer)

        try:
            self.server.ask_all(
                len(places),
                lambda number: with_sounds(conversations[places[number]]),
                done,
                max_tokens=self.max_new_tokens,
            )
        except ServerGone as error:
            if not answers:
                raise
            self.gone = str(error)
        if failed and not answers and not any(no_answer.reached for no_answer in failed.values()):
            whys = " or ".join(sorted({no_answer.why for no_answer in failed.values()}))
            raise ServerGone(
                f"{self.server.url}: no answer from there ({whys}); see that the server runs, check the URL, "
                "or allow it more time with --timeout-s"
            )
        for key in keys:
            if key not in answers:
                self.failures[failed[key].why if key in failed else _NOT_ASKED] += 1
        return [answers.get(key) for key in keys]

    def stream(self, conversation: list[Message], drawing: Drawing, on_text: OnText) -> Streamed:
        """One answer, which a server tells at once and not while it is written. Raises `UserError` where there is none."""
        asked = conversation if self.as_text is None else self.as_text(conversation)
        got: list[str | NoAnswer] = []
        options: dict[str, float] = {"temperature": drawing.temperature}
        if drawing.temperature > 0:
            options |= {"top_p": drawing.top_p, "seed": drawing.seed}
        self.server.ask_all(
            1,
            lambda _: with_sounds(asked),
            lambda _, answer, __: got.append(answer),
            max_tokens=drawing.max_new_tokens,
            options_of=lambda _: options,
        )
        answer = got[0]
        if isinstance(answer, NoAnswer):
            detail = f", {answer.detail}" if answer.detail else ""
            raise UserError(f"{self.server.url}: there was no answer ({answer.why}{detail})")
        on_text(answer)
        return Streamed(answer)

    def trouble(self) -> str | None:
        """What was not answered and why, in one sentence; None when everything was."""
        if not self.failures:
            return None
        if self.failures.total() == 1:
            detail = f", {self._detail}" if self._detail else ""
            return f"{self.server.url}: one got no answer ({next(iter(self.failures))}{detail})"
        reasons = ", ".join(f"{why}: {count:,}" for why, count in self.failures.most_common())
        detail = f"; the last one: {self._detail}" if self._detail else ""
        return f"{self.server.url}: {self.failures.total():,} got no answer ({reasons}{detail})"


def load_served(
    reference: str,
    settings: ServerSettings | None = None,
    max_new_tokens: int = 128,
    as_text: Callable[[list[Message]], list[Message]] | None = None,
    unusable: Callable[[Sequence[str]], dict[str, str]] | None = None,
) -> ServedResponder:
    """The model that `URL[#MODEL]` names; without MODEL the one that the server has.

    Raises `UserError` for what is no URL, for a missing client library or key, and where there is not exactly one model.
    """
    url, _, model = reference.partition("#")
    if not url.startswith(("http://", "https://")):
        raise UserError(
            f"openai:{reference}: behind 'openai:' the server's URL is needed, and behind '#' the model's name, "
            "for example openai:http://127.0.0.1:8000/v1#NAME"
        )
    server = ChatServer(
        url,
        model,
        **asdict(settings or ServerSettings()),
        asked_by=f"openai:{reference} is a server",
        settings="the URL (most end in /v1), the model's name behind '#' and --api-key-env",
    )
    if not model:
        server.model = server.only_model()
    return ServedResponder(server, max_new_tokens, as_text, unusable)


def tell_trouble(responder: object, say: Callable[[str], None]) -> None:
    """Say what a server did not answer. Raises `UserError` when it went away before all was asked."""
    if not isinstance(responder, ServedResponder):
        return
    if responder.gone is not None:
        raise UserError(f"{responder.gone} ({responder.failures.total():,} are without an answer)")
    trouble = responder.trouble()
    if trouble is not None:
        say(f"{trouble}; the same command asks again")


def with_sounds(conversation: list[Message]) -> Messages:
    """A conversation as a server takes it, each audio part as the sound itself. Raises `AudioError`."""
    messages = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            if any(part["type"] == "audio" for part in content):
                content = [_sent(part) for part in content]
            else:  # some servers take parts only where they take sounds
                content = "\n".join(part["text"] for part in content)
        messages.append({"role": message["role"], "content": content})
    return messages


def _sent(part: dict[str, str]) -> dict[str, object]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    with _decoding:
        data = base64.b64encode(wav_bytes(part["path"])).decode("ascii")
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
