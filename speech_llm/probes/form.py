"""What a probe is: the model as it is now in, series of figures out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.stats import Rate

if TYPE_CHECKING:
    from speech_llm.responders import SpeechResponder

Series = dict[str, Rate]
# Series whose names begin so are asked without sound.
TEXT = "text"


@dataclass(frozen=True)
class Now:
    """The model as a probe finds it.

    `epoch`: where the training is (see `speech_llm.probes`); None before it, where the model is the base LLM with an untrained
    connector. `text_is_base`: without sound it answers as the base LLM, whatever was trained. `folder`: where rows are written. `name`: stands
    before the place in the names of files, where it is not an epoch.
    """

    model: Any
    processor: Any
    features: Any
    epoch: float | None
    text_is_base: bool
    folder: Path
    batch_tokens: int
    name: str = ""

    @property
    def label(self) -> str:
        """The place in the training as part of a file's name."""
        return "base" if self.epoch is None else f"{self.name}{self.epoch:g}"

    def responder(self, max_new_tokens: int = 1) -> SpeechResponder:
        """The model as something that answers and chooses."""
        from speech_llm.responders import SpeechResponder

        return SpeechResponder(self.model, self.processor, self.features, max_new_tokens, self.batch_tokens)


class Probe(Protocol):
    """One thing that is watched."""

    name: str

    def begin(self, now: Now) -> Series:
        """The base LLM's own figures, and whatever of it must be kept; called once, before anything is trained."""

    def run(self, now: Now, base: Series) -> Series:
        """The figures now; `base` are those of `begin`."""
