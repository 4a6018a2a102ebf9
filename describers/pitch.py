"""How high a voice is: the fundamental frequency (F0) of the voiced speech, its median, its range, and a word for it.

F0 comes from SwiftF0 (MIT licence), a small convolutional network run by onnxruntime that also says which frames are
voiced. librosa's yin has no such decision, its pyin is slow for a describer, and Praat (parselmouth) is GPL. How fast and
how steady it is through a telephone: `python -m describers.measure speed` and `... pitch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from describers.records import Attribute, Clip, windows
from describers.speech_activity import Activity, speech_activity
from describers.transcript import SILENCE_DBFS, loudest_dbfs
from speech_llm.audio import SAMPLE_RATE_HZ

HOP_S = 0.016
# Voices from a very low bass to a child or an excited woman.
LOWEST_HZ, HIGHEST_HZ = 55.0, 600.0
# Calibrated by SwiftF0's authors: a frame is voiced from here on.
VOICED = 0.5
# With less voiced speech than this the median says more about one vowel than about the voice.
LEAST_VOICED_S = 0.3
# What lies below 0.75 of the lower quartile or above 2.5 times the upper one is taken for an octave error or creak. A choice
# of ours: wide enough for lively speech.
FLOOR_OF_QUARTILE, CEILING_OF_QUARTILE = 0.75, 2.5
# Means of speaking F0: 119 Hz for men and 207 Hz for women, within 3 Hz of what Traunmüller & Eriksson (1995) call typical
# (120 and 210 Hz). The 255 Hz of
# children, some 3.5 semitones above the women, and the 2 semitones around the mean of a group that count as medium are
# choices of ours: a voice outside them is among the higher or lower ones of its group (speakers of one gender differ by
# about 3 semitones: `python -m describers.measure pitch`). With the gender unknown, low and high are what is
# unmistakable: below a high man's voice, above a low woman's.
MEAN_HZ = {"male": 119.0, "female": 207.0, "child": 255.0}
MEDIUM_SEMITONES = 2.0
# A sound that is not speech has a pitch when it is a steady tone: most of it periodic.
TONE_SHARE = 0.8


class PitchDescriber:
    """`pitch_hz` (median F0), `pitch_range_st` (10th to 90th percentile, semitones), `pitch` (low, medium, high).

    Nothing without 0.3 s of voiced speech. A sound without speech gets only `pitch_hz`, and only when it is a tone. The
    word needs a voice; with `gender` or `age_group` known it is relative to that group.
    """

    name = "pitch"
    attributes: tuple[str, ...] = ("pitch", "pitch_hz", "pitch_range_st")
    reads: tuple[str, ...] = ("gender", "age_group")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        if not speech_activity(clip).spans:
            return self._tone(clip)
        voiced = np.concatenate([np.zeros(0), *(hz for _, hz in voiced_pitch(clip))])
        voiced = voiced[voiced > 0]
        if len(voiced):
            lower, upper = np.quantile(voiced, [0.25, 0.75])
            voiced = voiced[(voiced >= FLOOR_OF_QUARTILE * lower) & (voiced <= CEILING_OF_QUARTILE * upper)]
        if len(voiced) * HOP_S < LEAST_VOICED_S:
            return {}
        median_hz = float(np.median(voiced))
        low, high = np.quantile(voiced, [0.1, 0.9])
        how = f"SwiftF0, median of {len(voiced) * HOP_S:.1f} s of voiced speech"
        band, rests_on = pitch_band(median_hz, clip.known)
        return {
            "pitch": Attribute(band, how=f"{how}, {rests_on}"),
            "pitch_hz": Attribute(round(median_hz, 1), "Hz", how=how),
            "pitch_range_st": Attribute(
                round(12 * math.log2(high / low), 1), "st", how="SwiftF0, 10th to 90th percentile of voiced speech"
            ),
        }  # fmt: skip

    def _tone(self, clip: Clip) -> dict[str, Attribute]:
        samples = clip.samples
        if samples is None or loudest_dbfs(samples) <= SILENCE_DBFS:
            return {}
        hz = track(samples, tone=True)
        if len(hz) * HOP_S < LEAST_VOICED_S or (hz > 0).mean() < TONE_SHARE:
            return {}
        median_hz = round(float(np.median(hz[hz > 0])), 1)
        return {"pitch_hz": Attribute(median_hz, "Hz", how="SwiftF0, median of a tone; no speech was found")}


def pitch_band(median_hz: float, known: dict[str, Attribute]) -> tuple[str, str]:
    """low, medium or high, and what the band is relative to; `known` may have `gender` and `age_group`."""
    gender = str(known["gender"].value) if "gender" in known else ""
    group = "child" if "age_group" in known and known["age_group"].value == "child" else gender
    step = 2 ** (MEDIUM_SEMITONES / 12)
    if group in MEAN_HZ:
        low, high = MEAN_HZ[group] / step, MEAN_HZ[group] * step
        whom = {"male": "men", "female": "women", "child": "children"}[group]
    else:
        low, high, whom = MEAN_HZ["male"] * step, MEAN_HZ["female"] / step, "all voices"
    band = "low" if median_hz < low else "high" if median_hz > high else "medium"
    return band, f"medium for {whom} is {low:.0f} to {high:.0f} Hz"


def voiced_pitch(clip: Clip) -> list[tuple[float, np.ndarray]]:
    """`(start_s, hz)` for every window: F0 a frame of 16 ms, 0 where unvoiced or outside speech. Measured once."""
    if "pitch" not in clip.measured:
        activity = speech_activity(clip)
        clip.measured["pitch"] = [
            (start_s, _in_speech(start_s, track(samples), activity))
            for start_s, samples in (windows(clip) if activity.spans else ())
        ]
    found: list[tuple[float, np.ndarray]] = clip.measured["pitch"]
    return found


def track(samples: np.ndarray, tone: bool = False) -> np.ndarray:
    """F0 in Hz of every frame of 16 ms, 0 where unvoiced: float32 mono at 16 kHz in, shape (frames,) out.

    `tone`: the sound may be a pure tone, which the network does not take for a voice below 250 Hz; keeping only the tips
    of the wave, above half its peak, gives it the harmonics of a voice and leaves the fundamental.
    """
    samples = samples - samples.mean()
    if tone:
        samples = np.maximum(samples - 0.5 * np.abs(samples).max(), 0.0)
    hz, confidence = contour(samples)
    return np.where(confidence >= VOICED, hz, 0.0)


def contour(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F0 in Hz of every frame of 16 ms and how sure it is that the frame is voiced, 0 to 1: two arrays of shape (frames,)."""
    peak = float(np.abs(samples).max(initial=0.0))
    if peak == 0:
        silent = np.zeros(len(samples) // 256)
        return silent, silent
    # The network answers with noise below a level of its own, whatever is in the sound.
    found = _swift().detect(samples * np.float32(0.5 / peak), SAMPLE_RATE_HZ, LOWEST_HZ, HIGHEST_HZ)
    return np.asarray(found.pitch_hz, np.float64), np.asarray(found.confidence, np.float64)


def _in_speech(start_s: float, hz: np.ndarray, activity: Activity) -> np.ndarray:
    time_s = start_s + (np.arange(len(hz)) + 0.5) * HOP_S
    return np.where(activity.inside(time_s), hz, 0.0)


@lru_cache(maxsize=1)
def _swift() -> Any:
    from swift_f0 import SwiftF0

    return SwiftF0(threads=1, spin=False)
