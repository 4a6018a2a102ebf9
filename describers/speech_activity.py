"""Where in a recording somebody speaks: a Clip goes in, spans of speech and the energy of every frame come out.

The detector is Silero VAD (MIT licence), the ONNX file of its "sequence" model run by onnxruntime: it hears a whole window
at once, which is many times faster than the same network frame by frame. WebRTC's detector is faster still, but takes
animals and machines for speech.

Everything that is said about a voice rests on these spans, so that noise and silence never get a voice's attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from describers.records import Clip, windows
from describers.silence import SILENCE_DBFS, loudest_dbfs
from speech_llm.audio import SAMPLE_RATE_HZ

# The detector's own frame. Frames begin anew in every window of a long recording.
FRAME = 512
# A probability above this begins speech (the library's default); shorter bursts of speech are clicks and coughs, shorter
# gaps belong to the speech (closures of plosives last up to 0.1 s).
SPEECH_PROBABILITY = 0.5
LEAST_SPEECH_S = 0.1
LEAST_GAP_S = 0.1
# Quiet recordings are raised to this level before they are listened to (of the loudest 50 ms): the network was trained
# on speech of usual levels and misses some at -50 dBFS.
_LISTENING_DBFS = -20.0


@dataclass(frozen=True)
class Activity:
    """Speech in a clip.

    `spans`: (start_s, end_s) of each stretch of speech, in order. `start_s`, `energy`: (frames,) of consecutive frames of
    32 ms (the last of a window shorter), when each begins and its mean square, the window's mean (DC offset) removed.
    """

    spans: tuple[tuple[float, float], ...]
    start_s: np.ndarray
    energy: np.ndarray

    @property
    def speech_s(self) -> float:
        """Seconds of speech."""
        return sum(end_s - start_s for start_s, end_s in self.spans)

    def pauses(self, least_s: float) -> list[tuple[float, float]]:
        """(start_s, end_s) of the gaps between stretches of speech that last at least `least_s`."""
        gaps = [(left[1], right[0]) for left, right in zip(self.spans, self.spans[1:], strict=False)]
        return [gap for gap in gaps if gap[1] - gap[0] >= least_s]

    def inside(self, time_s: np.ndarray, before_s: float = 0.0, after_s: float = 0.0) -> np.ndarray:
        """(n,) of bool: which times lie in speech, its spans widened by `before_s` and `after_s`."""
        mask = np.zeros(len(time_s), bool)
        for start_s, end_s in self.spans:
            first, last = np.searchsorted(time_s, [start_s - before_s, end_s + after_s])
            mask[first:last] = True
        return mask

    def within(self, start_s: float, end_s: float) -> bool:
        """Whether any speech lies between two times."""
        return any(start < end_s and end > start_s for start, end in self.spans)

    def speech_dbfs(self) -> float:
        """Root-mean-square level over the frames of speech, dB re full scale; over all frames where none is speech."""
        mask = self.inside(self.start_s + FRAME / SAMPLE_RATE_HZ / 2)
        chosen = self.energy[mask] if mask.any() else self.energy
        power = float(chosen.mean()) if len(chosen) else 0.0
        return 10 * math.log10(power) if power > 0 else -math.inf


def speech_activity(clip: Clip) -> Activity:
    """Speech in `clip`, measured once and kept in `clip.measured`; long recordings window by window."""
    if "speech" not in clip.measured:
        clip.measured["speech"] = _measure(clip)
    found: Activity = clip.measured["speech"]
    return found


def _measure(clip: Clip) -> Activity:
    spans: list[tuple[float, float]] = []
    starts: list[np.ndarray] = []
    energies: list[np.ndarray] = []
    for window_s, samples in windows(clip):
        samples = samples - samples.mean()
        count = math.ceil(len(samples) / FRAME)
        padded = np.pad(samples, (0, count * FRAME - len(samples))).reshape(count, FRAME)
        lengths = np.full(count, FRAME)
        lengths[-1] = len(samples) - (count - 1) * FRAME
        energies.append(np.square(padded, dtype=np.float64).sum(axis=1) / lengths)
        starts.append(window_s + np.arange(count) * (FRAME / SAMPLE_RATE_HZ))
        for start_s, end_s in _spans(samples):
            if spans and window_s + start_s - spans[-1][1] < LEAST_GAP_S:
                spans[-1] = (spans[-1][0], window_s + end_s)
            else:
                spans.append((window_s + start_s, window_s + end_s))
    empty = [np.zeros(0)]
    return Activity(tuple(spans), np.concatenate(starts or empty), np.concatenate(energies or empty))


def _spans(samples: np.ndarray) -> list[tuple[float, float]]:
    """Speech in one window (float32 at 16 kHz, no DC offset): (start_s, end_s) within it."""
    level_dbfs = loudest_dbfs(samples)
    if level_dbfs <= SILENCE_DBFS:
        return []
    gain = 10 ** (max(_LISTENING_DBFS - level_dbfs, 0.0) / 20)
    detector, spans_of = _silero()
    found = spans_of(
        detector.audio_forward(samples * np.float32(gain)),
        sampling_rate=SAMPLE_RATE_HZ,
        threshold=SPEECH_PROBABILITY,
        min_speech_duration_ms=round(1000 * LEAST_SPEECH_S),
        min_silence_duration_ms=round(1000 * LEAST_GAP_S),
        speech_pad_ms=0,
        audio_length_samples=len(samples),
    )
    return [(span["start"] / SAMPLE_RATE_HZ, span["end"] / SAMPLE_RATE_HZ) for span in found]


@lru_cache(maxsize=1)
def _silero() -> tuple[Any, Any]:
    """The network and the library's rule from probabilities to spans."""
    import torch

    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    torch.set_num_threads(threads)  # the library sets it to 1 for the whole process when imported
    return load_silero_vad(sequence=True), get_speech_timestamps_from_probs
