"""Which language is spoken, by the language token of a multilingual Whisper.

Clips in, `language` (ISO 639-1) out. The model was trained to begin a transcript with this token (Radford et al. 2022,
section 2.3); how likely it finds each is the confidence, which nobody has calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache

from describers.classifier import THRESHOLD
from describers.records import Attribute, Clip
from describers.voting import judge
from describers.whisper import WINDOW_S, Whisper
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.errors import UserError

# What `Whisper.transcribe` gives a clip besides itself.
_NEAR_S = 0.5


class LanguageDescriber:
    """`language`, told from `threshold` on. `asr`: a multilingual Whisper, see `speech_llm.assets`; loaded when needed."""

    attributes: tuple[str, ...] = ("language",)

    def __init__(
        self, asr: str, threshold: float = THRESHOLD, batch_size: int = 16, device: str | None = None
    ) -> None:
        self.asr, self.threshold, self.batch_size = asr, threshold, batch_size
        self.name = f"language={asr} from {threshold:g}"
        self.models: tuple[str, ...] = (asr,)
        self._device = device
        self._whisper: Whisper | None = None
        self._codes: list[str] = []

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        found: list[dict[str, Attribute]] = []
        for probabilities in judge(clips, self._listen):
            found.append({})
            if probabilities is not None and probabilities.max() >= self.threshold:
                best = int(probabilities.argmax())
                how = f"language token of Whisper ({self.asr})"
                found[-1]["language"] = Attribute(
                    self._codes[best], confidence=float(probabilities[best]), how=how
                )
        return found

    @torch.inference_mode()
    def _listen(self, sounds: list[np.ndarray]) -> list[np.ndarray | None]:
        whisper = self._load()
        seconds = [int(min(np.ceil(len(sound) / SAMPLE_RATE_HZ + _NEAR_S), WINDOW_S)) for sound in sounds]
        out: list[np.ndarray | None] = [None] * len(sounds)
        for length in sorted(set(seconds)):  # padded to the same length, so that no batch-mate is heard
            members = [index for index, own in enumerate(seconds) if own == length]
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                states = whisper.encode([sounds[index] for index in batch], length)
                start_token = torch.full((len(batch), 1), whisper.start)
                cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
                logits = whisper._step(start_token, states, cache)
                likely = logits[:, whisper.languages].log_softmax(-1).cpu().numpy()
                for index, row in zip(batch, likely, strict=True):
                    out[index] = row
        return out

    def _load(self) -> Whisper:
        if self._whisper is None:
            whisper = Whisper(self.asr, self._device)
            if not whisper.languages:
                raise UserError(
                    f"{self.asr} knows one language only; name a multilingual Whisper, as in "
                    "--use language=openai/whisper-base"
                )
            tokens = whisper.tokenizer.convert_ids_to_tokens(whisper.languages)
            self._codes = [str(token).strip("<|>") for token in tokens]
            self._whisper = whisper
        return self._whisper
