"""Conversations and sounds to the numbers that the model reads.

In: chat messages whose user turns may hold `{"type": "audio", "path", "transcript"?}` parts, and samples.
Out: token ids with one placeholder per audio vector, the token ranges of the answers, and the encoder's input.

The text is written by the LLM's own chat template and tokenised in one piece, with the sounds left out; placeholders are then
put in between two tokens. So what the LLM reads besides the sound is, token for token, what it would read without this class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoTokenizer
from transformers.utils.hub import PushToHubMixin

from speech_llm.errors import UserError
from speech_llm.examples import Message, audio_parts
from speech_llm.files import write_json
from speech_llm.model.configuration import SpeechLLMConfig, vectors_per_clip
from speech_llm.model.encoding import (
    frames_of_samples,
    inputs_of_frames,
    max_frames,
    pad_last,
    reads_mel,
    silence_level,
)

# Marks that show where the template put a sound or an answer. Characters for private use, which no text should hold.
AUDIO, ANSWER, END = "\U0010fff0", "\U0010fff1", "\U0010fff2"


@dataclass
class Rendered:
    """A conversation as tokens. Spans are [start, end) in `input_ids`.

    `audio_spans`: the placeholders of each sound. `answer_spans`: each assistant turn to be learned, with the token that ends
    it. `constant_prefix`: tokens before the first sound, which do not depend on it (all of them when there is none).
    """

    input_ids: list[int]
    audio_spans: list[tuple[int, int]] = field(default_factory=list)
    answer_spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def constant_prefix(self) -> int:
        return self.audio_spans[0][0] if self.audio_spans else len(self.input_ids)


class SpeechLLMProcessor(PushToHubMixin):
    """Tokenizer, feature extractor and the counting of placeholders, for one `SpeechLLMConfig`."""

    def __init__(self, tokenizer: Any, feature_extractor: Any, config: SpeechLLMConfig) -> None:
        self.tokenizer, self.feature_extractor, self.config = tokenizer, feature_extractor, config
        self._special: set[int] | None = None

    @property
    def audio_token_id(self) -> int:
        assert self.config.audio_token_id is not None
        return self.config.audio_token_id

    @property
    def pad_token_id(self) -> int:
        """What fills up short rows; always masked, so any id of the vocabulary will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def sample_rate_hz(self) -> int:
        return int(self.feature_extractor.sampling_rate)

    # ---------------------------------------------------------------- sound

    def frames(self, samples: int) -> int:
        """Encoder frames of a clip of so many samples."""
        return frames_of_samples(
            self.config.encoder_config, int(samples), getattr(self.feature_extractor, "hop_length", 160)
        )

    def num_vectors(self, frame_count: int) -> int:
        """Placeholders that a clip of so many encoder frames takes."""
        return vectors_per_clip(self.config.connector, frame_count)

    def mel_features(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Encoder input of clips, as long as the longest: (n, mel bins, mel frames) or (n, samples), and frame counts (n,).

        Each clip is prepared by itself, so that it is the same whatever the others are. Raises `UserError` for a clip that is
        longer than the encoder can hear.
        """
        config: Any = self.config.encoder_config
        counts = [self.frames(len(clip)) for clip in clips]
        for clip, count in zip(clips, counts, strict=True):
            seconds = len(clip) / self.sample_rate_hz
            if seconds > self.config.max_audio_s or count > (max_frames(config) or count):
                raise UserError(
                    f"a clip is {seconds:.1f} s long, but the encoder hears at most {self.config.max_audio_s:g} s; split it first"
                )
        pieces = [
            self._prepare(np.asarray(clip, dtype=np.float32), count)
            for clip, count in zip(clips, counts, strict=True)
        ]
        longest = max(piece.shape[-1] for piece in pieces)
        fill = [float(silence_level(piece[None])[0]) if reads_mel(config) else 0.0 for piece in pieces]
        return pad_last(pieces, longest, fill), torch.tensor(counts)

    def _prepare(self, clip: np.ndarray, frames: int) -> Tensor:
        extractor = self.feature_extractor
        if reads_mel(self.config.encoder_config):
            # Two encoder frames of silence behind the clip, so that no frame of it mirrors its own end.
            padded = np.pad(clip, (0, 2 * extractor.hop_length * (frames + 2) - len(clip)))
            mel = extractor(
                padded,
                sampling_rate=self.sample_rate_hz,
                padding="do_not_pad",
                truncation=False,
                return_tensors="np",
            )
            return torch.from_numpy(np.asarray(mel["input_features"][0], dtype=np.float32))
        needed = inputs_of_frames(self.config.encoder_config, frames)
        if len(clip) < needed:
            clip = np.pad(clip, (0, needed - len(clip)))
        values = extractor(clip, sampling_rate=self.sample_rate_hz, padding=False, return_tensors="np")
        # The last few samples, less than a frame's step, reach no frame; a batch could not keep them apart from padding.
        return torch.from_numpy(np.asarray(values["input_values"][0][:needed], dtype=np.float32))

    # ---------------------------------------------------------------- text

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        frame_counts: Sequence[int] = (),
    ) -> Rendered:
        """Token ids of a conversation, `frame_counts` giving the length of each of its sounds in order.

        Without the placeholders, the ids are those of `tokenizer.apply_chat_template` on `text_messages(messages)`.
        """
        sounds = len(audio_parts(list(messages)))
        if sounds != len(frame_counts):
            raise ValueError(
                f"the conversation has {sounds} sounds, but {len(frame_counts)} frame counts were given"
            )
        text, places, spans = self._write(messages, add_generation_prompt)
        ids, starts = self._tokenise(text, sorted({*places, *(point for span in spans for point in span)}))
        rendered = Rendered([])
        sizes = [self.num_vectors(count) for count in frame_counts]
        before = 0
        shift = {}
        for place, size in zip(places, sizes, strict=True):
            at = starts[place]
            rendered.input_ids += ids[before:at]
            first = len(rendered.input_ids)
            rendered.input_ids += [self.audio_token_id] * size
            rendered.audio_spans.append((first, first + size))
            before = at
        rendered.input_ids += ids[before:]
        # A token's place among the ids with placeholders: every sound that stands before it moves it along.
        for point in {point for span in spans for point in span}:
            moved = sum(size for place, size in zip(places, sizes, strict=True) if place <= point)
            shift[point] = starts[point] + moved
        for start, end in spans:
            rendered.answer_spans.append((shift[start], self._end_of_turn(rendered.input_ids, shift[end])))
        return rendered

    def text_messages(self, messages: Sequence[Message], marks: bool = False) -> list[Message]:
        """The conversation as plain text: sounds left out, transcripts in their place where the config says so.

        `marks`: leave a mark where each sound is and around each assistant turn that is to be learned.
        """
        out = []
        for message in messages:
            content = message["content"]
            text = content if isinstance(content, str) else self._join(content)
            for mark in (ANSWER, END) if not isinstance(content, str) else (AUDIO, ANSWER, END):
                text = text.replace(mark, "")
            if not marks:
                text = text.replace(AUDIO, "")
            elif message["role"] == "assistant" and message.get("train", True):
                text = f"{ANSWER}{text}{END}"
            out.append({"role": message["role"], "content": text})
        return out

    def _join(self, parts: Sequence[dict[str, Any]]) -> str:
        """Texts and transcripts of a turn, a line each; a mark where each sound is, in front of what follows it."""
        text, marks = "", ""
        for part in parts:
            if part["type"] == "audio":
                marks += AUDIO
                transcript = (part.get("transcript") or "").strip() if self.config.use_transcript else ""
                piece = f'"{transcript}"' if transcript else ""
            elif part["type"] == "text":
                piece = part["text"].replace(AUDIO, "")
            else:
                raise UserError(f"a message has a part of type {part['type']!r}; expected audio or text")
            if piece:
                text += ("\n" if text.strip(AUDIO) else "") + marks + piece
                marks = ""
        return text + marks

    def _write(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[int], list[tuple[int, int]]]:
        """The template's text without marks, character positions of the sounds, and character spans of the answers."""
        plain = self._template(self.text_messages(messages), add_generation_prompt)
        marked_turns = self.text_messages(messages, marks=True)
        marked = self._template(marked_turns, add_generation_prompt)
        if _unmarked(marked) != plain:
            # Many templates trim a turn, which marks at its ends prevent: trim inside them.
            for turn in marked_turns:
                turn["content"] = _trimmed(turn["content"])
            marked = self._template(marked_turns, add_generation_prompt)
        if _unmarked(marked) != plain:
            raise UserError(
                "the tokenizer's chat template changes the text of a turn, so that sounds and answers cannot be placed in it; "
                "set tokenizer.chat_template to one that leaves turns as they are"
            )
        places: list[int] = []
        spans: list[tuple[int, int]] = []
        position, opened = 0, 0
        for character in marked:
            if character == AUDIO:
                places.append(position)
            elif character == ANSWER:
                opened = position
            elif character == END:
                spans.append((opened, position))
            else:
                position += 1
        return plain, places, spans

    def _template(self, messages: list[Message], add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.config.llm or 'the LLM'} has no chat template; "
                "use an instruction-tuned LLM, or set tokenizer.chat_template"
            )
        try:
            # Reasoning models leave out their thoughts when asked to: answers are learned without them.
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.config.llm or 'the LLM'} refuses the conversation: {error}"
            ) from None

    def _tokenise(self, text: str, points: list[int]) -> tuple[list[int], dict[int, int]]:
        """Token ids of a text, and for each character position the number of tokens before it.

        The text is tokenised whole. Where a token reaches across a position, the text is cut there and the two sides are
        tokenised one by one: nothing can stand inside a token.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        starts: dict[int, int] = {}
        for point in points:
            index = next((i for i, (start, end) in enumerate(offsets) if end > point), len(ids))
            if index < len(ids) and offsets[index][0] < point:
                left, starts_left = self._tokenise(text[:point], [p for p in points if p <= point])
                right, starts_right = self._tokenise(text[point:], [p - point for p in points if p > point])
                later = {p + point: len(left) + count for p, count in starts_right.items()}
                return left + right, {**starts_left, **later}
            starts[point] = index
        return ids, starts

    def _end_of_turn(self, ids: list[int], end: int) -> int:
        """Where an answer ends, with the special token that closes the turn when one follows at once or after a space."""
        if self._special is None:
            added = getattr(self.tokenizer, "added_tokens_decoder", {})
            marked = {token for token, entry in added.items() if getattr(entry, "special", False)}
            self._special = marked | set(self.tokenizer.all_special_ids)
        for place in range(end, min(end + 2, len(ids))):
            if ids[place] in self._special:
                return place + 1
        return end

    # ---------------------------------------------------------------- batches, saving

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        sounds: Sequence[np.ndarray] | None = None,
        add_generation_prompt: bool = True,
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """A batch for the model: `input_ids`, `attention_mask` (b, l) and, with sounds, `input_features`, `frame_counts`.

        `sounds`: samples of all audio parts in order, at the processor's rate; read from their `path` when not given.
        """
        parts = [part for conversation in conversations for part in audio_parts(list(conversation))]
        if sounds is None:
            from speech_llm.audio import load_audio

            sounds = [load_audio(part["path"], self.sample_rate_hz) for part in parts]
        if len(sounds) != len(parts):
            raise ValueError(f"the conversations have {len(parts)} sounds, but {len(sounds)} were given")
        batch: dict[str, Tensor] = {}
        counts: list[int] = []
        if parts:
            batch["input_features"], batch["frame_counts"] = self.mel_features(sounds)
            counts = batch["frame_counts"].tolist()
        rows = []
        for conversation in conversations:
            own = len(audio_parts(list(conversation)))
            rows.append(self.render(conversation, add_generation_prompt, counts[:own]).input_ids)
            counts = counts[own:]
        longest = max(len(row) for row in rows)
        batch["input_ids"] = torch.full((len(rows), longest), self.pad_token_id)
        batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
            batch["input_ids"][i, place] = torch.tensor(row)
            batch["attention_mask"][i, place] = 1
        return batch

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write the tokenizer's and feature extractor's files, and the config where the model has not written it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        if not (folder / "config.json").exists():
            self.config.save_pretrained(folder)
        write_json(folder / "processor_config.json", {"processor_class": type(self).__name__})

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], config: SpeechLLMConfig | None = None, **_: Any
    ) -> SpeechLLMProcessor:
        """Load from a folder or hub id that `save_pretrained` wrote."""
        path = Path(folder)
        if not path.is_dir():
            from speech_llm.assets import resolve

            path = Path(resolve(str(folder)))
        return cls(
            AutoTokenizer.from_pretrained(path),
            AutoFeatureExtractor.from_pretrained(path),
            config or SpeechLLMConfig.from_pretrained(path),
        )


def _unmarked(text: str) -> str:
    return text.translate({ord(mark): None for mark in (AUDIO, ANSWER, END)})


def _trimmed(text: str) -> str:
    """A turn's text without the space at its ends, marks kept where they are."""
    marks = AUDIO + ANSWER + END
    front = [c for c in text[: len(text) - len(text.lstrip(marks + " \t\r\n"))] if c in marks]
    back = [c for c in text[len(text.rstrip(marks + " \t\r\n")) :] if c in marks]
    core = text.lstrip(marks + " \t\r\n")
    core = core.rstrip(marks + " \t\r\n") if core else ""
    if not core:
        return "".join(front)
    return "".join(front) + core + "".join(back)
