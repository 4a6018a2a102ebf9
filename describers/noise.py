"""How noisy a recording of speech is: the signal-to-noise ratio (SNR), and a word for it.

The noise is measured in the pauses that the voice activity detector leaves, and subtracted, band by band, from what is
there while somebody speaks. In speech without a pause it is the floor to which every band falls between the
sounds: a low quantile of the smoothed power (after Martin 2001, "minimum statistics").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from describers.records import Attribute, Clip, windows
from describers.speech_activity import Activity, speech_activity
from speech_llm.audio import SAMPLE_RATE_HZ

_FRAME, _HOP = 512, 256
# Speech dies away after the detector lets go, and begins before it notices.
_BEFORE_S, _AFTER_S = 0.05, 0.1
# So many seconds of pauses are enough to measure steady noise.
LEAST_PAUSES_S = 0.3
LEAST_SPEECH_S = 0.3
# The floor under speech without pauses is looked for in this much of it (Martin 2001 takes windows of 1.5 s): a single
# word has no moment in which every band has fallen to it.
LEAST_WITHOUT_PAUSES_S = 1.5
# Frames in pauses this much louder than their median are breaths, clicks, a missed word: events, not the noise.
_EVENT_DB = 6.0
# Digital silence has no noise: padding, or a gate that cut it away (16-bit rounding noise lies at -98 dBFS).
_ALIVE_DBFS = -90.0
# Smoothing over 5 frames, then the 3 % quantile: `python -m describers.measure noise` shows how near that comes.
_SMOOTH, _QUANTILE = 5, 0.03
# Beyond this the speech's own decay and the recorder decide, not the room.
HIGHEST_DB = 45.0
# The floor in speech without pauses may be the speech itself from here on (11 dB in clean synthetic speech of vowels
# alone), so that the noise may well be weaker; far above the limit of "clean" the word is certain all the same.
HIGHEST_WITHOUT_PAUSES_DB = 8.0
CLEAN_WITHOUT_PAUSES_DB = 28.0
# 15 dB is the least for effortless listening (ANSI/ASA S12.60, and full modulation transfer in IEC 60268-16: STI rises
# with SNR up to +15 dB). 10 dB more halve the loudness of the noise again (Stevens 1955); then it is hardly noticed.
NOISY_DB, CLEAN_DB = 15.0, 25.0


class NoiseDescriber:
    """`snr_db` (power of the speech over power of the noise), `noise` (clean, slightly noisy, noisy).

    For noise that is as steady as a fan, rain or traffic; a sound that comes and goes (hens, a babble of voices) is
    underestimated (docs/results/describers_signal.md). Reverberation counts as noise where it fills the pauses. Nothing
    without 0.3 s of speech, or 1.5 s of it where there are no pauses. Speech without pauses hides weak noise: from 8 dB on
    there is no number, and only from 28 dB on a word again, "clean".
    """

    name = "noise"
    attributes: tuple[str, ...] = ("noise", "snr_db")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        measured = measure_snr(clip)
        if measured is None:
            return {}
        limits = f"noisy is below {NOISY_DB:g} dB, clean from {CLEAN_DB:g} dB on"
        told = {}
        if measured.pauses or not HIGHEST_WITHOUT_PAUSES_DB < measured.snr_db < CLEAN_WITHOUT_PAUSES_DB:
            told["noise"] = Attribute(noise_band(measured.snr_db), how=f"{measured.how}, {limits}")
        if measured.pauses or measured.snr_db <= HIGHEST_WITHOUT_PAUSES_DB:
            told["snr_db"] = Attribute(round(measured.snr_db, 1), "dB", how=measured.how)
        return told


def noise_band(snr_db: float) -> str:
    """noisy, slightly noisy or clean."""
    return "noisy" if snr_db < NOISY_DB else "clean" if snr_db >= CLEAN_DB else "slightly noisy"


@dataclass(frozen=True)
class Measured:
    """An SNR in dB, what it rests on, and whether there were pauses to measure the noise in."""

    snr_db: float
    how: str
    pauses: bool


@dataclass
class _Sums:
    """Power spectra of a clip added up over its windows: with speech, in pauses, and the floor while there is speech."""

    speech: np.ndarray = field(default_factory=lambda: np.zeros(_FRAME // 2))
    pauses: np.ndarray = field(default_factory=lambda: np.zeros(_FRAME // 2))
    floor: np.ndarray = field(default_factory=lambda: np.zeros(_FRAME // 2))
    speech_frames: int = 0
    pause_frames: int = 0

    def add(self, start_s: float, samples: np.ndarray, activity: Activity) -> None:
        if len(samples) < _FRAME * _SMOOTH:
            return
        power = power_spectra(samples)
        time_s = start_s + (np.arange(len(power)) * _HOP + _FRAME / 2) / SAMPLE_RATE_HZ
        total = power.sum(axis=1)
        alive = total > _FRAME * 10 ** (_ALIVE_DBFS / 10) / 2
        speech = activity.inside(time_s) & alive
        pause = ~activity.inside(time_s, _BEFORE_S, _AFTER_S) & alive
        if pause.any():
            pause &= total <= 10 ** (_EVENT_DB / 10) * np.median(total[pause])
            self.pauses += power[pause].sum(axis=0)
            self.pause_frames += int(pause.sum())
        if speech.any():
            self.speech += power[speech].sum(axis=0)
            self.floor += floor_spectrum(power[alive]) * speech.sum()
            self.speech_frames += int(speech.sum())


def measure_snr(clip: Clip) -> Measured | None:
    """The SNR of a clip, measured once; None where there is too little speech."""
    if "snr" not in clip.measured:
        clip.measured["snr"] = _measure(clip)
    found: Measured | None = clip.measured["snr"]
    return found


def _measure(clip: Clip) -> Measured | None:
    activity = speech_activity(clip)
    if activity.speech_s < LEAST_SPEECH_S:
        return None
    sums = _Sums()
    for start_s, samples in windows(clip):
        sums.add(start_s, samples - samples.mean(), activity)
    if sums.speech_frames == 0:
        return None
    speech = sums.speech / sums.speech_frames
    pauses_s = sums.pause_frames * _HOP / SAMPLE_RATE_HZ
    if pauses_s < LEAST_PAUSES_S and activity.speech_s < LEAST_WITHOUT_PAUSES_S:
        return None
    if pauses_s < LEAST_PAUSES_S:
        snr_db = _ratio_db(speech, sums.floor / sums.speech_frames)
        how = "speech against the floor of every band, as there are no pauses"
    else:
        snr_db = _ratio_db(speech, sums.pauses / sums.pause_frames)
        how = f"speech against the noise in {pauses_s:.1f} s without speech"
    if snr_db > HIGHEST_DB:
        snr_db, how = HIGHEST_DB, f"{how}; at least {HIGHEST_DB:g} dB"
    return Measured(snr_db, how, pauses_s >= LEAST_PAUSES_S)


def power_spectra(samples: np.ndarray) -> np.ndarray:
    """Power in the bands from 31 Hz to 8 kHz, every 16 ms: samples (n,) at 16 kHz in, (frames, 256) out."""
    window = np.hanning(_FRAME + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, _FRAME)[::_HOP]
    spectra = np.fft.rfft(frames * window, axis=1)[:, 1:]
    power: np.ndarray = (np.square(spectra.real) + np.square(spectra.imag)) / np.square(window).sum()
    return power


def floor_spectrum(power: np.ndarray) -> np.ndarray:
    """The mean power of steady noise under a changing sound: (frames, bands) in, (bands,) out."""
    sums = np.concatenate([np.zeros((1, power.shape[1])), np.cumsum(power, axis=0, dtype=np.float64)])
    smooth = (sums[_SMOOTH:] - sums[:-_SMOOTH]) / _SMOOTH
    floor: np.ndarray = np.quantile(smooth if len(smooth) else power, _QUANTILE, axis=0) * _quantile_to_mean()
    return floor


@lru_cache(maxsize=1)
def _quantile_to_mean() -> float:
    """Mean over quantile of the smoothed power of white noise, by which the quantile underestimates steady noise."""
    noise = np.random.default_rng(0).normal(size=60 * SAMPLE_RATE_HZ).astype(np.float32)
    power = power_spectra(noise)
    smooth = np.lib.stride_tricks.sliding_window_view(power, _SMOOTH, axis=0).mean(axis=-1)
    return float(power.mean() / np.quantile(smooth, _QUANTILE, axis=0).mean())


def _ratio_db(with_speech: np.ndarray, noise: np.ndarray) -> float:
    signal = float(np.maximum(with_speech - noise, 0.0).sum())
    return 10 * math.log10(max(signal, 1e-12) / max(float(noise.sum()), 1e-12))
