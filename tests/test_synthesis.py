"""The quickstart corpus: balanced, disjoint, reproducible; eSpeak says the words; the room does what it is told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from speech_llm.audio import SAMPLE_RATE_HZ, load_audio, rms_dbfs
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl
from speech_llm.synthesis import natural
from speech_llm.synthesis.quickstart import build_quickstart, espeak_plan, in_room, natural_plan
from speech_llm.synthesis.sentences import compose


def test_every_combination_of_labels_is_equally_frequent() -> None:
    rows = list(espeak_plan("train", 240, 0))
    cells = Counter((row["gender"], row["accent"], row["speed"]) for row in rows)
    assert len(cells) == 24
    assert set(cells.values()) == {10}


def test_train_and_test_share_neither_voices_nor_sentences() -> None:
    train, test = list(espeak_plan("train", 480, 0)), list(espeak_plan("test", 240, 0))
    assert not {row["voice"].split("+")[1] for row in train} & {row["voice"].split("+")[1] for row in test}
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert len({row["text"] for row in train}) == 480


def test_a_plan_is_a_function_of_the_seed() -> None:
    assert list(espeak_plan("test", 30, 1)) == list(espeak_plan("test", 30, 1))
    assert list(espeak_plan("test", 30, 1)) != list(espeak_plan("test", 30, 2))


def test_natural_voices_are_half_female_and_six() -> None:
    rows = list(natural_plan(60, 0))
    assert Counter(row["gender"] for row in rows) == {"female": 30, "male": 30}
    assert {row["voice"] for row in rows} == {voice.name for voice in natural.VOICES}
    assert {voice.name: voice.gender for voice in natural.VOICES}.items() >= {
        (row["voice"], row["gender"]) for row in rows
    }
    assert all("accent" not in row for row in rows)


def test_too_many_sentences_are_a_mistake_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"1000000 different test sentences .* the grammar has \d+"):
        compose("test", 1_000_000, 0)


@pytest.mark.parametrize("noise", ["white", "pink", "hum"])
def test_the_room_sets_level_and_noise(noise: str) -> None:
    time_s = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tone = np.sin(2 * np.pi * 440 * time_s).astype(np.float32)
    clean = in_room(tone, -20.0, "none", None, seed=1)
    noisy = in_room(tone, -20.0, noise, 20.0, seed=1)
    assert rms_dbfs(clean) == pytest.approx(-20.0, abs=0.05)
    assert rms_dbfs(noisy - clean) == pytest.approx(-40.0, abs=0.1)
    assert np.array_equal(noisy, in_room(tone, -20.0, noise, 20.0, seed=1))


@pytest.mark.assets
def test_clips_are_written_once_and_are_the_same_again(tmp_path: Path) -> None:
    build_quickstart(tmp_path / "a", 4, 3, 0, seed=0, progress=False)
    build_quickstart(tmp_path / "b", 4, 3, 0, seed=0, progress=False)
    rows = [row for _, row in read_jsonl(tmp_path / "a" / "train.jsonl")]
    assert len(rows) == 4
    assert not (tmp_path / "a" / "natural.jsonl").exists()
    for row in rows:
        first, second = (load_audio(tmp_path / name / row["audio"]) for name in "ab")
        assert np.array_equal(first, second)
        assert rms_dbfs(first) == pytest.approx(row["level_dbfs"], abs=0.5)
    before = (tmp_path / "a" / rows[0]["audio"]).stat().st_mtime_ns
    build_quickstart(tmp_path / "a", 4, 3, 0, seed=0, progress=False)
    assert (tmp_path / "a" / rows[0]["audio"]).stat().st_mtime_ns == before


@pytest.mark.assets
def test_slow_speech_lasts_longer_than_fast(tmp_path: Path) -> None:
    from speech_llm.synthesis import espeak

    lengths = {
        wpm: len(espeak.synthesize("The farmer closed the door.", "en-us+f2", wpm)) for wpm in (115, 170, 250)
    }
    assert lengths[115] > 1.25 * lengths[170] > 1.25 * 1.2 * lengths[250]


@pytest.mark.assets
def test_an_unknown_variant_is_named() -> None:
    from speech_llm.synthesis import espeak

    with pytest.raises(UserError, match="no voice variant 'f77'"):
        espeak.synthesize("Hello.", "en-us+f77")


@pytest.mark.assets
def test_natural_voices_say_the_sentence() -> None:
    pytest.importorskip("onnxruntime")
    import soxr

    from describers.records import Clip
    from describers.transcript import TranscriptDescriber
    from eval.matching import normalise_text
    from speech_llm.assets import WHISPER_TINY_EN

    said = "The doctor washed the shirt in the kitchen."
    clips = []
    for number, voice in enumerate((natural.VOICES[0], natural.VOICES[2])):
        samples, rate = natural.synthesize(said, voice, "normal")
        at_16k = soxr.resample(samples, rate, SAMPLE_RATE_HZ).astype(np.float32)
        clips.append(Clip(str(number), Path(f"{voice.name}.wav"), len(at_16k) / SAMPLE_RATE_HZ, at_16k))
    for heard in TranscriptDescriber(WHISPER_TINY_EN).describe(clips):
        words = set(normalise_text(heard["transcript"].value).split())
        assert len(words & set(normalise_text(said).split())) >= 6


@pytest.mark.assets
def test_many_clips_are_made_side_by_side_and_are_the_same_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    build_quickstart(tmp_path / "many", 30, 3, 4, seed=0, progress=False)
    monkeypatch.setattr("speech_llm.synthesis.quickstart.WORTH_PROCESSES", 100)
    build_quickstart(tmp_path / "few", 30, 3, 4, seed=0, progress=False)
    names = sorted(path.name for path in (tmp_path / "many" / "clips").iterdir())
    assert len(names) == 37
    for name in names:
        same = (tmp_path / folder / "clips" / name for folder in ("many", "few"))
        assert len({path.read_bytes() for path in same}) == 1, name


@pytest.mark.assets
def test_an_interrupted_part_of_natural_voices_is_made_as_if_it_had_not_been(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    build_quickstart(tmp_path, 1, 1, 8, seed=0, progress=False)
    last = tmp_path / "clips" / "natural-0007.flac"
    before = last.read_bytes()
    last.unlink()
    build_quickstart(tmp_path, 1, 1, 8, seed=0, progress=False)
    assert last.read_bytes() == before
