"""Anything that answers a conversation with audio, behind one method: `respond(conversations) -> texts`.

    checkpoint folder or hub id   the speech model
    text:LLM                      the text LLM, given each audio part's `description` in place of the sound (the ceiling)
    teacher:LLM                   the same, with the worked example of the audio part before it (what wrote the targets)
    cascade:LLM                   the text LLM, given the transcript only
    openai:URL[#MODEL]            a model on a server of OpenAI's protocol, which hears the sound itself; as the LLM of the
                                  three above it is a text LLM (`text:openai:URL#MODEL`)

In: conversations whose audio parts are `{"type": "audio", "path", "transcript"?, "description"?, "example"?}`.
Out: one answer each, greedy, in order; None where a server gave none. `eval` is handed such an object and knows nothing else of the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from speech_llm.audio import SAMPLE_RATE_HZ, AudioError, load_audio
from speech_llm.chat_server import ServerSettings
from speech_llm.choosing import by_context, choose_by_form, choose_in_chat, choose_plain
from speech_llm.data.features import FeatureStore, stack_features
from speech_llm.errors import UserError
from speech_llm.examples import Message, audio_parts
from speech_llm.files import read_json
from speech_llm.generation import Prompt, answer_chats, end_of_turn_ids, generate
from speech_llm.served import load_served
from speech_llm.streaming import Drawing, OnText, Streamed, stream_chat, stream_prompt
from speech_llm.targets.score import score_answers

OnAnswer = Callable[[int, str], None]


class Responder(Protocol):
    """What `eval` needs of a model."""

    def respond(
        self, conversations: Sequence[list[Message]], on_answer: OnAnswer | None = None
    ) -> Sequence[str | None]: ...


def text_chat(
    conversation: list[Message], reads: str = "description", worked_example: bool = False
) -> list[Message]:
    """A conversation as plain text, each audio part replaced by what is read of it: its description, or its transcript.

    `worked_example`: with the one of the audio part as turns before. Raises `UserError` for a part without a description.
    """
    turns: list[Message] = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            pieces = []
            for part in content:
                if part["type"] == "text":
                    pieces.append(part["text"])
                    continue
                pieces.append(_stand_in(part, reads))
                example = part.get("example")
                if worked_example and example:
                    question = "\n".join(p["text"] for p in content if p["type"] == "text")
                    turns.append({"role": "user", "content": f"{example['context']}\n{question}"})
                    turns.append({"role": "assistant", "content": example["answer"]})
            content = "\n".join(pieces)
        turns.append({"role": message["role"], "content": content})
    return turns


def _stand_in(part: dict[str, Any], reads: str) -> str:
    if reads == "transcript":
        words = part.get("transcript") or transcribe([part["path"]])[0]
        return f'Someone says: "{words}"' if words else "Nothing is said."
    if not part.get("description"):
        raise UserError(
            f"{part.get('path')}: there is no description to read in place of the sound; "
            "make one with `speech-llm describe` and put it into the audio part as 'description'"
        )
    return str(part["description"])


class TextResponder:
    """A text LLM that reads a text in place of each sound: its description, or (cascade) its transcript."""

    def __init__(
        self,
        llm: Any,
        tokenizer: Any,
        reads: str = "description",
        worked_example: bool = False,
        max_new_tokens: int = 64,
        batch_tokens: int = 4096,
    ) -> None:
        self.llm, self.tokenizer, self.reads, self.worked_example = llm, tokenizer, reads, worked_example
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self._answered: dict[str, str] = {}

    def unusable(self, paths: Sequence[str]) -> dict[str, str]:
        """Which sounds cannot be written down, and why; who reads descriptions hears none."""
        return undecodable(paths) if self.reads == "transcript" else {}

    def chat(self, conversation: list[Message]) -> list[Message]:
        """The conversation as the LLM reads it; see `text_chat`."""
        return text_chat(conversation, self.reads, self.worked_example)

    def respond(self, conversations: Sequence[list[Message]], on_answer: OnAnswer | None = None) -> list[str]:
        chats = [self.chat(conversation) for conversation in conversations]
        keys = [json.dumps(chat, ensure_ascii=False) for chat in chats]
        new = [i for i, key in enumerate(keys) if key not in self._answered]
        answers = answer_chats(
            self.llm,
            self.tokenizer,
            [chats[i] for i in new],
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            on_answer=None if on_answer is None else lambda place, text, _tokens: on_answer(new[place], text),
        )
        self._answered.update(zip((keys[i] for i in new), answers, strict=True))
        return [self._answered[key] for key in keys]

    def stream(self, conversation: list[Message], drawing: Drawing, on_text: OnText) -> Streamed:
        """One answer, told while it is written; see `speech_llm.streaming`."""
        return stream_chat(self.llm, self.tokenizer, self.chat(conversation), drawing, on_text)

    def choose(
        self, contexts: Sequence[str | list[Message]], choices: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """How likely the LLM finds each choice after its context; see `eval.general.Chooser`."""

        def in_chat(chats: list[list[Message]], own: list[Sequence[str]]) -> list[list[float]]:
            pairs = [
                (self.chat(chat), choice) for chat, some in zip(chats, own, strict=True) for choice in some
            ]
            told = score_answers(
                self.llm, self.tokenizer, [chat for chat, _ in pairs], [choice for _, choice in pairs]
            )
            return by_context([float(score.log_probs.sum()) for score in told], own)

        return choose_by_form(
            contexts, choices, lambda texts, own: choose_plain(self.llm, self.tokenizer, texts, own), in_chat
        )

    @contextlib.contextmanager
    def text_llm(self, adapters: bool | None = None) -> Iterator[tuple[Any, Any]]:
        """The LLM and its tokenizer, for whoever drives them itself."""
        yield self.llm, self.tokenizer


class SpeechResponder:
    """The speech model: hears each audio part, with its transcript behind it where the model was trained so."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        features: FeatureStore,
        max_new_tokens: int = 64,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self.processor, self.features = model, processor, features
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.stop_ids = end_of_turn_ids(processor.tokenizer, model.llm)

    @torch.inference_mode()
    def respond(self, conversations: Sequence[list[Message]], on_answer: OnAnswer | None = None) -> list[str]:
        self.model.eval()
        conversations = [self._with_transcripts(conversation) for conversation in conversations]
        keys = [json.dumps(conversation, ensure_ascii=False) for conversation in conversations]
        first_of = {key: i for i, key in reversed(list(enumerate(keys)))}
        answered: dict[int, str] = {}
        for has_audio in (True, False):
            # Those about the same sounds side by side: they share its vectors and the LLM's work on them.
            chosen = sorted(
                (i for i in first_of.values() if bool(audio_parts(conversations[i])) == has_audio),
                key=lambda i: ([part["path"] for part in audio_parts(conversations[i])], i),
            )
            # Embedding the sounds of a few hundred conversations at a time bounds the memory they take.
            for start in range(0, len(chosen), 256):
                window = chosen[start : start + 256]
                prompts = self._prompts([conversations[i] for i in window])

                def done(place: int, ids: list[int], window: list[int] = window) -> None:
                    text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
                    answered[window[place]] = text
                    if on_answer is not None:
                        on_answer(window[place], text)

                with self._adapters(has_audio):
                    generate(
                        self.model.llm,
                        prompts,
                        stop_ids=self.stop_ids,
                        max_new_tokens=self.max_new_tokens,
                        batch_tokens=self.batch_tokens,
                        audio_token_id=self.model.config.audio_token_id,
                        on_done=done,
                    )
        return [answered[first_of[key]] for key in keys]

    @torch.inference_mode()
    def stream(self, conversation: list[Message], drawing: Drawing, on_text: OnText) -> Streamed:
        """One answer, told while it is written; see `speech_llm.streaming`."""
        self.model.eval()
        [prompt] = self._prompts([self._with_transcripts(conversation)])
        with self._adapters(bool(prompt.sounds)):
            return stream_prompt(
                self.model.llm,
                self.processor.tokenizer,
                prompt,
                drawing,
                on_text,
                self.model.config.audio_token_id,
            )

    def choose(
        self, contexts: Sequence[str | list[Message]], choices: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """How likely the model finds each choice after its context; see `eval.general.Chooser`."""
        self.model.eval()

        def plain(texts: list[str], own: list[Sequence[str]]) -> list[list[float]]:
            with self._adapters(False):
                return choose_plain(self.model.llm, self.processor.tokenizer, texts, own)

        def in_chat(chats: list[list[Message]], own: list[Sequence[str]]) -> list[list[float]]:
            chats = [self._with_transcripts(chat) for chat in chats]
            return choose_in_chat(self.model, self.processor, self.features, chats, own)

        return choose_by_form(contexts, choices, plain, in_chat)

    @contextlib.contextmanager
    def text_llm(self, adapters: bool | None = None) -> Iterator[tuple[Any, Any]]:
        """The LLM and its tokenizer for the time of a block; `adapters`: on, off, or (None) as they act on text."""
        self.model.eval()
        chosen = {
            None: lambda: self.model.adapters_for(False),
            True: lambda: self.model.gate.set(True),
            False: self.model.adapters_off,
        }[adapters]
        with chosen():
            yield self.model.llm, self.processor.tokenizer

    def unusable(self, paths: Sequence[str]) -> dict[str, str]:
        """Which sounds cannot be heard, and why: damaged, too short, longer than the encoder takes."""
        return self.features.unusable(paths)

    def _prompts(self, conversations: Sequence[list[Message]]) -> list[Prompt]:
        """Conversations as token ids and embeddings; each sound goes through the connector once."""
        paths = [[part["path"] for part in audio_parts(conversation)] for conversation in conversations]
        clips = {path: self.features.load(path) for own in paths for path in own}
        vectors = self._vectors(clips)
        device = self.model.llm.get_input_embeddings().weight.device
        prompts = []
        for conversation, own in zip(conversations, paths, strict=True):
            counts = [len(clips[path]) for path in own]
            ids = list(
                self.processor.render(conversation, add_generation_prompt=True, frame_counts=counts).input_ids
            )
            if not own:
                prompts.append(Prompt(ids))
                continue
            heard = torch.cat([vectors[path] for path in own])
            embeds = self.model.embed(torch.tensor([ids], device=device), heard)[0]
            prompts.append(Prompt(ids, embeds, tuple(own)))
        return prompts

    def _vectors(self, clips: dict[str, torch.Tensor], batch_clips: int = 16) -> dict[str, torch.Tensor]:
        """Each clip's vectors (k, llm_width), clips of like length side by side."""
        device = self.model.llm.get_input_embeddings().weight.device
        order = sorted(clips, key=lambda path: len(clips[path]))
        out: dict[str, torch.Tensor] = {}
        for start in range(0, len(order), batch_clips):
            batch = order[start : start + batch_clips]
            stacked, counts = stack_features([clips[path] for path in batch], device)
            heard, sizes = self.model.audio_vectors(stacked, counts)
            out.update(zip(batch, heard.split(sizes.tolist()), strict=True))
        return out

    def _with_transcripts(self, conversation: list[Message]) -> list[Message]:
        if not self.model.config.use_transcript:
            return conversation
        out = []
        for message in conversation:
            content = message["content"]
            if isinstance(content, list):
                content = [
                    {**part, "transcript": transcribe([part["path"]])[0]}
                    if part["type"] == "audio" and "transcript" not in part
                    else part
                    for part in content
                ]
            out.append({**message, "content": content})
        return out

    @contextlib.contextmanager
    def _adapters(self, has_audio: bool) -> Iterator[None]:
        with self.model.adapters_for(has_audio):
            yield


_transcribers: dict[str, Any] = {}
_transcripts: dict[tuple[str, str], str] = {}


def transcribe(paths: Sequence[str], asr: str | None = None) -> list[str]:
    """Transcripts of clips (empty where nothing is said), remembered within the process."""
    from describers.records import Clip
    from describers.run import DEFAULT_ASR
    from describers.transcript import TranscriptDescriber

    asr = asr or DEFAULT_ASR
    new = [path for path in dict.fromkeys(paths) if (asr, path) not in _transcripts]
    if new:
        describer = _transcribers.setdefault(asr, TranscriptDescriber(asr))
        sounds = [load_audio(path) for path in new]
        clips = [
            Clip(path, Path(path), len(x) / SAMPLE_RATE_HZ, x) for path, x in zip(new, sounds, strict=True)
        ]
        for path, heard in zip(new, describer.describe(clips), strict=True):
            _transcripts[asr, path] = heard["transcript"].value if "transcript" in heard else ""
    return [_transcripts[asr, path] for path in paths]


def undecodable(paths: Sequence[str]) -> dict[str, str]:
    """Which sounds cannot be decoded, and why."""
    found = {}
    for path in paths:
        try:
            load_audio(path)
        except AudioError as error:  # noqa: PERF203 (one unreadable file must not end the loop)
            found[path] = error.reason
    return found


def load_responder(
    model: str,
    max_new_tokens: int = 128,
    batch_tokens: int = 4096,
    server: ServerSettings | None = None,
    features: Path | None = None,
) -> Responder:
    """The responder for a model's name as the command line takes it; see the head of this file.

    `server`: how one is asked. `features`: see `load_speech_model`.
    """
    from speech_llm.assets import load_answering_llm

    kind, _, reference = model.partition(":")
    if kind == "openai":
        return load_served(reference, server, max_new_tokens)
    if kind in ("text", "teacher", "cascade") and reference:
        reads, worked_example = "transcript" if kind == "cascade" else "description", kind == "teacher"
        if reference.startswith("openai:"):
            as_text = functools.partial(text_chat, reads=reads, worked_example=worked_example)
            unusable = undecodable if kind == "cascade" else None
            return load_served(reference.removeprefix("openai:"), server, max_new_tokens, as_text, unusable)
        llm, tokenizer = load_answering_llm(reference)
        return TextResponder(
            llm,
            tokenizer,
            reads=reads,
            worked_example=worked_example,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
        )
    return load_speech_model(model, max_new_tokens, batch_tokens, features=features)


def load_speech_model(
    reference: str | Path,
    max_new_tokens: int = 128,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
    features: Path | None = None,
) -> SpeechResponder:
    """A trained checkpoint as a responder. `features`: where those of sounds are kept (default: the cache of all runs)."""
    from speech_llm.assets import cache_dir, resolve
    from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from speech_llm.precision import choose_dtype

    folder = resolve(str(reference))
    kind = read_json(folder / "config.json").get("model_type") if (folder / "config.json").exists() else None
    if kind is not None and kind != SpeechLLMForConditionalGeneration.config_class.model_type:
        raise UserError(
            f"{reference}: a model of the type {kind!r}, not one that was trained to hear; a text LLM is named text:{reference} "
            f"(it reads descriptions) or cascade:{reference} (it reads transcripts)"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SpeechLLMForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or choose_dtype("auto", device)
    )
    processor = SpeechLLMProcessor.from_pretrained(folder)
    model.to(device).eval()
    # The features are kept as they were in training, under the bound that the user set there.
    training = folder / "training.json"
    cache = read_json(training).get("cache", {}) if training.exists() else {}
    store = FeatureStore(
        features or cache_dir() / "features", model, processor, model.config.encoding, **cache
    )
    return SpeechResponder(model, processor, store, max_new_tokens, batch_tokens)
