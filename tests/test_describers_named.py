"""Describers by name: the probes that come with the package, files, models, and sentences for what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from describers.language import LanguageDescriber
from describers.named import LEARNED, attribute_describer, overview, shipped
from describers.probe import ProbeDescriber, load_probe
from describers.records import Clip
from speech_llm.audio import SAMPLE_RATE_HZ, load_audio
from speech_llm.doctor import as_text, examine
from speech_llm.errors import UserError

# The development recordings lie beside the checkout, not in it.
RECORDINGS = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason=f"no development recordings at {RECORDINGS}"
)


def recordings(dataset: str, count: int) -> list[tuple[Clip, dict[str, Any]]]:
    """Some clips of a data set's dev split, evenly spread, with their manifest lines."""
    rows = [json.loads(line) for line in (RECORDINGS / dataset / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "dev"]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    files = [RECORDINGS / dataset / row["audio"] for row in chosen]
    return [
        (Clip(row["id"], file, row["duration_s"], load_audio(file)), row)
        for row, file in zip(chosen, files, strict=True)
    ]


def test_probes_come_with_the_package_and_say_what_they_rest_on() -> None:
    assert {"gender", "age_group"} <= set(shipped())
    for attribute, path in shipped().items():
        probe = load_probe(path)
        assert probe.attribute == attribute
        assert "CC BY 4.0" in probe.about["licence"]
        assert probe.about["threshold"] is not None
        told = probe.about["folds"]["at_threshold"]
        assert told["precision"] >= probe.about["precision"]
        assert path.stat().st_size < 2_000_000


def test_doctor_lists_what_is_there_and_how_to_get_the_rest() -> None:
    findings = examine()
    text = as_text(findings)
    assert "gender" in text
    assert "fit-describer" in text
    for row in overview():
        assert row["attribute"] in text
        assert row["available"] or "fit-describer" in row["how_to_get"]
    assert {row["attribute"] for row in overview()} == set(LEARNED) | set(shipped())


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("emotion", "fit-describer emotion"),
        ("gendr", "Did you mean 'gender'"),
        ("=x", "ATTRIBUTE=FILE"),
        ("gender=", "ATTRIBUTE=FILE"),
        ("gender=absent.safetensors", "no such probe file"),
        ("emotion=./absent", "no such folder"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_sentence(item: str, words: str) -> None:
    sound = np.sin(np.arange(SAMPLE_RATE_HZ) / 10).astype(np.float32)
    with pytest.raises(UserError, match=words):
        attribute_describer(item).describe([Clip("a", Path("a"), 1.0, sound)])


def test_the_language_token_of_a_multilingual_whisper_is_the_language(
    tmp_path: Path, whisper_dir: Path
) -> None:
    torch.manual_seed(0)
    # The embedded tokenizer knows the language tokens although its model does not use them.
    tokenizer = WhisperTokenizerFast.from_pretrained(whisper_dir)
    ids = {f"<|{code}|>": int(tokenizer.convert_tokens_to_ids(f"<|{code}|>")) for code in ("de", "fr", "it")}
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(vocab_size=51865, **sizes, **heads)
    model = WhisperForConditionalGeneration(config)
    # A configuration of its own, as on the hub: one derived from the model's is derived anew when it is loaded.
    model.generation_config = GenerationConfig(lang_to_id=ids, is_multilingual=True)
    model.save_pretrained(tmp_path)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    describer = attribute_describer(f"language={tmp_path}")
    assert isinstance(describer, LanguageDescriber)
    describer.threshold = 0.0
    rng = np.random.default_rng(0)
    sounds = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in (8_000, 24_000)]
    clips = [Clip("n", Path("n"), 1.0, sound) for sound in [*sounds, np.zeros(16_000, np.float32)]]
    together = describer.describe(clips)
    assert together[2] == {}
    for clip, found in zip(clips[:2], together, strict=False):
        assert found["language"].value in ("de", "fr", "it")
        assert 1 / 3 <= (found["language"].confidence or 0) <= 1
        assert describer.describe([clip])[0]["language"].confidence == pytest.approx(
            found["language"].confidence, abs=1e-5
        )
    with pytest.raises(UserError, match="one language only"):
        LanguageDescriber(str(whisper_dir)).describe(clips)


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_the_gender_of_people_it_never_heard() -> None:
    heard = recordings("librispeech_gender", 12)
    told = ProbeDescriber(shipped()["gender"]).describe([clip for clip, _ in heard])
    right = [
        found["gender"].value == row["gender"] for found, (_, row) in zip(told, heard, strict=True) if found
    ]
    assert len(right) >= 9
    assert sum(right) >= len(right) - 1


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_machines_and_animals_have_no_gender() -> None:
    told = ProbeDescriber(shipped()["gender"]).describe([clip for clip, _ in recordings("esc10", 10)])
    assert sum(1 for found in told if found) <= 2


@pytest.mark.assets
@pytest.mark.real_audio
@needs_recordings
def test_nothing_is_told_of_silence_and_of_a_silenced_voice() -> None:
    voice = recordings("librispeech_gender", 1)[0][0].samples
    assert voice is not None
    clips = [
        Clip("faint", Path("faint"), 4.0, (voice * 1e-5).astype(np.float32)),
        Clip("nothing", Path("nothing"), 4.0, np.zeros(4 * SAMPLE_RATE_HZ, np.float32)),
    ]
    for path in shipped().values():
        assert ProbeDescriber(path).describe(clips) == [{}, {}]
