"""What is said, by any Whisper model of transformers: greedy decoding in batches, silence left untranscribed.

Recordings of any length: up to 30 s in one window, longer ones in consecutive windows cut at quiet places, each a
segment with its times. Whisper was trained on sound padded to 30 s; here the encoder gets only the clip's own length
and some silence after it (see `pad_s`), which costs a fraction and, measured below, no accuracy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from describers.records import Attribute, Clip, windows
from describers.whisper import WINDOW_S, Heard, Whisper
from speech_llm.audio import SAMPLE_RATE_HZ

# A clip none of whose 50 ms frames is louder than this (dB re full scale) is taken for silence: 16-bit rounding noise
# lies near -98, the quietest real recordings that we met had speech peaks near -45.
SILENCE_DBFS = -65.0
# Whisper's own rule (Radford et al. 2022, section 4.5): no speech when the no-speech token is likely and the text is not.
NO_SPEECH_PROBABILITY = 0.6
LOG_PROBABILITY = -1.0


class TranscriptDescriber:
    """`transcript`, and `segments` (a list of `{"start_s", "end_s", "text"}`) for recordings longer than 30 s.

    `asr`: a model reference (see `speech_llm.assets`); loaded when first needed. `pad_s`: silence after a clip before
    the length is rounded up to whole seconds; None pads to 30 s as in Whisper's training.
    """

    name = "transcript"
    attributes: tuple[str, ...] = ("transcript", "segments")

    def __init__(
        self, asr: str, batch_size: int = 16, pad_s: float | None = 1.0, device: str | None = None
    ) -> None:
        self.asr, self.batch_size, self.pad_s = asr, batch_size, pad_s
        self._device = device
        self._whisper: Whisper | None = None

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        heard: list[list[tuple[float, float, Heard]]] = [[] for _ in clips]
        pieces = ((index, *window) for index, clip in enumerate(clips) for window in windows(clip, WINDOW_S))
        # Four batches at a time, so that equal lengths meet and an hour of sound is never held as a whole.
        while several := list(itertools.islice(pieces, 4 * self.batch_size)):
            for (index, start_s, samples), words in zip(
                several, self._hear([p[2] for p in several]), strict=True
            ):
                heard[index].append((start_s, start_s + len(samples) / SAMPLE_RATE_HZ, words))
        return [self._attributes(segments) for segments in heard]

    def _hear(self, sounds: Sequence[np.ndarray]) -> list[Heard]:
        loud = [index for index, samples in enumerate(sounds) if loudest_dbfs(samples) > SILENCE_DBFS]
        out = [Heard("", 0.0, 1.0) for _ in sounds]
        if loud:
            if self._whisper is None:
                self._whisper = Whisper(self.asr, self._device)
            spoken = self._whisper.transcribe([sounds[index] for index in loud], self.batch_size, self.pad_s)
            for index, words in zip(loud, spoken, strict=True):
                out[index] = words
        return out

    def _attributes(self, segments: list[tuple[float, float, Heard]]) -> dict[str, Attribute]:
        spoken = [(start_s, end_s, words) for start_s, end_s, words in segments if words.text]
        if not spoken:
            return {}
        how = f"Whisper ({self.asr}), greedy"
        confidence = math.exp(float(np.mean([words.log_probability for _, _, words in spoken])))
        found = {
            "transcript": Attribute(" ".join(w.text for _, _, w in spoken), confidence=confidence, how=how)
        }
        if len(segments) > 1:
            rows = [{"start_s": round(a, 2), "end_s": round(b, 2), "text": w.text} for a, b, w in spoken]
            found["segments"] = Attribute(rows, how=f"{how}, windows cut at quiet places")
        return found


def loudest_dbfs(samples: np.ndarray, frame_s: float = 0.05) -> float:
    """Level of the loudest frame in dB re full scale, the mean (DC offset) removed."""
    frame = round(frame_s * SAMPLE_RATE_HZ)
    samples = samples - samples.mean() if len(samples) else samples
    padded = np.pad(samples, (0, -len(samples) % frame)).reshape(-1, frame)
    power = float(np.square(padded, dtype=np.float64).mean(axis=1).max(initial=0.0))
    return 10 * math.log10(power) if power > 0 else -math.inf
