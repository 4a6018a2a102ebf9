"""Whisper as plain functions: sounds in, words out. The encoder hears a clip and a stand-in for the silence after it.

Whisper was trained on 30 s, and on a short clip nearly all the work goes into silence. Left out, that silence is
missed: the decoder no longer sees that the speech has ended and repeats itself. So the encoder gets the clip and 1 s
of silence whose frames bear positions spread evenly over the rest of the 30 s, and the decoder sees each of them four
times. What still looks like a loop is done again with all 30 s.

Measured with tiny.en on 130 short recordings, % words wrong (CPU seconds, one core, for 400 s of sound):

    corpus (clips)         30 s         this         clip + 1 s of silence
    LibriSpeech (18)       4.7          4.1          21.0
    RAVDESS (24)           1.4          2.1          280.6
    Speech Commands (40)   15.0         15.0         1205.0
    telephone prompts (32) 2.5          2.5          109.0
    speechocean762 (16)    41.1         36.8         115.8
    seconds                156          30           49

Why not the library's `generate`: it insists on 30 s of input, and it tells the probability of "no speech" and of the
text only through a long-form path that decodes everything again at other temperatures when it is in doubt.
"""

from __future__ import annotations

import copy
import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from speech_llm.audio import SAMPLE_RATE_HZ

WINDOW_S = 30.0
FRAMES_PER_S = 50
# Silence that follows a clip at its true place; the frames that stand for the rest of the 30 s; how often the decoder
# sees each of those. Fewer frames or no repetition: more loops; more of either: slower, and no word better.
_NEAR_S = 0.5
_FAR_FRAMES = 50
_FAR_REPEATS = 4
# Fast speech has about 6 words a second, 1.3 tokens a word; what runs longer is a loop.
_TOKENS_PER_S = 10
# A language that is less likely than this is looked for again in 30 s: base then tells it of 76 % of the clips of learners of
# English instead of 69 %, and 89 % of these are right instead of 75 % (docs/results/describers.md).
SURE_OF_LANGUAGE = 0.9
# Text that zlib packs better than this repeats itself (Radford et al. 2022, section 4.5).
_LOOP_RATIO = 2.4


