"""The describers that measure the signal itself, by name: pitch, volume, speed, pauses, noise, reverberation."""

from __future__ import annotations

from describers.noise import NoiseDescriber
from describers.pitch import PitchDescriber
from describers.records import Describer
from describers.reverberation import ReverberationDescriber
from describers.tempo import PausesDescriber, SpeedDescriber
from describers.volume import VolumeDescriber

SIGNAL_DESCRIBERS: dict[str, type[Describer]] = {
    "pitch": PitchDescriber,
    "volume": VolumeDescriber,
    "speed": SpeedDescriber,
    "pauses": PausesDescriber,
    "noise": NoiseDescriber,
    "reverberation": ReverberationDescriber,
}
