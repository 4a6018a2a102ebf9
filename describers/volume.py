"""How loud the speech is in a recording: its level in dB re full scale, and a word for it."""

from __future__ import annotations

from collections.abc import Sequence

from describers.records import Attribute, Clip
from describers.speech_activity import speech_activity
from describers.transcript import SILENCE_DBFS

# Speech is recorded and transmitted at a nominal active level of -26 dB re overload (ITU-T P.56, G.191). 10 dB more or
# less are heard as twice or half as loud (Stevens 1955, the sone scale).
NOMINAL_DBFS = -26.0
MODERATE_DB = 10.0


class VolumeDescriber:
    """`level_dbfs` (root mean square, a full-scale square wave is 0), `volume` (quiet, moderate, loud).

    The level of the speech without its pauses; of the whole sound where nobody speaks, then without a word. It is what is
    heard in the recording: how loudly somebody spoke cannot be told from it, as nobody knows how far the microphone
    was. Nothing from silence.
    """

    name = "volume"
    attributes: tuple[str, ...] = ("volume", "level_dbfs")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [self._describe(clip) for clip in clips]

    def _describe(self, clip: Clip) -> dict[str, Attribute]:
        activity = speech_activity(clip)
        level = activity.speech_dbfs()
        if level <= SILENCE_DBFS:
            return {}
        what = "speech without its pauses" if activity.spans else "the whole sound; no speech was found"
        found = {"level_dbfs": Attribute(round(level, 1), "dBFS", how=f"root mean square of {what}")}
        if activity.spans:
            found["volume"] = Attribute(
                volume_band(level),
                how=f"level of the speech in the recording; moderate is {NOMINAL_DBFS - MODERATE_DB:.0f} to "
                f"{NOMINAL_DBFS + MODERATE_DB:.0f} dBFS",
            )
        return found


def volume_band(level_dbfs: float) -> str:
    """quiet, moderate or loud."""
    above_db = level_dbfs - NOMINAL_DBFS
    return "quiet" if above_db < -MODERATE_DB else "loud" if above_db > MODERATE_DB else "moderate"
