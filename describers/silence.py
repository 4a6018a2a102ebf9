"""What counts as silence, of which nothing is ever told."""

from __future__ import annotations

import math

import numpy as np

from speech_llm.audio import SAMPLE_RATE_HZ

# A clip none of whose 50 ms frames is louder than this (dB re full scale) is taken for silence: 16-bit rounding noise
# lies near -98, the quietest real recordings that we met had speech peaks near -45.
SILENCE_DBFS = -65.0


def loudest_dbfs(samples: np.ndarray, frame_s: float = 0.05) -> float:
    """Level of the loudest frame in dB re full scale, the mean (DC offset) removed."""
    frame = round(frame_s * SAMPLE_RATE_HZ)
    samples = samples - samples.mean() if len(samples) else samples
    padded = np.pad(samples, (0, -len(samples) % frame)).reshape(-1, frame)
    power = float(np.square(padded, dtype=np.float64).mean(axis=1).max(initial=0.0))
    return 10 * math.log10(power) if power > 0 else -math.inf