@dataclass
class Heard:
    """The words of one sound: text, mean token log-probability, probability that nothing is spoken.

    `loop`: the text repeats itself or never ended, so that it is not what was said. `language`: probability of the language
    in which it is written, 1 where the model knows one only.
    """

    text: str
    log_probability: float
    no_speech: float
    loop: bool = False
    language: float = 1.0


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
        multilingual = "<|transcribe|>" in self.tokenizer.get_vocab() and bool(
            getattr(settings, "is_multilingual", model.config.vocab_size >= 51865)
        )
        self.languages = (
            sorted((getattr(settings, "lang_to_id", None) or {}).values()) if multilingual else []
        )
        # ISO 639-1, in the order of `languages`; Whisper has an old code for Javanese.
        tokens = self.tokenizer.convert_ids_to_tokens(self.languages)
        self.codes = [{"jw": "jv"}.get(code, code) for code in (str(token).strip("<|>") for token in tokens)]
        self.never = torch.tensor(
            sorted({*(settings.suppress_tokens or []), *range(self.end + 1, model.config.vocab_size)})
        )
        self.never_first = torch.tensor(sorted({*(settings.begin_suppress_tokens or []), self.end}))

    def _token(self, text: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(text))

    def transcribe(
        self,
        sounds: Sequence[np.ndarray],
        batch_size: int = 16,
        padded: bool = False,
        languages: Sequence[str | None] | None = None,
    ) -> list[Heard]:
        """The words of each sound (float32 mono at 16 kHz, at most 30 s).

        `languages`: ISO 639-1 codes of those that are known; a multilingual model finds the others by itself.
        `padded`: give the encoder 30 s of every sound, as in Whisper's training. Only sounds of equal length after
        rounding up to whole seconds share a batch, so that a result does not depend on its batch-mates.
        """
        languages = languages or [None] * len(sounds)

        def write(places: Sequence[int], states: torch.Tensor) -> list[Heard]:
            limits = [
                int(len(sounds[place]) / SAMPLE_RATE_HZ * _TOKENS_PER_S) + _TOKENS_PER_S for place in places
            ]
            return self._decode(states, limits, [languages[place] for place in places])

        def doubtful(heard: Heard) -> bool:
            return heard.loop or heard.language < SURE_OF_LANGUAGE

        return self._listen(sounds, batch_size, padded, write, doubtful)

    def languages_of(
        self, sounds: Sequence[np.ndarray], batch_size: int = 16, padded: bool = False
    ) -> list[np.ndarray]:
        """Log-probabilities (languages,) of each sound; `transcribe` without the words. For multilingual models only."""

        def name(_: Sequence[int], states: torch.Tensor) -> np.ndarray:
            return self.language_log_probabilities(states).cpu().numpy()

        def doubtful(row: np.ndarray) -> bool:
            return bool(np.exp(row.max()) < SURE_OF_LANGUAGE)

        return self._listen(sounds, batch_size, padded, name, doubtful)

    def _listen(
        self,
        sounds: Sequence[np.ndarray],
        batch_size: int,
        padded: bool,
        hear: Callable[[Sequence[int], torch.Tensor], Iterable[Any]],
        doubtful: Callable[[Any], bool],
    ) -> list[Any]:
        """What `hear` makes of each sound, told places in `sounds` and what the decoder shall see of them; what is `doubtful` of a
        sound that was padded to less than 30 s is heard again with all of them. See `transcribe`."""
        out: list[Any] = [None] * len(sounds)
        whole = int(WINDOW_S)
        padded_to = [
            whole if padded else min(math.ceil(len(sound) / SAMPLE_RATE_HZ + _NEAR_S), whole)
            for sound in sounds
        ]
        left = list(range(len(sounds)))
        while left:
            groups: dict[int, list[int]] = {}
            for place in left:
                groups.setdefault(padded_to[place], []).append(place)
            for seconds, members in sorted(groups.items()):
                for start in range(0, len(members), batch_size):
                    batch = members[start : start + batch_size]
                    states = self.encode([sounds[place] for place in batch], seconds)
                    for place, found in zip(batch, hear(batch, states), strict=True):
                        out[place] = found
            left = [place for place in left if padded_to[place] < whole and doubtful(out[place])]
            for place in left:
                padded_to[place] = whole
        return out

    @torch.inference_mode()
    def encode(self, sounds: Sequence[np.ndarray], seconds: int) -> torch.Tensor:
        """What the decoder shall see (sounds, frames, width) of sounds padded to `seconds` and the silence after them."""
        encoder = self.model.model.encoder
        near, all_frames = seconds * FRAMES_PER_S, encoder.config.max_source_positions
        far = min(_FAR_FRAMES, all_frames - near)
        padded = np.zeros((len(sounds), (near + far) * SAMPLE_RATE_HZ // FRAMES_PER_S), np.float32)
        for row, samples in zip(padded, sounds, strict=True):
            row[: len(samples)] = samples
        features = self.processor.feature_extractor(
            list(padded),
            sampling_rate=SAMPLE_RATE_HZ,
            padding="do_not_pad",
            truncation=False,
            return_tensors="pt",
        ).input_features
        places = torch.cat([torch.arange(near), torch.linspace(near, all_frames - 1, far).round().long()])
        states = at_positions(encoder, places)(features.to(self.device, self.model.dtype)).last_hidden_state
        repeats = min(_FAR_REPEATS, (all_frames - near) // far) if far else 1
        return torch.cat([states[:, :near], states[:, near:].repeat_interleave(repeats, dim=1)], dim=1)

    @torch.inference_mode()
    def _decode(self, states: torch.Tensor, limit: Sequence[int], known: Sequence[str | None]) -> list[Heard]:
        """Greedy decoding of encoder states (n, frames, width); `limit`: most tokens for each row; `known`: its language."""
        count = len(states)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self._begin(states, cache)
        no_speech = logits.softmax(-1)[:, self.no_speech].tolist()
        prompt = torch.full((count, 1), self.no_timestamps)
        sure = [1.0] * count
        if self.languages:
            likely = logits[:, self.languages].softmax(-1).cpu()
            for row, code in zip(likely, known, strict=True):
                if code in self.codes:
                    row[:] = 0.0
                    row[self.codes.index(code)] = 1.0
            probability, best = likely.max(-1)
            sure, spoken = probability.tolist(), torch.tensor(self.languages)[best]
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
        texts = [
            " ".join(text.split()) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]
        return [
            Heard(
                text,
                total / max(len(ids), 1),
                silent,
                loop=ids[-1] != self.end or _repeats(text),
                language=share,
            )
            for text, total, ids, silent, share in zip(texts, sums, tokens, no_speech, sure, strict=True)
        ]

    @torch.inference_mode()
    def language_log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """(n, languages) of encoder states (n, frames, width): how likely each of `languages` is."""
        logits = self._begin(states, EncoderDecoderCache(DynamicCache(), DynamicCache()))
        return logits[:, self.languages].log_softmax(-1)

    def _begin(self, states: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits (n, vocabulary) of what comes first in a transcript: the language, or that nothing is spoken."""
        return self._step(torch.full((len(states), 1), self.start), states, cache)

    def _step(self, ids: torch.Tensor, states: torch.Tensor, cache: Any) -> torch.Tensor:
        decoder = self.model.model.decoder
        out = decoder(
            input_ids=ids.to(self.device), encoder_hidden_states=states, past_key_values=cache, use_cache=True
        )
        return self.model.proj_out(out.last_hidden_state[:, -1]).float()


_in_use: weakref.WeakValueDictionary[tuple[str, str | None], Whisper] = weakref.WeakValueDictionary()


def shared_whisper(reference: str, device: str | None = None) -> Whisper:
    """The one `Whisper` of this reference for all who ask for it; let go when none of them is left."""
    whisper = _in_use.get((reference, device))
    if whisper is None:
        whisper = _in_use[reference, device] = Whisper(reference, device)
    return whisper


def at_positions(encoder: Any, positions: torch.Tensor) -> Any:
    """A view of a Whisper encoder, sharing its weights, whose frames bear these positions (instead of 0 ... 1499)."""
    view = copy.copy(encoder)
    view.config = copy.copy(encoder.config)
    view.config.max_source_positions = len(positions)
    view._modules = dict(encoder._modules)
    table = encoder.embed_positions.weight
    view._modules["embed_positions"] = nn.Embedding.from_pretrained(table[positions.to(table.device)])
    return view


def _repeats(text: str) -> bool:
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) > _LOOP_RATIO if raw else False
