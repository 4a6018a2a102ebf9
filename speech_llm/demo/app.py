"""What the page can do, without HTTP: keep a sound, describe it, answer about it, one thing at a time.

In: ids and questions. Out: events (dictionaries), handed to `emit` as they happen; what `emit` raises ends the work.
"""

from __future__ import annotations

import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speech_llm.demo.asked import MAX_NEW_TOKENS, MAX_QUESTION, MAX_TURNS, Asked
from speech_llm.demo.clips import MAX_BYTES, Clip, Clips
from speech_llm.demo.line import Line
from speech_llm.demo.run_folder import FIRST
from speech_llm.demo.voices import VoiceName, Voices
from speech_llm.errors import UserError

Emit = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """The page is being shut down."""


class Demo:
    """`voices` answer about the sounds in `clips`; `folder`: for their files. `max_new_tokens`: what the page begins with."""

    def __init__(self, voices: Voices, folder: Path, max_new_tokens: int = 128) -> None:
        self.voices, self.folder = voices, folder
        self.clips = Clips(folder, voices.longest_s)
        for row in voices.offer.examples:
            self.clips.add_example(row)
        self.line = Line()
        self.max_new_tokens = min(max_new_tokens, MAX_NEW_TOKENS)
        self._stopping = threading.Event()

    def about(self) -> dict[str, Any]:
        """What the page shows before anything is asked."""
        voices, offer = self.voices, self.voices.offer
        return {
            "model": voices.name,
            "run": offer.run.name if offer.run is not None else None,
            "parts": voices.about(),
            "hears": voices.hears,
            "voices": voices.names(),
            "describes": bool(voices.use),
            "prompts": {
                "first": FIRST,
                "ideas": offer.ideas(),
                "trained": [prompt.text for prompt in offer.trained],
                "new": [prompt.text for prompt in offer.new],
            },
            "examples": [clip.shown() for clip in self.clips.examples()],
            "max_new_tokens": self.max_new_tokens,
            "limits": {
                "bytes": MAX_BYTES,
                "seconds": self.clips.max_s,
                "new_tokens": MAX_NEW_TOKENS,
                "question": MAX_QUESTION,
                "turns": MAX_TURNS,
            },
        }

    def add(self, data: bytes, name: str) -> Clip:
        """Keep a sound. Raises `UserError`."""
        shown = "".join(letter for letter in name if unicodedata.category(letter)[0] != "C").strip()
        return self.clips.add(data, shown[-80:] or "the sound")

    def describe(self, clip_id: str, emit: Emit) -> None:
        """Let the describers tell a clip. Raises `UserError`."""
        clip = self.clips.get(clip_id)
        with self.line.turn(lambda before: self._tell(emit, "waiting", before=before)):
            self._describe(clip, emit)

    def ask(self, asked: Asked, emit: Emit) -> None:
        """Let each voice answer, the model first. Raises `UserError` where nothing can be answered at all."""
        clip = None if asked.clip is None else self.clips.get(asked.clip)
        voices = self.voices
        wanted = [voice for voice in voices.names() if voice in asked.voices]
        if clip is None:  # without a sound they are all the same
            wanted = wanted[:1]
        with self.line.turn(lambda before: self._tell(emit, "waiting", before=before)):
            if clip is not None and voices.use and clip.description is None:
                try:
                    self._describe(clip, emit)
                except UserError as error:
                    self._tell(emit, "undescribed", error=str(error))
            for voice in wanted:
                self._answer(voice, clip, asked, emit)
        self._tell(emit, "done")

    def stop(self, timeout_s: float = 10.0) -> None:
        """Let whatever is being answered end at its next word."""
        self._stopping.set()
        self.line.wait_until_empty(timeout_s)

    def _answer(self, voice: VoiceName, clip: Clip | None, asked: Asked, emit: Emit) -> None:
        sent = ""

        def on_text(text: str) -> None:
            nonlocal sent
            if text.startswith(sent):
                self._tell(emit, "text", voice=voice, add=text[len(sent) :])
            else:
                self._tell(emit, "text", voice=voice, all=text)
            sent = text

        began = time.monotonic()
        try:
            reads = None
            if clip is not None and (
                voice == "description" or (voice == "model" and self.voices.reads_description)
            ):
                reads = self.voices.reads(clip, asked.turns[0].question if asked.turns else asked.question)
            self._tell(emit, "begin", voice=voice, reads=reads)
            told = self.voices.answer(voice, clip, asked.history(), asked.question, asked.drawing(), on_text)
        except UserError as error:
            why = " ".join(str(error).split())
            self._tell(emit, "failed", voice=voice, error=_named(why, clip))
            return
        seconds = round(time.monotonic() - began, 2)
        self._tell(emit, "end", voice=voice, text=told.text, cut=told.cut, seconds=seconds)

    def _describe(self, clip: Clip, emit: Emit) -> None:
        if clip.description is None:
            self._tell(emit, "describing")
            try:
                self.voices.describe(clip, self.folder)
            except UserError as error:
                raise UserError(_named(str(error), clip)) from None
        self._tell(emit, "described", clip=clip.shown())

    def _tell(self, emit: Emit, event: str, **more: Any) -> None:
        if self._stopping.is_set():
            raise Stopped
        emit({"event": event, **more})


def _named(text: str, clip: Clip | None) -> str:
    """A sentence with the sound's own name in place of ours for it."""
    return text if clip is None else text.replace(str(clip.path), clip.name)
