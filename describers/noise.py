"""How noisy a recording of speech is: the signal-to-noise ratio (SNR), and a word for it.

The noise is measured in the pauses that the voice activity detector leaves, all of them alike, and subtracted, band by band,
from what is there while somebody speaks. In speech without a pause it is the floor to which every band falls between the
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

FRAME, _HOP = 512, 256
# Speech dies away after the detector lets go, and begins before it notices.
_BEFORE_S, _AFTER_S = 0.05, 0.1
# So many seconds of pauses are enough to measure steady noise.
LEAST_PAUSES_S = 0.3
LEAST_SPEECH_S = 0.3
# The floor under speech without pauses is looked for in this much of it (Martin 2001 takes windows of 1.5 s): a single
# word has no moment in which every band has fallen to it.
LEAST_WITHOUT_PAUSES_S = 1.5
# Frames in pauses this much louder than their median may be breaths, clicks, a missed word, or a noise that comes and goes.
# Nobody can tell from the level alone, so the SNR is taken with them and without them.
_EVENT_DB = 6.0
# The number is told only where that makes no difference to speak of, and where the levels of the pauses lie near each
# other (10th to 90th percentile): a few pauses of a noise that comes and goes are no sample of it. Both limits are choices of
# ours, see docs/results/describers_signal.md.
MOST_APART_DB = 3.0
MOST_SPREAD_DB = 12.0
# Digital silence has no noise: padding, or a gate that cut it away (16-bit rounding noise lies at -98 dBFS).
_ALIVE_DBFS = -90.0
# Smoothing over 5 frames, then the 3 % quantile: `python -m describers.measure noise` shows how near that comes.
SMOOTH, _QUANTILE = 5, 0.03
# Beyond this the speech's own decay and the recorder decide, not the room.
HIGHEST_DB = 45.0
# The floor in speech without pauses may be the speech itself from here on (11 dB in clean synthetic speech of vowels
# alone), so that the noise may well be weaker; far above the limit of "clean" the word is certain all the same.
HIGHEST_WITHOUT_PAUSES_DB = 8.0
CLEAN_WITHOUT_PAUSES_DB = 28.0
# From 15 dB on noise takes nothing more from intelligibility: the speech transmission index rises with SNR up to +15 dB
# (IEC 60268-16). "Clean" from 10 dB more on, where the noise is half as loud (Stevens 1955), is a choice of ours.
NOISY_DB, CLEAN_DB = 15.0, 25.0


class NoiseDescriber:
    """`snr_db` (power of the speech over power of the noise), `noise` (clean, slightly noisy, noisy).

    The number is told of noise as steady as a fan, rain or a kitchen; of what comes and goes (hens, bursts) there is at most
    a word, where it is the same with and without the loudest moments of the pauses. Other voices are taken for speech, so
    that their SNR comes out too high (docs/results/describers_signal.md). Reverberation counts as noise where it fills
    the pauses. Nothing without 0.3 s of speech, or 1.5 s of it where there are no pauses. Speech without pauses hides weak
    noise: from 8 dB on there is no number, and only from 28 dB on a word again, "clean".
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
        word = noise_band(measured.snr_db)
        if measured.pauses:
            word_is_sure, number_is_sure = word == noise_band(measured.quietest_db), measured.steady
        else:
            number_is_sure = measured.snr_db <= HIGHEST_WITHOUT_PAUSES_DB
            word_is_sure = number_is_sure or measured.snr_db >= CLEAN_WITHOUT_PAUSES_DB
        if word_is_sure:
            told["noise"] = Attribute(word, how=f"{measured.how}, {limits}")
        if number_is_sure:
            told["snr_db"] = Attribute(round(measured.snr_db, 1), "dB", how=measured.how)
        return told


def noise_band(snr_db: float) -> str:
    """noisy, slightly noisy or clean."""
    return "noisy" if snr_db < NOISY_DB else "clean" if snr_db >= CLEAN_DB else "slightly noisy"


@dataclass(frozen=True)
class Measured:
    """An SNR in dB and what it rests on.

    `pauses`: whether there were any to measure the noise in. `quietest_db`: the SNR without the loudest moments of the
    pauses, never less. `steady`: whether the noise in the pauses is much the same all the time.
    """

    snr_db: float
    quietest_db: float
    how: str
    pauses: bool
    steady: bool


