"""Who answers on the page: the model, and beside it the same text LLM with the description and with nothing at all.

In: a clip, the turns so far and a question. Out: each voice's answer, told while it is written.
The text LLM is the model's own with its adapters off, so the two beside cost no memory; only where its weights were trained is
the LLM that it was built on loaded besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from speech_llm.demo.clips import Clip
from speech_llm.demo.run_folder import Offer
from speech_llm.errors import UserError
from speech_llm.examples import Message, user_turn
from speech_llm.responders import Responder, SpeechResponder, TextResponder, text_chat
from speech_llm.streaming import Drawing, OnText, Streamed, stream_chat

VoiceName = Literal["model", "description", "silent"]
# What a model hears that says nothing of a bound of its own.
LONGEST_S = 120.0


@dataclass(frozen=True)
class Turn:
    """A question that was asked before, and what each voice answered."""

    question: str
    answers: Mapping[VoiceName, str] = field(default_factory=dict)


class Voices:
    """The model `responder`, called `name`, and who answers beside it.

    `use`: describers of sounds that no run has described; none: they are not described.
    """

    def __init__(self, responder: Responder, name: str, offer: Offer, use: Sequence[str] = ()) -> None:
        if not hasattr(responder, "stream"):
            raise UserError(f"{name}: this model cannot be asked one question at a time")
        self.responder: Any = responder
        self.name, self.offer, self.use = name, offer, tuple(use)
        self._describers: list[Any] | None = None
        self._base: tuple[Any, Any] | None = None

    @property
    def hears(self) -> bool:
        """Whether the model is given the sound, rather than a text in place of it."""
        return (
            not isinstance(self.responder, TextResponder) and getattr(self.responder, "as_text", None) is None
        )

    @property
    def reads_description(self) -> bool:
        """Whether the model itself cannot answer about a sound that has no description."""
        reads = getattr(self.responder, "reads", None)
        return not self.hears and reads != "transcript" and not self.name.startswith("cascade:")

    @property
    def longest_s(self) -> float:
        features = getattr(self.responder, "features", None)
        return LONGEST_S if features is None else float(features.max_duration_s)

    def names(self) -> list[VoiceName]:
        """Who can answer, the model first."""
        if isinstance(self.responder, SpeechResponder):
            return ["model", "description", "silent"]
        return ["model", "silent"] if isinstance(self.responder, TextResponder) else ["model"]

    def about(self) -> dict[str, str]:
        """What the model is made of, for people."""
        from speech_llm.assets import describe_asset

        config = getattr(getattr(self.responder, "model", None), "config", None)
        parts = {"llm": config.llm, "encoder": config.encoder} if config is not None else {}
        out = {}
        for part, reference in parts.items():
            with contextlib.suppress(UserError):
                out[part] = describe_asset(reference).name if reference else ""
        return {key: value for key, value in out.items() if value}

    def answer(
        self,
        voice: VoiceName,
        clip: Clip | None,
        turns: Sequence[Turn],
        question: str,
        drawing: Drawing,
        on_text: OnText,
    ) -> Streamed:
        """What one voice answers; `Voices.reads` says what stands for the sound. Raises `UserError`."""
        asked = [(turn.question, turn.answers.get(voice)) for turn in turns]
        conversation: list[Message] = []
        audio = None if clip is None or voice == "silent" else self._audio_part(clip, asked, question)
        for text, answer in asked:
            if not answer:  # it was not asked then
                continue
            conversation += [user_turn(text, audio), {"role": "assistant", "content": answer}]
            audio = None
        conversation.append(user_turn(question, audio))
        if voice == "model":
            streamed: Streamed = self.responder.stream(conversation, drawing, on_text)
            return streamed
        with self._text_llm() as (llm, tokenizer):
            return stream_chat(llm, tokenizer, text_chat(conversation), drawing, on_text)

    def reads(self, clip: Clip, question: str) -> str:
        """The description that a text LLM reads for a question: of the run's instructions, as its evaluation tells the clip.

        Raises `UserError` for a clip that has none.
        """
        if clip.description is None:
            raise UserError(
                f"{clip.name}: there is no description of it to read in place of the sound"
                + ("" if self.use else "; start the page with --describe and the describers to use")
            )
        prompt = self.offer.prompt(question)
        if prompt is None or not clip.attributes:
            return clip.description
        return self.offer.questioner.context(self.offer.told(clip.attributes), prompt, clip.id)

    def describe(self, clip: Clip, folder: Path) -> None:
        """Let the describers tell a sound that has no description yet; `folder`: for their files. Raises `UserError`."""
        if clip.description is not None:
            return
        if not self.use:
            raise UserError(
                "sounds are not described here; start the page with --describe and the describers to use"
            )
        from describers.run import describe_inputs
        from speech_llm.files import read_jsonl

        out = folder / f"{clip.id}.jsonl"
        try:
            report = describe_inputs(
                clip.path,
                out,
                use=(),
                describers=self.load_describers(),
                form=self.offer.questioner.form,
                workers=1,
                progress=False,
                cache=False,  # what people say into a microphone is kept nowhere
            )
            row = next((row for _, row in read_jsonl(out)), None)
        finally:
            for path in folder.glob(f"{clip.id}.*"):
                if path.suffix != ".wav":
                    path.unlink(missing_ok=True)
        if row is None:
            raise UserError(f"{clip.name}: {', '.join(report.reasons) or 'it could not be described'}")
        clip.tell(row)

    def load_describers(self) -> list[Any]:
        from describers.run import DEFAULT_ASR, named_describers

        if self._describers is None:
            self._describers = named_describers(self.use, asr=self.offer.asr or DEFAULT_ASR)
        return self._describers

    def _audio_part(
        self, clip: Clip, asked: Sequence[tuple[str, str | None]], question: str
    ) -> dict[str, Any]:
        part: dict[str, Any] = {"path": str(clip.path)}
        if clip.description is not None:
            # As it was told when the conversation began, so that what was said stays what it was.
            part["description"] = self.reads(clip, asked[0][0] if asked else question)
            if "transcript" in self._told(clip):
                part["transcript"] = str(clip.attributes.get("transcript") or "")
        return part

    def _told(self, clip: Clip) -> set[str]:
        """The attributes that were asked for, found or not: what is then missing is known to be not there."""
        return set(clip.attributes) | (
            {"transcript"} if "transcript" in self.use and not clip.example else set()
        )

    @contextlib.contextmanager
    def _text_llm(self) -> Iterator[tuple[Any, Any]]:
        """The LLM that the model was built on, as it was."""
        if isinstance(self.responder, TextResponder) or self.responder.model.llm_is_base:
            adapters: Callable[..., Any] = self.responder.text_llm
            with adapters(adapters=False) as both:
                yield both
            return
        if self._base is None:
            from speech_llm.assets import load_answering_llm

            self._base = load_answering_llm(self.responder.model.config.llm)
        yield self._base
