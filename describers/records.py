"""What flows through the describers: a Clip goes in, Attributes come out.

Writing a describer takes a name, the attributes it yields and one method; nothing has to be inherited or registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speech_llm.audio import SAMPLE_RATE_HZ, stream_audio


@dataclass
class Attribute:
    """One thing known about a clip.

    `value`: a word, a number or a text. `unit`: of a number ("s", "dB", "Hz"), else empty. `confidence`: probability
    that the value is right, None where the describer has no such notion. `how`: what the value rests on.
    """

    value: Any
    unit: str = ""
    confidence: float | None = None
    how: str = ""


@dataclass
class Clip:
    """One recording to describe.

    `samples`: float32 mono at 16 kHz, shape (n,); None for a recording too long to hold, whose sound is then streamed
    from `path`. `row`: the manifest line it came from (empty for a bare file). `sound`: `audio.audio_hash` of the samples, empty
    where nobody asked for it. `known`: what describers that ran before
    found (the words for the speed, the gender for the pitch). `measured`: what describers measured on the way and others
    can use (where speech is, its pitch), so that it is measured once.
    """

    id: str
    path: Path
    duration_s: float
    samples: np.ndarray | None = None
    row: dict[str, Any] = field(default_factory=dict)
    sound: str = ""
    known: dict[str, Attribute] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def blocks(self) -> Iterator[np.ndarray]:
        """The sound in consecutive blocks, whether it is held or streamed."""
        if self.samples is not None:
            yield self.samples
        else:
            yield from stream_audio(self.path)


class Describer(Protocol):
    """Anything that hears: `describe` returns one dictionary a clip, leaving out what it cannot tell.

    A describer that looks at `Clip.known` has a further field, `reads`: the attributes it looks for. It then runs after
    the describers that tell them, wherever it was named. One that has a `version` (anything that changes when its answers do)
    promises to look at nothing but the sound and what it `reads`; its answers are cached, see `describers.cache`.
    """

    name: str
    attributes: tuple[str, ...]

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]: ...


def windows(clip: Clip, longest_s: float = 30.0, search_s: float = 6.0) -> Iterator[tuple[float, np.ndarray]]:
    """Yield `(start_s, samples)`: the whole clip in consecutive windows of at most `longest_s`.

    Each cut is made in the quietest 0.2 s of the last `search_s` of its window, so that it seldom falls into a word.
    """
    longest, search = round(longest_s * SAMPLE_RATE_HZ), round(search_s * SAMPLE_RATE_HZ)
    held = np.zeros(0, np.float32)
    start = 0
    for block in clip.blocks():
        held = np.concatenate([held, block])
        while len(held) > longest:
            cut = longest - search + _quietest(held[longest - search : longest])
            yield start / SAMPLE_RATE_HZ, held[:cut]
            held, start = held[cut:], start + cut
    if len(held):
        yield start / SAMPLE_RATE_HZ, held


def _quietest(samples: np.ndarray, width_s: float = 0.2) -> int:
    """Index of the middle of the stretch of `width_s` that has the least energy."""
    width = round(width_s * SAMPLE_RATE_HZ)
    energy = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    return int(np.argmin(energy[width:] - energy[:-width])) + width // 2