@dataclass
class _Sums:
    """Power spectra of a clip added up over its windows: with speech, in pauses, in pauses without their loudest moments, and
    the floor while there is speech. `pause_power`: of every frame in a pause.
    """

    speech: np.ndarray = field(default_factory=lambda: np.zeros(FRAME // 2))
    pauses: np.ndarray = field(default_factory=lambda: np.zeros(FRAME // 2))
    quiet: np.ndarray = field(default_factory=lambda: np.zeros(FRAME // 2))
    floor: np.ndarray = field(default_factory=lambda: np.zeros(FRAME // 2))
    speech_frames: int = 0
    quiet_frames: int = 0
    pause_power: list[np.ndarray] = field(default_factory=list)

    def add(self, start_s: float, samples: np.ndarray, activity: Activity) -> None:
        if len(samples) < FRAME * SMOOTH:
            return
        power = power_spectra(samples)
        time_s = start_s + (np.arange(len(power)) * _HOP + FRAME / 2) / SAMPLE_RATE_HZ
        total = power.sum(axis=1)
        # Where the recording has an offset, digital silence has one too, which the window spreads over the lowest band.
        alive = power[:, 1:].sum(axis=1) > FRAME * 10 ** (_ALIVE_DBFS / 10) / 2
        speech = activity.inside(time_s) & alive
        pause = ~activity.inside(time_s, _BEFORE_S, _AFTER_S) & alive
        if pause.any():
            quiet = pause & (total <= 10 ** (_EVENT_DB / 10) * np.median(total[pause]))
            self.pauses += power[pause].sum(axis=0)
            self.quiet += power[quiet].sum(axis=0)
            self.quiet_frames += int(quiet.sum())
            self.pause_power.append(total[pause])
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
        sums.add(start_s, without_offset(samples), activity)
    if sums.speech_frames == 0:
        return None
    speech = sums.speech / sums.speech_frames
    pause_power = np.concatenate([np.zeros(0), *sums.pause_power])
    pauses_s = len(pause_power) * _HOP / SAMPLE_RATE_HZ
    if pauses_s >= LEAST_PAUSES_S:
        snr_db = _ratio_db(speech, sums.pauses / len(pause_power))
        quietest_db = _ratio_db(speech, sums.quiet / sums.quiet_frames)
        low, high = 10 * np.log10(np.quantile(pause_power, [0.1, 0.9]))
        steady = high - low <= MOST_SPREAD_DB and quietest_db - snr_db <= MOST_APART_DB
        how = f"speech against the noise in {pauses_s:.1f} s without speech"
    elif activity.speech_s >= LEAST_WITHOUT_PAUSES_S:
        snr_db = quietest_db = _ratio_db(speech, sums.floor / sums.speech_frames)
        steady = True
        how = "speech against the floor of every band, as there are no pauses"
    else:
        return None
    if snr_db > HIGHEST_DB:
        snr_db, how = HIGHEST_DB, f"{how}; at least {HIGHEST_DB:g} dB"
    return Measured(snr_db, max(quietest_db, snr_db), how, pauses_s >= LEAST_PAUSES_S, bool(steady))


def without_offset(samples: np.ndarray) -> np.ndarray:
    """Samples (n,) without their mean, digital silence left out of it: padding must not hide an offset."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    alive = frames.var(axis=1) > 10 ** (_ALIVE_DBFS / 10)
    return samples - (frames[alive].mean() if alive.any() else samples.mean())


def power_spectra(samples: np.ndarray, hop: int = _HOP) -> np.ndarray:
    """Power in 256 bands from 31 Hz to 8 kHz of frames of 32 ms, by default every 16 ms.

    Samples (n,) at 16 kHz in, (frames, 256) out; `hop`: samples from frame to frame.
    """
    window = np.hanning(FRAME + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::hop]
    spectra = np.fft.rfft(frames * window, axis=1)[:, 1:]
    power: np.ndarray = (np.square(spectra.real) + np.square(spectra.imag)) / np.square(window).sum()
    return power


def smoothed(power: np.ndarray) -> np.ndarray:
    """Means of `SMOOTH` neighbouring frames: (frames, bands) in, (frames + 1 - SMOOTH, bands) out."""
    sums = np.concatenate([np.zeros((1, power.shape[1])), np.cumsum(power, axis=0, dtype=np.float64)])
    means: np.ndarray = (sums[SMOOTH:] - sums[:-SMOOTH]) / SMOOTH
    return means


def floor_spectrum(power: np.ndarray) -> np.ndarray:
    """The mean power of steady noise under a changing sound: (frames, bands) in, (bands,) out."""
    smooth = smoothed(power)
    floor: np.ndarray = np.quantile(smooth if len(smooth) else power, _QUANTILE, axis=0) * _quantile_to_mean()
    return floor


@lru_cache(maxsize=1)
def _quantile_to_mean() -> float:
    """Mean over quantile of the smoothed power of white noise, by which the quantile underestimates steady noise."""
    noise = np.random.default_rng(0).normal(size=60 * SAMPLE_RATE_HZ).astype(np.float32)
    power = power_spectra(noise)
    return float(power.mean() / np.quantile(smoothed(power), _QUANTILE, axis=0).mean())


def _ratio_db(with_speech: np.ndarray, noise: np.ndarray) -> float:
    signal = float(np.maximum(with_speech - noise, 0.0).sum())
    return 10 * math.log10(max(signal, 1e-12) / max(float(noise.sum()), 1e-12))
