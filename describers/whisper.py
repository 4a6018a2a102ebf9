"""Whisper as plain functions: sounds in, words out. Encoder on the clip's own length, greedy batched decoding.

Why not the library's `generate`: it insists on 30 s of input, and it tells the probability of "no speech" and of the
text only through a long-form path that decodes everything again at other temperatures when it is in doubt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from speech_llm.audio import SAMPLE_RATE_HZ

WINDOW_S = 30.0
# Fast speech has about 6 words a second, 1.3 tokens a word; what runs longer is a loop.
_TOKENS_PER_S = 10


@dataclass
class Heard:
    """The words of one sound: text, mean token log-probability, probability that nothing is spoken."""

    text: str
    log_probability: float
    no_speech: float


class Whisper:
    """A Whisper model of transformers and its tokenizer. `reference`: see `speech_llm.assets.load_whisper`."""

    def __init__(self, reference: str, device: str | None = None) -> None:
        from speech_llm.assets import load_whisper

        model, self.processor = load_whisper(reference)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        settings = model.generation_config
        self.start = self._token("<|startoftranscript|>")
        self.end = self._token("<|endoftext|>")
        self.no_timestamps = self._token("<|notimestamps|>")
        self.no_speech = (
            self.no_timestamps - 1
        )  # called <|nospeech|> or <|nocaptions|>, always the one before
        tokens = self.tokenizer.get_vocab()
        multilingual = "<|transcribe|>" in tokens and bool(
            getattr(settings, "is_multilingual", model.config.vocab_size >= 51865)
        )
        self.languages = (
            sorted((getattr(settings, "lang_to_id", None) or {}).values()) if multilingual else []
        )
        self.never = torch.tensor(
            sorted({*(settings.suppress_tokens or []), *range(self.end + 1, model.config.vocab_size)})
        )
        self.never_first = torch.tensor(sorted({*(settings.begin_suppress_tokens or []), self.end}))

    def _token(self, text: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(text))

    def transcribe(
        self, sounds: Sequence[np.ndarray], batch_size: int = 16, pad_s: float | None = 1.0
    ) -> list[Heard]:
        """The words of each sound (float32 mono at 16 kHz, at most 30 s).

        `pad_s`: silence after each sound, before its length is rounded up to whole seconds; None pads to 30 s. Only
        sounds of equal padded length share a batch, so that a result does not depend on its batch-mates' lengths.
        """
        groups: dict[int, list[int]] = {}
        for index, samples in enumerate(sounds):
            groups.setdefault(_padded_s(len(samples), pad_s), []).append(index)
        out: list[Heard | None] = [None] * len(sounds)
        for seconds, members in sorted(groups.items()):
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                limit = [
                    int(len(sounds[index]) / SAMPLE_RATE_HZ * _TOKENS_PER_S) + _TOKENS_PER_S
                    for index in batch
                ]
                heard = self._decode(self.encode([sounds[index] for index in batch], seconds), limit)
                for index, words in zip(batch, heard, strict=True):
                    out[index] = words
        return [words for words in out if words is not None]

    @torch.inference_mode()
    def encode(self, sounds: Sequence[np.ndarray], seconds: int) -> torch.Tensor:
        """Encoder states (sounds, 50 * seconds, width) of sounds padded with silence to `seconds`."""
        padded = np.zeros((len(sounds), seconds * SAMPLE_RATE_HZ), np.float32)
        for row, samples in zip(padded, sounds, strict=True):
            row[: len(samples)] = samples
        features = self.processor.feature_extractor(
            list(padded),
            sampling_rate=SAMPLE_RATE_HZ,
            padding="do_not_pad",
            truncation=False,
            return_tensors="pt",
        ).input_features
        encoder = shortened(self.model.model.encoder, features.shape[-1] // 2)
        return encoder(features.to(self.device, self.model.dtype)).last_hidden_state

    @torch.inference_mode()
    def _decode(self, states: torch.Tensor, limit: Sequence[int]) -> list[Heard]:
        """Greedy decoding of encoder states (n, frames, width); `limit`: most tokens for each row."""
        count = len(states)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self._step(torch.full((count, 1), self.start), states, cache)
        no_speech = logits.softmax(-1)[:, self.no_speech].tolist()
        prompt = torch.full((count, 1), self.no_timestamps)
        if self.languages:
            spoken = torch.tensor(self.languages)[logits[:, self.languages].argmax(-1).cpu()]
            task = torch.full((count, 1), self._token("<|transcribe|>"))
            prompt = torch.cat([spoken[:, None], task, prompt], dim=1)
        logits = self._step(prompt, states, cache)
        longest = min(max(limit), self.model.config.max_target_positions - 1 - prompt.shape[1])
        tokens: list[list[int]] = [[] for _ in range(count)]
        sums = [0.0] * count
        rows = list(range(count))  # the clip that each row of the batch belongs to
        for position in range(longest):
            logits[:, self.never] = -torch.inf
            if position == 0:
                logits[:, self.never_first] = -torch.inf
            best, chosen = logits.log_softmax(-1).max(-1)
            going = []
            for row, (index, token, probability) in enumerate(
                zip(rows, chosen.tolist(), best.tolist(), strict=True)
            ):
                sums[index] += probability
                tokens[index].append(token)
                if token != self.end and len(tokens[index]) < limit[index]:
                    going.append(row)
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                states, chosen = states[keep], chosen[keep]
                rows = [rows[row] for row in going]
            logits = self._step(chosen[:, None], states, cache)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Heard(" ".join(text.split()), total / max(len(ids), 1), silent)
            for text, total, ids, silent in zip(texts, sums, tokens, no_speech, strict=True)
        ]

    def _step(self, ids: torch.Tensor, states: torch.Tensor, cache: Any) -> torch.Tensor:
        decoder = self.model.model.decoder
        out = decoder(
            input_ids=ids.to(self.device), encoder_hidden_states=states, past_key_values=cache, use_cache=True
        )
        return self.model.proj_out(out.last_hidden_state[:, -1]).float()


def shortened(encoder: Any, frames: int) -> Any:
    """A view of a Whisper encoder, sharing its weights, that takes `2 * frames` mel frames instead of 3000."""
    if frames == encoder.config.max_source_positions:
        return encoder
    view = copy.copy(encoder)
    view.config = copy.copy(encoder.config)
    view.config.max_source_positions = frames
    view._modules = dict(encoder._modules)
    view._modules["embed_positions"] = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:frames])
    return view


def _padded_s(samples: int, pad_s: float | None) -> int:
    if pad_s is None:
        return round(WINDOW_S)
    return min(int(np.ceil(samples / SAMPLE_RATE_HZ + pad_s)), round(WINDOW_S))
