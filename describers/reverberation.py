"""How much a room rings: the reverberation time RT60 from speech alone, exactly from an impulse, and a word for it.

Blind, after Wen, Habets & Naylor (2008) and Eaton, Gaubitch & Naylor (2013): in a room no band of a sound can fall faster
than the room lets it, so the steepest falls of the envelopes of speech tell how fast that is. The statistic is the
steepest percent of the slopes of straight lines laid from speech on through 0.13 s and 0.26 s of every band; its relation to RT60 was
fitted on speech convolved with exponentially decaying noise (`python -m describers.measure calibrate`).

Limits, honestly: even dry speech dies away at its own pace, so that below 0.3 s the estimate says little more than
"dry"; a coupled room or a decay of two slopes is one number here; steady noise hides the end of a decay, so that below
`LEAST_SNR_DB` nothing is told. See docs/results/describers_signal.md for what is reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from describers.noise import FRAME, SMOOTH, measure_snr, power_spectra, smoothed
from describers.records import Attribute, Clip, windows
from describers.speech_activity import Activity, speech_activity
from describers.transcript import SILENCE_DBFS, loudest_dbfs
from speech_llm.audio import SAMPLE_RATE_HZ

_HOP = 128  # a frame of 32 ms every 8 ms
# Eight bands with equal ratios in the telephone's range, each wide enough that its envelope does not flutter.
_EDGES = np.round(np.geomspace(250, 3400, 9) / SAMPLE_RATE_HZ * FRAME).astype(int) - 1
# A floor under every band, relative to its loudest frames: falls into digital silence (a gate, padding, synthesis) are no
# room's, and recordings have a floor of their own about there.
_FLOOR_DB = -40.0
# Lengths of the lines in frames, and the share of their slopes that counts as steepest.
_LINES = (16, 32)
_STEEPEST = 0.01
# Slopes are counted in bins up to 2,000 dB/s; a floor 40 dB down leaves no line that falls faster.
_BIN_DB_PER_S, _BINS = 0.1, 20_000
# log RT60 = c0 + c1 log(a) + c2 log(b), a and b the RT60 of the steepest 0.13 s and 0.26 s.
_FIT = (0.887, 0.594, 1.571)
LEAST_SPEECH_S = 2.0
LEAST_SNR_DB = 15.0
# What can be told apart: dry speech looks like 0.2 s, and beyond 2 s hardly anything falls within a word.
LOWEST_S, HIGHEST_S = 0.2, 2.0
# Listening rooms have 0.2 to 0.4 s (ITU-R BS.1116); 0.7 s is the limit for classrooms of up to 20,000 cubic feet
# (ANSI/ASA S12.60). The word is left out within the usual error of a limit.
DRY_S, REVERBERANT_S = 0.4, 0.7
_WORD_MARGIN = 1.15
# An impulse: nearly all before its peak is quiet, and its decay (Schroeder 1965) is a straight line from -5 to -25 dB.
_ONSET_S = 0.05
_STRAIGHT = 0.995


class ReverberationDescriber:
    """`rt60_s` (seconds in which a sound falls by 60 dB), `reverberation` (dry, slightly reverberant, reverberant).

    Of speech of at least 2 s, not noisier than 15 dB; of an impulse (a clap, an impulse response) the number only.
    """

    name = "reverberation"
    attributes: tuple[str, ...] = ("reverberation", "rt60_s")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        activity = speech_activity(clip)
        if not activity.spans:
            rt60 = None if clip.samples is None else impulse_rt60_s(clip.samples)
            how = "decay of an impulse, backward integrated (Schroeder), -5 to -25 dB"
            return {} if rt60 is None else {"rt60_s": Attribute(round(rt60, 2), "s", how=how)}
        noise = measure_snr(clip)
        if activity.speech_s < LEAST_SPEECH_S or noise is None or noise.quietest_db < LEAST_SNR_DB:
            return {}
        rt60 = speech_rt60_s(fall_counts(windows(clip), activity))
        how = "steepest falls of the speech in 8 bands"
        found = {"rt60_s": Attribute(round(rt60, 2), "s", how=how)}
        if (word := reverberation_band(rt60)) is not None:
            limits = f"dry is below {DRY_S:g} s, reverberant above {REVERBERANT_S:g} s"
            found["reverberation"] = Attribute(word, how=f"{how}, {limits}")
        return found


def reverberation_band(rt60_s: float) -> str | None:
    """dry, slightly reverberant or reverberant; None too near to a limit to tell."""
    for limit in (DRY_S, REVERBERANT_S):
        if limit / _WORD_MARGIN < rt60_s < limit * _WORD_MARGIN:
            return None
    return "dry" if rt60_s < DRY_S else "reverberant" if rt60_s > REVERBERANT_S else "slightly reverberant"


def speech_rt60_s(counts: np.ndarray) -> float:
    """RT60 in s from `fall_counts`, within what can be told apart."""
    c0, c1, c2 = _FIT
    first, second = steepest_rt60_s(counts)
    rt60 = math.exp(c0 + c1 * math.log(first) + c2 * math.log(second))
    return min(max(rt60, LOWEST_S), HIGHEST_S)


def steepest_rt60_s(counts: np.ndarray) -> tuple[float, float]:
    """The RT60 in s that the steepest slopes would be, for lines of 0.13 s and of 0.26 s, before any calibration."""
    steepest_first = counts[:, ::-1]
    found = []
    for row in steepest_first:
        place = _STEEPEST * (row.sum() - 1)
        around = np.searchsorted(np.cumsum(row), [math.floor(place), math.ceil(place)], side="right")
        falls = (len(row) - 0.5 - around) * _BIN_DB_PER_S
        found.append(60 / max(float(np.interp(place % 1, [0, 1], falls)), 1.0))
    return found[0], found[1]


def fall_counts(sounds: Iterable[tuple[float, np.ndarray]], activity: Activity | None = None) -> np.ndarray:
    """How many straight lines through the band envelopes fall how steeply: (2, bins), of lines of 0.13 s and of 0.26 s.

    `sounds`: the windows of a recording, each with its start in s, samples at 16 kHz. `activity`: only lines that begin within
    its speech are counted, so that pauses and padding, in which nothing falls, do not thin out the steepest ones; None counts
    all. Bins are 0.1 dB/s wide (an RT60 of 1 s is 60 dB/s), what rises is in the first. Counted and not kept, an hour needs
    no more memory than a minute.
    """
    counts = np.zeros((len(_LINES), _BINS), np.int64)
    for start_s, samples in sounds:
        samples = samples - samples.mean()
        if len(samples) < FRAME + _HOP * (SMOOTH + _LINES[-1]):
            continue
        bands = np.add.reduceat(power_spectra(samples, _HOP), _EDGES, axis=1)[:, :-1]
        time_s = start_s + (np.arange(len(bands)) * _HOP + FRAME / 2) / SAMPLE_RATE_HZ
        spoken = np.ones(len(bands), bool) if activity is None else activity.inside(time_s)
        if not spoken.any():
            continue
        bands = bands + 10 ** (_FLOOR_DB / 10) * np.quantile(bands[spoken], 0.99, axis=0)
        level_db = 10 * np.log10(np.maximum(smoothed(bands), 1e-15))
        for row, length in zip(counts, _LINES, strict=True):
            time = np.arange(length) - (length - 1) / 2
            lines = np.lib.stride_tricks.sliding_window_view(level_db, length, axis=0)
            lines = lines[spoken[: len(lines)]]
            falls = -(lines @ time / (time @ time) * (SAMPLE_RATE_HZ / _HOP)).ravel()
            places = np.clip(falls / _BIN_DB_PER_S, 0, _BINS - 1).astype(int)
            row += np.bincount(places, minlength=_BINS)
    return counts


def impulse_rt60_s(samples: np.ndarray) -> float | None:
    """RT60 in s of an impulse that dies away, None for any other sound: samples (n,) float32 at 16 kHz.

    Schroeder's backward integral from the peak on, a line fitted between -5 and -25 dB and drawn out to -60.
    """
    if loudest_dbfs(samples) <= SILENCE_DBFS:
        return None
    power = np.square(samples - np.median(samples), dtype=np.float64)
    peak = int(np.argmax(power))
    onset = max(peak - round(_ONSET_S * SAMPLE_RATE_HZ), 0)
    if power[:onset].sum() > 0.01 * power[onset:].sum():
        return None
    left = np.cumsum(power[peak:][::-1])[::-1]
    left_db = 10 * np.log10(np.maximum(left / left[0], 1e-12))
    part = np.flatnonzero((left_db <= -5) & (left_db >= -25))
    if len(part) < FRAME or left_db[-1] > -25:
        return None
    time_s = part / SAMPLE_RATE_HZ
    slope = np.polyfit(time_s, left_db[part], 1)[0]
    straight = np.corrcoef(time_s, left_db[part])[0, 1] ** 2
    return None if straight < _STRAIGHT or slope >= 0 else -60 / float(slope)
