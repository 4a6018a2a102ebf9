"""Words: attributes become descriptions, and values have synonyms that never stand for two values at once."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from describers.compose import DEFAULT_ORDER, FORMS, compose
from describers.records import Clip, windows
from describers.simple import DurationDescriber, LabelsDescriber
from describers.transcript import SILENCE_DBFS, loudest_dbfs
from describers.vocabulary import SYNONYMS, canonical, display, synonyms, values
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.errors import UserError

SPOKEN = {
    "gender": "female",
    "accent": "Scottish",
    "speed": "fast",
    "transcript": "The boat is late.",
    "duration": 3.6,
}


def clip(seconds: float = 1.0, samples: np.ndarray | None = None, **row: object) -> Clip:
    from pathlib import Path

    if samples is None:
        samples = np.zeros(round(seconds * SAMPLE_RATE_HZ), np.float32)
    return Clip("a", Path("a.wav"), len(samples) / SAMPLE_RATE_HZ, samples, dict(row))


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        (
            SPOKEN,
            "A female speaker with a Scottish accent speaks fast. "
            'She says: "The boat is late." The recording is 4 seconds long.',
        ),
        (
            {"gender": "male", "accent": "North American English", "emotion": "angry", "transcript": "get out"},
            'A male speaker with an American accent speaks in an angry tone. He says: "get out".',
        ),
        ({"event": "rooster"}, "The sound of a rooster is heard."),
        ({"event": "fire crackling", "duration": 5.0}, "The sound of a crackling fire is heard. The recording is 5 seconds long."),
        (
            {"gender": "female", "transcript": "Hello!", "event": "rain"},
            'A female speaker is heard. She says: "Hello!" In the background, the sound of rain is heard.',
        ),
        ({"transcript": "Hello."}, 'Someone says: "Hello."'),
        ({"keyword": "six"}, 'Someone says the word "six".'),
        ({"keyword": "six", "transcript": "Six."}, 'Someone says: "Six."'),
        ({"age_group": "child", "gender": "female", "language": "de", "speed": "slow"}, "A female child speaks German slowly."),
        ({"age_group": "adult", "speed": "hesitant"}, "An adult speaker speaks at a hesitant speed."),
        ({"room": "bathroom"}, "The room is bathroom."),
        ({"transcript": "", "gender": None}, "Nothing is known about the recording."),
    ],
)  # fmt: skip
def test_sentence_form_reads_as_plain_english(attributes: dict[str, object], sentence: str) -> None:
    assert compose(attributes) == sentence


def test_desta_form_is_the_one_of_the_paper() -> None:
    attributes = {"transcript": "text", "gender": "female", "emotion": "happy", "duration": 4.2}
    assert (
        compose(attributes, "desta") == '[00:00-00:04] "text" (Gender: Female, Emotion: Happy, Duration: 4s)'
    )
    segments = [{"start_s": 0, "end_s": 28.4, "text": "one"}, {"start_s": 28.4, "end_s": 601, "text": "two"}]
    long = {"transcript": "one two", "segments": segments, "gender": "male"}
    assert compose(long, "desta") == '[00:00-00:28] "one"\n[00:28-10:01] "two" (Gender: Male)'
    assert (
        compose({"event": "rooster", "duration": 5}, "desta")
        == "[00:00-00:05] (Sound event: Rooster, Duration: 5s)"
    )


def test_key_value_form_has_one_line_an_attribute() -> None:
    assert compose(SPOKEN, "key_value", use=["speed", "gender"]) == "speaking speed: fast\ngender: female"


def test_quotes_in_a_transcript_do_not_end_the_quotation() -> None:
    for form in FORMS:
        assert compose({"transcript": 'He said "no"\nand left'}, form).count('"') == 2


def test_the_caller_chooses_attributes_and_order() -> None:
    assert compose(SPOKEN, use=["speed"]) == "A speaker speaks fast."
    assert (
        compose(SPOKEN, "desta", use=["speed", "gender"])
        == "[00:00-00:04] (Speaking speed: Fast, Gender: Female)"
    )
    assert (
        compose({"emotion": "sad", "speed": "slow"}, use=["emotion", "speed"])
        == "A speaker speaks in a sad tone slowly."
    )


def test_dropout_leaves_attributes_out_at_its_rate_but_never_all() -> None:
    rng = random.Random(0)
    told = [compose(SPOKEN, "key_value", drop=0.5, seed=rng).splitlines() for _ in range(400)]
    assert min(map(len, told)) >= 1
    assert 0.4 < sum(map(len, told)) / (400 * len(SPOKEN)) < 0.6
    assert compose(SPOKEN, drop=1.0)
    assert compose(SPOKEN, drop=0.5, shuffle=True, seed=3) == compose(SPOKEN, drop=0.5, shuffle=True, seed=3)


def test_unknown_form_names_the_nearest() -> None:
    with pytest.raises(UserError, match="sentence"):
        compose(SPOKEN, "sentense")


def test_every_known_value_can_be_described_and_is_then_found_by_its_synonyms() -> None:
    for attribute in SYNONYMS:
        for value in values(attribute):
            text = compose({attribute: value}).casefold()
            assert any(word.casefold() in text for word in synonyms(attribute, value)), text


def test_no_word_stands_for_two_values_of_one_attribute() -> None:
    for attribute in SYNONYMS:
        words = {
            value: {word.casefold() for word in synonyms(attribute, value)} for value in values(attribute)
        }
        for one, other in itertools.combinations(words, 2):
            assert not words[one] & words[other], (attribute, one, other)


def test_labels_in_many_spellings_mean_one_value() -> None:
    assert canonical("gender", "F") == canonical("gender", "Woman") == "female"
    assert canonical("accent", "North American English") == canonical("accent", "US English") == "American"
    assert display("accent", "Mandarin-accented English (non-native)") == "Mandarin"
    assert display("accent", "French (Belgium)-accented English") == "Belgian French"
    assert display("accent", "German (native)") == "German"
    assert display("language", "de") == "German"
    assert canonical("emotion", "Anger") == "angry"
    assert canonical("mood", "odd") == display("mood", "odd") == "odd"
    assert synonyms("mood", "odd") == ["odd"]
    assert synonyms("gender", "female")[:2] == ["female", "woman"]


def test_every_language_that_whisper_may_find_has_a_name() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    for code, name in LANGUAGES.items():
        assert name in [word.lower() for word in synonyms("language", {"jw": "jv"}.get(code, code))]


def test_a_language_code_is_no_word_of_an_answer() -> None:
    assert synonyms("language", "it") == ["Italian"]


def test_default_order_names_each_attribute_once() -> None:
    assert len(set(DEFAULT_ORDER)) == len(DEFAULT_ORDER)


def test_labels_describer_takes_columns_as_they_are_mapped() -> None:
    found = LabelsDescriber({"sex": "gender", "age": "age"}).describe([clip(sex="F", age=31), clip(sex="")])
    assert {name: item.value for name, item in found[0].items()} == {"gender": "female", "age": 31}
    assert found[0]["gender"].how == "given in column 'sex'"
    assert found[1] == {}
    assert set(LabelsDescriber().describe([clip(gender="male", speed="fast", other=1)])[0]) == {
        "gender",
        "speed",
    }


def test_duration_is_the_number_of_samples() -> None:
    assert DurationDescriber().describe([clip(1.25)])[0]["duration"].value == 1.25


def test_windows_cover_a_long_clip_once_and_cut_where_it_is_quiet() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 70 * SAMPLE_RATE_HZ).astype(np.float32)
    quiet_s = 27.0
    samples[round((quiet_s - 0.2) * SAMPLE_RATE_HZ) : round((quiet_s + 0.2) * SAMPLE_RATE_HZ)] = 0
    pieces = list(windows(clip(samples=samples)))
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), samples)
    assert all(len(piece) <= 30 * SAMPLE_RATE_HZ for _, piece in pieces)
    assert pieces[1][0] == pytest.approx(quiet_s, abs=0.2)
    short = clip(30.0)
    assert len(list(windows(short))) == 1


def test_silence_is_told_from_quiet_speech_by_its_loudest_moment() -> None:
    rounding_noise = np.random.default_rng(0).integers(-1, 2, 16000).astype(np.float32) / 32768
    offset = np.full(16000, 0.25, np.float32)
    brief = np.zeros(16000, np.float32)
    brief[8000:9000] = 0.01 * np.sin(np.arange(1000))
    assert loudest_dbfs(np.zeros(16000, np.float32)) == -np.inf
    assert loudest_dbfs(rounding_noise) < SILENCE_DBFS
    assert loudest_dbfs(offset) < SILENCE_DBFS
    assert loudest_dbfs(brief) > SILENCE_DBFS
