"""What is said, by any Whisper model of transformers: greedy decoding in batches, silence and noise left untranscribed.

Recordings of any length: up to 30 s in one window, longer ones in consecutive windows cut at quiet places, each a
segment with its times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from describers.records import Attribute, Clip, windows
from describers.silence import SILENCE_DBFS, loudest_dbfs  # noqa: F401 - others take them from here
from describers.speech_activity import speech_activity
from describers.whisper import WINDOW_S, Heard, Whisper, shared_whisper
from speech_llm.audio import SAMPLE_RATE_HZ

# Whisper's own rule (Radford et al. 2022, section 4.5): no speech when the no-speech token is likely and the text is not;
# and in any case when the text is less likely than the last number. Chosen with tiny.en on 170 spoken clips and 52
# of animals, machines and noise: of those transcribed half right 0.8 % are left out, of the noises 79 %. They decide after
# the voice detector has, see `spoken_windows`.
NO_SPEECH_PROBABILITY = 0.6
LOG_PROBABILITY = -1.0
LEAST_LOG_PROBABILITY = -1.3
# What Whisper, trained on subtitles, writes for noise: believed only when it is rather sure of it.
PHANTOMS = {"you", "thank you", "thanks for watching", "thank you for watching", "bye"}
PHANTOM_LOG_PROBABILITY = -0.5


class TranscriptDescriber:
    """`transcript`, and `segments` (a list of `{"start_s", "end_s", "text"}`) for recordings longer than 30 s.

    `asr`: a model reference (see `speech_llm.assets`); loaded when first needed. `padded`: give the encoder 30 s of every
    clip as in Whisper's training: about five times slower and no better, see `describers.whisper`. Where the language is known
    (by a label or the describer `language`), a multilingual model writes in it; else it finds it by itself.
    """

    name = "transcript"
    attributes: tuple[str, ...] = ("transcript", "segments")
    reads: tuple[str, ...] = ("language",)

    def __init__(
        self, asr: str, batch_size: int = 48, padded: bool = False, device: str | None = None
    ) -> None:
        self.asr, self.batch_size, self.padded = asr, batch_size, padded
        self.models: tuple[str, ...] = (asr,)
        self.version = "padded" if padded else ""
        self._device = device
        self._whisper: Whisper | None = None

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        heard: list[list[tuple[float, float, Heard]]] = [[] for _ in clips]
        languages = [str(c.known["language"].value) if "language" in c.known else None for c in clips]
        pieces = ((index, *window) for index, clip in enumerate(clips) for window in spoken_windows(clip))
        # Four batches at a time, so that equal lengths meet and an hour of sound is never held as a whole.
        while several := list(itertools.islice(pieces, 4 * self.batch_size)):
            for (index, start_s, samples), words in zip(
                several, self._hear([p[2] for p in several], [languages[p[0]] for p in several]), strict=True
            ):
                heard[index].append((start_s, start_s + len(samples) / SAMPLE_RATE_HZ, words))
        return [self._attributes(clip, segments) for clip, segments in zip(clips, heard, strict=True)]

    def _hear(self, sounds: Sequence[np.ndarray], languages: Sequence[str | None]) -> list[Heard]:
        if self._whisper is None:
            self._whisper = shared_whisper(self.asr, self._device)
        return self._whisper.transcribe(sounds, self.batch_size, self.padded, languages)

    def _attributes(self, clip: Clip, segments: list[tuple[float, float, Heard]]) -> dict[str, Attribute]:
        spoken = [segment for segment in segments if is_speech(segment[2])]
        if not spoken:
            return {}
        how = f"Whisper ({self.asr}), greedy, where Silero VAD finds speech"
        confidence = math.exp(float(np.mean([words.log_probability for _, _, words in spoken])))
        found = {
            "transcript": Attribute(" ".join(w.text for _, _, w in spoken), confidence=confidence, how=how)
        }
        if clip.duration_s > WINDOW_S:
            rows = [{"start_s": round(a, 2), "end_s": round(b, 2), "text": w.text} for a, b, w in spoken]
            found["segments"] = Attribute(rows, how=f"{how}, windows cut at quiet places")
        return found


def spoken_windows(clip: Clip) -> Iterator[tuple[float, np.ndarray]]:
    """`(start_s, samples)`: the windows of at most 30 s in which the voice detector finds any speech.

    Whisper writes words for animals and machines, and is as sure of them as of short words ("cat", "six"), so that its own
    probabilities cannot tell them apart (docs/results/describe.md). Silence never has speech.
    """
    activity = speech_activity(clip)
    for start_s, samples in windows(clip, WINDOW_S) if activity.spans else ():
        if activity.within(start_s, start_s + len(samples) / SAMPLE_RATE_HZ):
            yield start_s, samples


def is_speech(heard: Heard) -> bool:
    """Whether the words are trustworthy enough to be called speech at all."""
    if not heard.text or heard.loop or heard.log_probability < LEAST_LOG_PROBABILITY:
        return False
    if heard.text.lower().strip(" .!,") in PHANTOMS and heard.log_probability < PHANTOM_LOG_PROBABILITY:
        return False
    return not (heard.no_speech > NO_SPEECH_PROBABILITY and heard.log_probability < LOG_PROBABILITY)
