"""Clips in, one judgement a clip out: silence is never judged, long recordings are judged window by window.

A classifier of any kind hands in `listen`: sounds (float32 mono at 16 kHz, at most 30 s, none of them silent) -> for
each its log-probabilities (labels,), or None for a sound that it does not want to judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from describers.records import Clip, windows
from describers.speech_activity import speech_activity
from describers.transcript import SILENCE_DBFS, loudest_dbfs
from describers.whisper import WINDOW_S
from speech_llm.audio import SAMPLE_RATE_HZ

Listen = Callable[[list[np.ndarray]], Sequence["np.ndarray | None"]]
# What a cut leaves at the end of a recording is judged with the rest only when there is this much of it.
_LEAST_REST_S = 1.0
# Sounds handed in at once: enough for equal lengths to meet, few enough that an hour of sound is never held.
_AT_ONCE = 64


def loud_windows(clip: Clip, of_speech: bool = False) -> Iterator[np.ndarray]:
    """The clip's windows of at most 30 s in which there is anything to hear; `of_speech`: in which anybody speaks."""
    activity = speech_activity(clip) if of_speech else None
    for start_s, samples in windows(clip, WINDOW_S):
        if activity and not activity.within(start_s, start_s + len(samples) / SAMPLE_RATE_HZ):
            continue
        short_rest = start_s > 0 and len(samples) < _LEAST_REST_S * SAMPLE_RATE_HZ
        if not short_rest and loudest_dbfs(samples) > SILENCE_DBFS:
            yield samples


def judge(clips: Sequence[Clip], listen: Listen, of_speech: bool = False) -> list[np.ndarray | None]:
    """Probabilities (labels,) of each clip, None for a clip with nothing to judge. `of_speech`: see `loud_windows`.

    Of several windows the log-probabilities are averaged, each weighing as much as it is long, and normalised again.
    """
    sums: list[np.ndarray | None] = [None] * len(clips)
    weights = [0.0] * len(clips)
    pieces = ((index, sound) for index, clip in enumerate(clips) for sound in loud_windows(clip, of_speech))
    while several := list(itertools.islice(pieces, _AT_ONCE)):
        for (index, sound), heard in zip(several, listen([sound for _, sound in several]), strict=True):
            if heard is None:
                continue
            before = sums[index]
            sums[index] = heard * len(sound) if before is None else before + heard * len(sound)
            weights[index] += len(sound)
    return [
        None if total is None else normalised(total / weight)
        for total, weight in zip(sums, weights, strict=True)
    ]


def normalised(log_probabilities: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis that sum to 1."""
    raised = np.exp(log_probabilities - log_probabilities.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))
