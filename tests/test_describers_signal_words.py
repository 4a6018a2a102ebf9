"""The words for measured attributes, and how describers see what others found."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from describers.compose import WORD_FOR, compose
from describers.records import Attribute, Clip
from describers.run import describe_inputs
from describers.simple import LabelsDescriber

MEASURED = {
    "pitch": "low", "pitch_hz": 98.0, "pitch_range_st": 6.2, "volume": "quiet", "level_dbfs": -40.1, "speed": "fast",
    "words_per_minute": 250.0, "pauses": 2, "pause_share": 0.12, "noise": "noisy", "snr_db": 8.3,
    "reverberation": "slightly reverberant", "rt60_s": 0.55,
}  # fmt: skip


def test_measured_attributes_read_as_plain_english() -> None:
    assert compose({"gender": "male", **MEASURED}) == (
        "A male speaker speaks fast with a quiet, low-pitched voice. The speech has 2 pauses. "
        "The recording is noisy. The recording is slightly reverberant."
    )
    assert compose({"volume": "moderate"}) == "A speaker speaks at a moderate volume."
    assert compose({"pauses": 0}) == "The speech has no pauses."
    assert compose({"pauses": 1}) == "The speech has one pause."


def test_a_number_is_told_when_asked_for_or_when_it_has_no_word() -> None:
    assert compose({"snr_db": 8.3}) == "The signal-to-noise ratio is 8.3 dB."
    assert compose(MEASURED, use=["pitch_hz", "rt60_s"]) == (
        "The median pitch is 98 Hz. The reverberation time is 0.55 s."
    )
    assert compose(MEASURED, "key_value", use=["words_per_minute", "noise"]) == (
        "speaking rate: 250 words per minute\nnoise level: noisy"
    )
    assert compose({"noise": "clean", "snr_db": 40, "duration": 4}, "desta") == (
        "[00:00-00:04] (Noise level: Clean, Duration: 4s)"
    )


def test_dropout_also_leaves_out_measured_attributes_but_never_all() -> None:
    rng = random.Random(0)
    told = [compose(MEASURED, "key_value", drop=0.5, seed=rng).splitlines() for _ in range(300)]
    words = len(MEASURED) - len(WORD_FOR) + ("syllables_per_s" not in MEASURED)
    assert min(map(len, told)) >= 1
    assert max(map(len, told)) == words
    assert 0.4 < sum(map(len, told)) / (300 * words) < 0.62


def test_a_column_called_noise_is_no_label_unless_asked_for() -> None:
    sound = Clip("a", Path("a.wav"), 1.0, np.zeros(16000, np.float32), {"noise": "white", "gender": "f"})
    assert set(LabelsDescriber().describe([sound])[0]) == {"gender"}
    assert set(LabelsDescriber({"noise": "noise"}).describe([sound])[0]) == {"noise"}


class Reader:
    """Tells what it knew of the gender, and a speed that a later-named describer may correct."""

    name = "reader"
    attributes = ("saw", "speed")
    reads = ("gender",)

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        known = [clip.known["gender"].value if "gender" in clip.known else "nothing" for clip in clips]
        return [{"saw": Attribute(value, how="looked"), "speed": Attribute("slow")} for value in known]


class Teller:
    name = "teller"
    attributes = ("gender", "speed")

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        return [{"gender": Attribute("male"), "speed": Attribute("fast")} for _ in clips]


@pytest.mark.parametrize("reader_first", [True, False])
def test_a_describer_sees_what_others_found_and_the_later_named_wins(
    tmp_path: Path, reader_first: bool
) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1), 16000)
    chosen = [Reader(), Teller()] if reader_first else [Teller(), Reader()]
    out = tmp_path / "out.jsonl"
    describe_inputs(tmp_path / "a.wav", out, use=["duration"], describers=chosen, progress=False)
    row = json.loads(out.read_text())
    assert row["attributes"]["saw"] == "male"
    assert row["attributes"]["speed"] == ("fast" if reader_first else "slow")
    assert row["how"] == {"duration": "number of samples", "saw": "looked"}
