"""Bad recordings through the command line, with everything that the package can tell: right, left out, or rejected with a
reason, and never a wrong attribute from silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.cli import _exit_code

pytestmark = pytest.mark.assets
ALL = "duration,transcript,pitch,volume,speed,pauses,noise,reverberation,gender,age_group"
TEXT = "The old man walked slowly to the river, and nobody followed him."


def describe(folder: Path, use: str = ALL) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """File -> its line, file -> why it was rejected."""
    out = folder.parent / "out.jsonl"
    assert _exit_code(["describe", str(folder), "--out", str(out), "--use", use, "--quiet"]) == 0
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    rejects = map(json.loads, out.with_suffix(".rejects.jsonl").read_text().splitlines())
    return rows, {Path(row["audio"]).name: row["reason"] for row in rejects}


@pytest.fixture(scope="module")
def speech(espeak_dir: Path) -> np.ndarray:
    """A sentence with a little noise, as no recording is without."""
    from speech_llm.synthesis import espeak

    sound = 0.3 * soxr.resample(espeak.synthesize(TEXT, "en-us", 160), espeak.SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)
    sound = np.pad(sound, SAMPLE_RATE_HZ // 2)
    return sound + np.random.default_rng(0).normal(0, 0.001, len(sound))


SILENCES: dict[str, Callable[[], np.ndarray]] = {
    "digital": lambda: np.zeros(3 * SAMPLE_RATE_HZ),
    "offset": lambda: np.full(3 * SAMPLE_RATE_HZ, 0.4),
    "rounding": lambda: np.random.default_rng(0).integers(-1, 2, 3 * SAMPLE_RATE_HZ) / 32768,
    "faint_hum": lambda: 1e-4 * np.sin(2 * np.pi * 50 * np.arange(3 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ),
    "click": lambda: np.concatenate([np.zeros(24000), [1.0], np.zeros(24000)]),
    "switched_on": lambda: np.concatenate([np.zeros(1000), np.full(47000, 0.3)]),
    "shortest": lambda: np.zeros(SAMPLE_RATE_HZ // 10),
    "over_a_minute": lambda: np.full(70 * SAMPLE_RATE_HZ, 0.1),
}


def test_silence_of_every_kind_has_a_duration_and_nothing_else(tmp_path: Path, whisper_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, made in SILENCES.items():
        soundfile.write(tmp_path / "in" / f"{name}.wav", made(), SAMPLE_RATE_HZ)
    rows, rejects = describe(tmp_path / "in")
    assert rejects == {}
    for name, made in SILENCES.items():
        found = rows[f"{name}.wav"]["attributes"]
        # A click and a current that is switched on have a level: they are no silence, but nobody speaks.
        allowed = {"duration", "level_dbfs"} if name in ("click", "switched_on") else {"duration"}
        assert set(found) <= allowed, name
        assert found["duration"] == pytest.approx(len(made()) / SAMPLE_RATE_HZ, abs=0.01)


def words(text: str) -> list[str]:
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").split()


def test_any_rate_channels_offset_and_name_give_the_same_words_and_voice(
    tmp_path: Path, speech: np.ndarray, whisper_dir: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()

    def write(name: str, rate_hz: int, channels: int = 1, sound: np.ndarray = speech, **form: Any) -> None:
        told = soxr.resample(sound, SAMPLE_RATE_HZ, rate_hz)
        soundfile.write(folder / name, np.repeat(told[:, None], channels, axis=1), rate_hz, **form)

    write("a_plain.wav", SAMPLE_RATE_HZ)
    write("b_telephone.wav", 8000, subtype="ULAW")
    write("c_studio.wav", 96000, subtype="PCM_24")
    write("d_surround.wav", 48000, channels=6)
    write("e_offset.wav", SAMPLE_RATE_HZ, sound=0.6 * speech + 0.3)
    write("f_clipped.wav", SAMPLE_RATE_HZ, sound=np.clip(speech * 4 / np.abs(speech).max(), -1, 1))
    write("g_really_flac.mp3", 44100, channels=2, format="FLAC")
    write("h_really_wav.flac", 22050, format="WAV")
    rows, rejects = describe(folder)
    assert rejects == {}
    plain = rows["a_plain.wav"]["attributes"]
    assert words(plain["transcript"]) == words(TEXT)
    for name, row in rows.items():
        found = row["attributes"]
        assert found["duration"] == pytest.approx(plain["duration"], abs=0.01), name
        assert found["pitch_hz"] == pytest.approx(plain["pitch_hz"], rel=0.03), name
        assert len(set(words(found["transcript"])) & set(words(TEXT))) >= 9, name
        # A voice that is heard less well may get no gender, but no other one.
        assert found.get("gender", plain.get("gender")) == plain.get("gender"), name
        assert found["volume"] == ("loud" if name == "f_clipped.wav" else plain["volume"]), name


def test_what_is_no_whole_recording_is_rejected_with_its_reason(tmp_path: Path, speech: np.ndarray) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, form in (("cut.flac", "FLAC"), ("cut.ogg", "OGG"), ("cut.wav", "WAV"), ("cut.mp3", "MP3")):
        soundfile.write(folder / name, speech, SAMPLE_RATE_HZ, format=form)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "page.wav").write_text("<html>404 not found</html>" * 30)
    (folder / "picture.mp3").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4000))
    (folder / "empty.flac").touch()
    soundfile.write(folder / "blink.wav", speech[:800], SAMPLE_RATE_HZ)
    soundfile.write(folder / "nothing.wav", speech[:0], SAMPLE_RATE_HZ)
    broken = speech.copy()
    broken[9000] = np.nan
    soundfile.write(folder / "nan.wav", broken, SAMPLE_RATE_HZ, subtype="FLOAT")
    rows, rejects = describe(folder, "duration,pitch,volume")
    reasons = {
        "cut.flac": "cut off", "page.wav": "not a sound file", "picture.mp3": "not a sound file", "empty.flac": "empty",
        "blink.wav": "0.050 s", "nothing.wav": "no sound", "nan.wav": "NaN",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert reason in rejects.pop(name), name
    # Formats whose blocks stand for themselves are what is left of them, and are described as that.
    assert not rejects
    assert set(rows) == {"cut.ogg", "cut.wav", "cut.mp3"}
    for name, row in rows.items():
        share = row["attributes"]["duration"] * SAMPLE_RATE_HZ / len(speech)
        assert 0.3 < share < 0.7, name
        assert 60 < row["attributes"]["pitch_hz"] < 300
