"""Sound files of any form become the same samples; what is no usable sound is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_llm.audio import (
    SAMPLE_RATE_HZ,
    AudioError,
    audio_hash,
    duration_s,
    load_audio,
    rms_dbfs,
    stream_audio,
)


def tone(
    seconds: float, rate_hz: int = SAMPLE_RATE_HZ, pitch_hz: float = 440.0, level: float = 0.3
) -> np.ndarray:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (level * np.sin(2 * np.pi * pitch_hz * time_s)).astype(np.float32)


def pitch_of(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * SAMPLE_RATE_HZ / len(samples)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8000, 1), (16000, 1), (44100, 2), (48000, 6)])
def test_every_format_rate_and_channel_count_gives_the_same_tone(
    tmp_path: Path, suffix: str, rate_hz: int, channels: int
) -> None:
    if suffix == "mp3" and channels > 2:
        pytest.skip("mp3 has at most two channels")
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, np.stack([tone(1.5, rate_hz)] * channels, axis=1), rate_hz)
    samples = load_audio(file)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) == pytest.approx(1.5 * SAMPLE_RATE_HZ, abs=0.1 * SAMPLE_RATE_HZ)  # mp3 pads
    assert pitch_of(samples) == pytest.approx(440, abs=3)
    assert rms_dbfs(samples) == pytest.approx(
        20 * np.log10(0.3 / np.sqrt(2)), abs=1.6
    )  # ogg filters the bass channel
    assert duration_s(file) == pytest.approx(len(samples) / SAMPLE_RATE_HZ, abs=0.01)


def test_content_counts_not_the_extension(tmp_path: Path) -> None:
    right, wrong = tmp_path / "a.wav", tmp_path / "b.mp3"
    soundfile.write(right, tone(0.5), SAMPLE_RATE_HZ)
    wrong.write_bytes(right.read_bytes())
    assert audio_hash(load_audio(right)) == audio_hash(load_audio(wrong))


def test_streamed_blocks_are_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "long.flac"
    noise = np.random.default_rng(0).normal(0, 0.05, 35 * 22050).astype(np.float32)
    soundfile.write(file, noise, 22050)
    blocks = list(stream_audio(file))
    assert len(blocks) >= 3
    assert all(len(block) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(file))
    assert sum(map(len, blocks)) == pytest.approx(35 * SAMPLE_RATE_HZ, abs=2)


def test_channels_that_cancel_each_other_are_heard_by_the_louder_one(tmp_path: Path) -> None:
    sound = tone(1.0)
    soundfile.write(
        tmp_path / "crossed.wav", np.stack([0.9 * sound, -sound], axis=1), 16_000, subtype="FLOAT"
    )
    soundfile.write(tmp_path / "wide.wav", np.stack([sound, 0 * sound], axis=1), 16_000, subtype="FLOAT")
    assert np.allclose(load_audio(tmp_path / "crossed.wav"), -sound)
    assert np.allclose(load_audio(tmp_path / "wide.wav"), sound / 2)


def test_hash_follows_the_sound_not_the_file(tmp_path: Path) -> None:
    a, b = tmp_path / "a.wav", tmp_path / "b.flac"
    samples = (tone(0.5) * 32767).astype(np.int16)
    soundfile.write(a, samples, SAMPLE_RATE_HZ)
    soundfile.write(b, samples, SAMPLE_RATE_HZ)
    assert audio_hash(load_audio(a)) == audio_hash(load_audio(b))
    assert audio_hash(tone(0.5)) != audio_hash(tone(0.5, pitch_hz=441))


def bad_file(folder: Path, kind: str) -> Path:
    file = folder / f"{kind}.wav"
    if kind == "empty":
        file.touch()
    elif kind == "corrupt":
        file.write_bytes(b"this was never a sound file" * 20)
    elif kind == "short":
        soundfile.write(file, tone(0.05), SAMPLE_RATE_HZ)
    elif kind == "header_only":
        soundfile.write(file, tone(0), SAMPLE_RATE_HZ)
    elif kind == "nan":
        samples = tone(0.5)
        samples[100] = np.nan
        soundfile.write(file, samples, SAMPLE_RATE_HZ, subtype="FLOAT")
    elif kind == "folder":
        file.mkdir()
    elif kind == "cut_off":
        whole = folder / "whole.flac"
        soundfile.write(
            whole, np.random.default_rng(0).normal(0, 0.1, 40000).astype(np.float32), SAMPLE_RATE_HZ
        )
        file = folder / "cut_off.flac"
        file.write_bytes(whole.read_bytes()[:20000])
        whole.unlink()
    return file


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("empty", "empty"),
        ("corrupt", "not a sound file"),
        ("short", "0.050 s"),
        ("header_only", "no sound"),
        ("nan", "NaN"),
        ("folder", "folder"),
        ("missing", "no such file"),
        ("cut_off", "damaged or cut off"),
    ],
)
def test_unusable_files_are_refused_with_their_name_and_reason(
    tmp_path: Path, kind: str, sentence: str
) -> None:
    file = bad_file(tmp_path, kind)
    with pytest.raises(AudioError, match=sentence) as caught:
        load_audio(file)
    assert str(file) in str(caught.value)
    assert str(file) not in caught.value.reason


def test_silence_is_sound_but_has_no_level(tmp_path: Path) -> None:
    file = tmp_path / "silence.wav"
    soundfile.write(file, np.zeros(16000, np.float32), SAMPLE_RATE_HZ)
    assert rms_dbfs(load_audio(file)) == -np.inf
