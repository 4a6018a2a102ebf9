"""The transcript: right words from real and synthetic speech, none from silence, and the same whoever shares the batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from describers.records import Clip
from describers.run import describe_inputs
from describers.transcript import Heard, TranscriptDescriber, is_speech
from describers.whisper import Whisper, at_positions
from speech_llm.audio import SAMPLE_RATE_HZ, load_audio

# The development recordings lie beside the checkout, not in it.
RECORDINGS = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason=f"no development recordings at {RECORDINGS}"
)


def recordings(
    dataset: str, count: int, split: str = "dev", longest_s: float = 8.0
) -> list[tuple[np.ndarray, dict[str, str]]]:
    """The first `count` short recordings of a data set, with their manifest lines."""
    rows = [json.loads(line) for line in (RECORDINGS / dataset / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == split and row["duration_s"] < longest_s][:count]
    return [(load_audio(RECORDINGS / dataset / row["audio"]), row) for row in rows]


def as_clips(sounds: list[np.ndarray]) -> list[Clip]:
    return [Clip(str(n), Path(f"{n}.wav"), len(s) / SAMPLE_RATE_HZ, s) for n, s in enumerate(sounds)]


def words(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").strip()


@pytest.fixture(scope="module")
def describer(whisper_dir: Path) -> TranscriptDescriber:
    return TranscriptDescriber(str(whisper_dir), batch_size=4)


def tiny_encoder() -> WhisperEncoder:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    encoder = WhisperEncoder(WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=40)).eval()
    torch.nn.init.normal_(encoder.embed_positions.weight)
    return encoder


def test_an_encoder_view_at_all_positions_is_the_encoder_itself() -> None:
    encoder = tiny_encoder()
    mel = torch.randn(2, 8, 80)
    with torch.no_grad():
        whole = encoder(mel).last_hidden_state
        assert torch.equal(at_positions(encoder, torch.arange(40))(mel).last_hidden_state, whole)
        short = at_positions(encoder, torch.tensor([0, 1, 2, 20, 39]))(mel[..., :10]).last_hidden_state
        assert short.shape == (2, 5, 16)
        assert torch.equal(encoder(mel).last_hidden_state, whole)  # the encoder has not changed


def test_unlikely_looping_and_silent_text_is_no_speech() -> None:
    assert is_speech(Heard("hello", -0.3, 0.1))
    assert is_speech(Heard("hello", -0.3, 0.9))
    assert is_speech(Heard("hello", -1.2, 0.1))
    assert not is_speech(Heard("you", -1.2, 0.9))
    assert not is_speech(Heard("you", -1.6, 0.1))
    assert not is_speech(Heard("ha ha ha ha", -0.1, 0.1, loop=True))
    assert not is_speech(Heard("", 0.0, 0.0))


def test_what_has_no_voice_never_reaches_the_model() -> None:
    silent = [np.zeros(SAMPLE_RATE_HZ, np.float32), np.full(2 * SAMPLE_RATE_HZ, 0.1, np.float32)]
    hiss = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE_HZ).astype(np.float32)
    assert TranscriptDescriber("no model").describe(as_clips([*silent, hiss])) == [{}] * 3


@pytest.mark.assets
def test_noise_has_no_transcript(describer: TranscriptDescriber) -> None:
    rng = np.random.default_rng(0)
    noises = [rng.normal(0, level, 3 * SAMPLE_RATE_HZ).astype(np.float32) for level in (0.001, 0.01, 0.1)]
    hum = 0.2 * np.sin(2 * np.pi * 50 * np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ).astype(np.float32)
    assert describer.describe(as_clips([*noises, hum])) == [{}] * 4


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_machines_and_animals_say_nothing(describer: TranscriptDescriber) -> None:
    """Those of ESC-10 for which Whisper alone is sure of words, a dog ("BOO!") and a rooster ("Mm-hmm!") among them."""
    folder = RECORDINGS / "esc10"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    worst = {"esc10/1-97392-A", "esc10/3-145382-A"}
    chosen = [row for row in rows if row["id"] in worst or row.get("event") == "chainsaw"][:12]
    assert worst <= {row["id"] for row in rows}
    told = describer.describe(as_clips([load_audio(folder / row["audio"]) for row in chosen]))
    assert told == [{}] * len(chosen)


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_single_words_keep_their_transcript(describer: TranscriptDescriber) -> None:
    found = recordings("speech_commands", 10)
    told = describer.describe(as_clips([samples for samples, _ in found]))
    assert sum("transcript" in attributes for attributes in told) >= 9


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_read_sentences_are_transcribed_with_confidence(describer: TranscriptDescriber) -> None:
    found = recordings("ravdess", 6)
    told = describer.describe(as_clips([samples for samples, _ in found]))
    right = sum(
        words(str(attributes["transcript"].value)) == words(row["text"])
        for attributes, (_, row) in zip(told, found, strict=True)
    )
    assert right >= 5
    assert all(0.5 < (attributes["transcript"].confidence or 0) <= 1 for attributes in told)
    assert all("segments" not in attributes for attributes in told)


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_the_cheap_encoding_agrees_with_thirty_seconds_of_padding(
    describer: TranscriptDescriber, whisper_dir: Path
) -> None:
    sounds = [samples for samples, _ in recordings("lang_prompts", 4, split="train", longest_s=4.0)]
    whisper = Whisper(str(whisper_dir))
    cheap, padded = (whisper.transcribe(sounds, 4, padded=padded) for padded in (False, True))
    same = sum(words(a.text) == words(b.text) for a, b in zip(cheap, padded, strict=True))
    assert same >= 3


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_a_transcript_does_not_depend_on_its_batch_mates(describer: TranscriptDescriber) -> None:
    sounds = [samples for samples, _ in recordings("ravdess", 5)] + [
        samples for samples, _ in recordings("fsdd", 3)
    ]
    together = describer.describe(as_clips(sounds))
    alone = [describer.describe(as_clips([samples]))[0] for samples in sounds]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys()
        if one:
            assert one["transcript"].value == other["transcript"].value
            assert one["transcript"].confidence == pytest.approx(other["transcript"].confidence, abs=1e-3)


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_a_long_recording_becomes_segments_with_their_times(tmp_path: Path, whisper_dir: Path) -> None:
    (samples, row), *_ = recordings("ravdess", 1)
    pause = np.zeros(27 * SAMPLE_RATE_HZ, np.float32)
    file = tmp_path / "long.flac"
    soundfile.write(file, np.concatenate([samples, pause] * 3), SAMPLE_RATE_HZ)
    describe_inputs(file, tmp_path / "o.jsonl", asr=str(whisper_dir), progress=False)
    attributes = json.loads((tmp_path / "o.jsonl").read_text())["attributes"]
    period_s = len(samples) / SAMPLE_RATE_HZ + 27
    assert attributes["duration"] == pytest.approx(3 * period_s, abs=0.01)
    assert len(attributes["segments"]) == 3
    for number, segment in enumerate(attributes["segments"]):
        assert words(segment["text"]) == words(row["text"])
        assert segment["start_s"] <= number * period_s + 0.1
        assert number * period_s + 2 <= segment["end_s"] <= (number + 1) * period_s + 0.1
    assert words(attributes["transcript"]) == " ".join([words(row["text"])] * 3)
