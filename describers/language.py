"""Which language is spoken, by the language token of a multilingual Whisper.

Clips in, `language` (ISO 639-1) out. The model was trained to begin a transcript with this token (Radford et al. 2022,
section 2.3); how likely it finds each is the confidence, which nobody has calibrated (docs/results/describers.md has how right it is).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from describers.classifier import THRESHOLD
from describers.records import Attribute, Clip
from describers.voting import judge
from describers.whisper import Whisper, shared_whisper
from speech_llm.errors import UserError


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

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        found: list[dict[str, Attribute]] = []
        for probabilities in judge(clips, self._listen, of_speech=True):  # it finds a language in any noise
            found.append({})
            if probabilities is not None and probabilities.max() >= self.threshold:
                best = int(probabilities.argmax())
                how = f"language token of Whisper ({self.asr})"
                found[-1]["language"] = Attribute(
                    self._load().codes[best], confidence=float(probabilities[best]), how=how
                )
        return found

    def _listen(self, sounds: list[np.ndarray]) -> list[np.ndarray | None]:
        return list(self._load().languages_of(sounds, self.batch_size))

    def _load(self) -> Whisper:
        if self._whisper is None:
            whisper = shared_whisper(self.asr, self._device)
            if not whisper.languages:
                raise UserError(
                    f"{self.asr} knows one language only; name a multilingual Whisper, as in "
                    "--use language=openai/whisper-base"
                )
            self._whisper = whisper
        return self._whisper
