"""Describers by name: the probes that come with the package, files, models, and sentences for what is not there."""

from __future__ import annotations

import gc
import json
import weakref
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
from describers.speech_activity import Activity
from describers.transcript import TranscriptDescriber
from describers.whisper import Whisper
from speech_llm.assets import WHISPER_BASE
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


def tiny_multilingual(folder: Path, whisper_dir: Path) -> Path:
    """A random Whisper of a few hundred weights that knows German, French and Italian, saved in `folder`."""
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
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


def heard_as(spoken: bool, sound: np.ndarray) -> Clip:
    """A clip in which the voice detector has found somebody, or nobody."""
    clip = Clip("n", Path("n"), len(sound) / SAMPLE_RATE_HZ, sound)
    spans = ((0.0, clip.duration_s),) if spoken else ()
    clip.measured["speech"] = Activity(spans, np.zeros(1), np.ones(1))
    return clip


def test_the_language_token_of_a_multilingual_whisper_is_the_language(
    tmp_path: Path, whisper_dir: Path
) -> None:
    describer = attribute_describer(f"language={tiny_multilingual(tmp_path, whisper_dir)}")
    assert isinstance(describer, LanguageDescriber)
    describer.threshold = 0.0
    rng = np.random.default_rng(0)
    sounds = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in (8_000, 24_000)]
    clips = [heard_as(True, sound) for sound in [*sounds, np.zeros(16_000, np.float32)]]
    clips.insert(1, heard_as(False, sounds[0]))
    together = describer.describe(clips)
    assert together[1] == together[3] == {}  # nobody speaks; nothing is to be heard
    for place in (0, 2):
        found = together[place]["language"]
        assert found.value in ("de", "fr", "it")
        assert 1 / 3 <= (found.confidence or 0) <= 1
        assert describer.describe([clips[place]])[0]["language"].confidence == pytest.approx(
            found.confidence, abs=1e-5
        )
    with pytest.raises(UserError, match="one language only"):
        LanguageDescriber(str(whisper_dir)).describe(clips)


def test_language_and_transcript_share_one_whisper_which_is_let_go_with_them(
    tmp_path: Path, whisper_dir: Path
) -> None:
    reference = str(tiny_multilingual(tmp_path, whisper_dir))
    noise = (0.1 * np.random.default_rng(0).standard_normal(8_000)).astype(np.float32)
    clips = [heard_as(True, noise)]
    language, transcript = LanguageDescriber(reference), TranscriptDescriber(reference)
    language.describe(clips), transcript.describe(clips)
    assert language._whisper is transcript._whisper
    alive = weakref.ref(language._whisper)
    del language, transcript
    gc.collect()
    assert alive() is None


def test_an_unsure_language_is_looked_for_in_thirty_seconds(
    tmp_path: Path, whisper_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whisper = Whisper(str(tiny_multilingual(tmp_path, whisper_dir)))
    sounds = [np.full(8_000, 0.1, np.float32), np.full(40_000, 0.1, np.float32)]
    lengths = []
    encode = whisper.encode

    def listen(sounds: list[np.ndarray], seconds: int) -> torch.Tensor:
        lengths.append(seconds)
        return encode(sounds, seconds)

    monkeypatch.setattr(whisper, "encode", listen)
    whisper.languages_of(sounds)  # of three random ones none is likely
    assert lengths == [1, 3, 30]
    monkeypatch.setattr("describers.whisper.SURE_OF_LANGUAGE", 0.0)
    whisper.languages_of(sounds)
    assert lengths == [1, 3, 30, 1, 3]
    monkeypatch.setattr("describers.whisper.SURE_OF_LANGUAGE", 1.1)
    whisper.languages_of([np.full(480_000, 0.1, np.float32)])  # it was heard in 30 s
    assert lengths == [1, 3, 30, 1, 3, 30]


def test_words_are_written_in_the_language_that_is_known(tmp_path: Path, whisper_dir: Path) -> None:
    whisper = Whisper(str(tiny_multilingual(tmp_path, whisper_dir)))
    prompts = []
    step = whisper._step

    def watched(ids: torch.Tensor, states: torch.Tensor, cache: object) -> torch.Tensor:
        prompts.append(ids.tolist())
        return step(ids, states, cache)

    whisper._step = watched  # type: ignore[method-assign]
    whisper.never = torch.tensor([number for number in range(51865) if number != whisper.end])
    whisper.never_first = torch.tensor([], dtype=torch.long)
    sound = np.full(8_000, 0.1, np.float32)
    (free, *_), (known, *_) = (whisper.transcribe([sound], languages=[code]) for code in (None, "it"))
    assert (known.language, 1 / 3 <= free.language < 1) == (1.0, True)
    # Start, language, task, no times: the second run is not done again, as nothing about it is doubtful.
    italian = whisper.languages[whisper.codes.index("it")]
    assert prompts[-1] == [[italian, whisper._token("<|transcribe|>"), whisper.no_timestamps]]


@pytest.mark.assets
def test_the_language_of_synthetic_speech_and_words_in_it() -> None:
    import soxr

    from speech_llm.synthesis import espeak

    said = {
        "de": "Guten Morgen, heute ist das Wetter sehr schön und wir gehen in die Stadt.",
        "es": "Buenos días, mañana vamos a la playa con nuestros amigos.",
        "it": "Buongiorno, oggi andiamo al mercato per comprare il pane e la frutta.",
    }
    clips = []
    for code, text in said.items():
        spoken = espeak.synthesize(text, code, 140)
        samples = soxr.resample(spoken, espeak.SAMPLE_RATE_HZ, SAMPLE_RATE_HZ).astype(np.float32)
        clips.append(Clip(code, Path(code), len(samples) / SAMPLE_RATE_HZ, samples))
    found = attribute_describer("language").describe(clips)
    assert [row["language"].value for row in found] == list(said)
    for clip, row in zip(clips, found, strict=True):
        clip.known = row
    (german, *_) = TranscriptDescriber(WHISPER_BASE).describe(clips[:1])
    assert {"morgen", "heute", "gehen"} <= set(
        str(german["transcript"].value).lower().replace(",", "").split()
    )


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
