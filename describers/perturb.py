"""The same sound under worse conditions: noise mixed in to order, a telephone line. Fitting and benchmarks use both.

In and out: float32 mono samples at 16 kHz, of unchanged length.
"""

from __future__ import annotations

import numpy as np
import soxr  # type: ignore[import-untyped]

from speech_llm.audio import SAMPLE_RATE_HZ

TELEPHONE_HZ = 8_000


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator, slope: float = 0.0) -> np.ndarray:
    """Mix Gaussian noise into a clip, `snr_db` below the clip's mean power (pauses included).

    `slope`: the noise's power falls as 1 / frequency ** slope: 0 white, 1 pink, 2 brown.
    """
    noise = rng.standard_normal(len(samples))
    if slope:
        spectrum = np.fft.rfft(noise)
        frequency = np.maximum(np.arange(len(spectrum)), 1)
        noise = np.fft.irfft(spectrum * frequency ** (-slope / 2), len(samples))
    wanted = np.mean(np.square(samples, dtype=np.float64)) / 10 ** (snr_db / 10)
    return (samples + noise * np.sqrt(wanted / max(np.mean(noise**2), 1e-20))).astype(np.float32)


def telephone(samples: np.ndarray) -> np.ndarray:
    """What is left of a clip that was stored at 8 kHz: nothing above 4 kHz."""
    narrow = soxr.resample(samples.astype(np.float32), SAMPLE_RATE_HZ, TELEPHONE_HZ)
    wide = soxr.resample(narrow, TELEPHONE_HZ, SAMPLE_RATE_HZ)[: len(samples)]
    return np.pad(wide, (0, len(samples) - len(wide))).astype(np.float32)


def at_random(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the conditions that a clip of an unknown origin may come in: telephone band, noise of 3 to 25 dB, both."""
    if rng.random() < 0.4:
        samples = telephone(samples)
    if rng.random() < 0.8:
        samples = add_noise(samples, rng.uniform(3, 25), rng, slope=float(rng.integers(0, 3)))
    return samples
