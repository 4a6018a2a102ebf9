"""Telling is the recipe's choice: which attributes, in which order, in which words, and some left out by chance."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from describers.compose import FORMS, compose
from describers.wording import WORDING, check_wording
from speech_llm.errors import UserError
from speech_llm.recipe import DescribeSection, load_recipe
from speech_llm.targets.prompts import PoolPrompt
from speech_llm.targets.questions import Questioner

KNOWN: dict[str, Any] = {
    "transcript": "Good morning.", "gender": "male", "pitch": "low", "volume": "loud", "emotion": "happy", "noise": "clean",
    "event": "rain", "duration": 3.0, "pitch_hz": 98.0,
}  # fmt: skip
TWO_SPEAKERS = [
    {"start_s": 0.0, "end_s": 4.2, "text": "Hello.", "speaker": 1, "gender": "female", "emotion": "happy"},
    {"start_s": 4.6, "end_s": 9.0, "text": "Good evening!", "speaker": 2, "gender": "male"},
]


@pytest.mark.parametrize(
    ("voice", "sentence"),
    [
        ({"pitch": "low", "volume": "loud"}, "A speaker speaks with a loud, low-pitched voice."),
        ({"volume": "quiet", "speed": "fast", "pitch": "high"}, "A speaker speaks fast with a quiet, high-pitched voice."),
        ({"pitch": "low", "volume": "moderate"}, "A speaker speaks with a low-pitched voice at a moderate volume."),
        ({"volume": "loud"}, "A speaker speaks in a loud voice."),
        ({"pitch": "low"}, "A speaker speaks with a low-pitched voice."),
    ],
)  # fmt: skip
def test_one_voice_is_told_once(voice: dict[str, str], sentence: str) -> None:
    assert compose(voice) == sentence


def test_sentences_follow_the_order_asked_for() -> None:
    usual = compose(KNOWN)
    assert usual == (
        'A male speaker speaks in a happy tone with a loud, low-pitched voice. He says: "Good morning." '
        "In the background, the sound of rain is heard. The recording is clean. The recording is 3 seconds long."
    )
    told = compose(KNOWN, use=["duration", "event", "noise", "gender", "transcript"])
    assert told == (
        "The recording is 3 seconds long. The sound of rain is heard. The recording is clean. "
        'A male speaker is heard. He says: "Good morning."'
    )
    # What somebody says follows who says it, or "he" would be nobody.
    assert compose(KNOWN, use=["transcript", "noise", "gender"]).startswith(
        "A male speaker is heard. He says"
    )


def test_a_number_is_told_when_it_is_asked_for() -> None:
    assert "98" not in compose(KNOWN, "key_value")
    assert "median pitch: 98 Hz" in compose(KNOWN, "key_value", use=["pitch_hz"])
    assert "median pitch: 98 Hz" in compose(KNOWN, "key_value", keep=["pitch_hz"])


@pytest.mark.parametrize("form", FORMS)
def test_what_must_be_told_is_never_dropped_and_changes_no_other_luck(form: str) -> None:
    for seed in range(40):
        with_emotion = compose(KNOWN, form, drop=0.8, seed=seed, keep=["emotion"])
        assert "appy" in with_emotion
        without = compose(KNOWN, form, drop=0.8, seed=seed)
        assert ("rain" in without.casefold()) <= ("rain" in with_emotion.casefold())
    assert compose(KNOWN, "key_value", use=["gender"], keep=["emotion"]) == "gender: male\nemotion: happy"


def test_the_same_seed_drops_and_shuffles_the_same() -> None:
    told = [compose(KNOWN, drop=0.5, shuffle=True, seed=f"7-{clip}-prompt") for clip in range(20)]
    assert told == [compose(KNOWN, drop=0.5, shuffle=True, seed=f"7-{clip}-prompt") for clip in range(20)]
    assert len(set(told)) > 10


def test_two_speakers_in_destas_form_have_a_line_each() -> None:
    attributes = {"segments": TWO_SPEAKERS, "duration": 9.0, "noise": "clean"}
    assert compose(attributes, "desta") == (
        '[00:00-00:04] "Hello." (Speaker: 1, Gender: Female, Emotion: Happy)\n'
        '[00:05-00:09] "Good evening!" (Speaker: 2, Gender: Male, Noise level: Clean, Duration: 9s)'
    )
    told = compose(
        {**attributes, "transcript": "Hello. Good evening!"}, "desta", use=["transcript", "gender"]
    )
    assert told == '[00:00-00:04] "Hello." (Gender: Female)\n[00:05-00:09] "Good evening!" (Gender: Male)'
    assert compose(attributes, "desta", use=["duration"]) == "[00:00-00:09] (Duration: 9s)"


def test_two_speakers_in_sentences_and_lines() -> None:
    attributes = {"segments": TWO_SPEAKERS, "transcript": "Hello. Good evening!", "duration": 9.0}
    assert compose(attributes) == (
        'A female speaker speaks in a happy tone. She says: "Hello." A male speaker is heard. He says: "Good evening!" '
        "The recording is 9 seconds long."
    )
    assert compose({"segments": TWO_SPEAKERS}, "key_value").splitlines() == [
        '00:00 to 00:04: "Hello.", speaker: 1, gender: female, emotion: happy',
        '00:05 to 00:09: "Good evening!", speaker: 2, gender: male',
    ]
    never = [compose(attributes, drop=0.99, seed=seed) for seed in range(30)]
    assert any("female" not in told for told in never)  # dropout reaches what only segments have


def test_words_are_replaced_where_the_recipe_says_so() -> None:
    words = {
        "emotion": "and sounds {value}", "emotion.angry": "furiously", "room": "It was recorded in {value}.",
        "event.rain": "heavy rain", "pronoun.male": "The man says",
    }  # fmt: skip
    check_wording(words)
    assert (
        compose({"gender": "male", "emotion": "happy"}, wording=words)
        == "A male speaker speaks and sounds happy."
    )
    assert compose({"emotion": "Anger"}, wording=words) == "A speaker speaks furiously."
    assert compose({"room": "a hall", "event": "rain"}, wording=words) == (
        "The sound of heavy rain is heard. It was recorded in a hall."
    )
    assert 'The man says: "Good' in compose(KNOWN, wording=words)


def test_every_wording_of_ours_is_one_that_a_recipe_may_give() -> None:
    check_wording(WORDING)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("emotion", "in a {valu} tone", "{valu} means nothing there; it may have {article}, {value}"),
        ("emotion", "in a {value tone", "malformed"),
        ("event.rain", "{value}", "no field"),
        ("gender", "a {value}", "no words of its own"),
        ("room", "in {0}", "{0} means nothing"),
    ],
)
def test_a_wording_that_cannot_be_told_is_a_sentence(key: str, text: str, said: str) -> None:
    with pytest.raises(UserError, match=key) as caught:
        check_wording({key: text})
    assert said in str(caught.value)


def test_an_attribute_named_like_a_part_of_a_sentence_is_still_told() -> None:
    assert compose({"voice": "hoarse", "heard": "yes"}) == "The voice is hoarse. The heard is yes."


RECIPE = """\
name: telling
data: {synthesize: {}}
targets: {prompts: pool.yaml}
eval: {prompts: pool.yaml}
describe: {include: [gender, duration], dropout: 0.3, order: random, wording: {emotion: "%s"}}
"""


def test_a_recipe_says_how_descriptions_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE % "and sounds {value}")
    describe = load_recipe(path).describe
    assert describe.telling() == {
        "use": ["gender", "duration"], "drop": 0.3, "shuffle": True, "wording": {"emotion": "and sounds {value}"}
    }  # fmt: skip
    assert describe.telling(dropout=False)["drop"] == 0
    path.write_text(RECIPE % "and {mood}")
    with pytest.raises(UserError, match=r"describe\.wording.*\{mood\} means nothing") as caught:
        load_recipe(path)
    assert "r.yaml" in str(caught.value)


def pool() -> PoolPrompt:
    return PoolPrompt("mood", "What mood?", ("emotion",), "They are {emotion}, {a_gender}.")


def clips(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    moods = ["happy", "sad", "angry"]
    return [
        {
            "id": f"c{n}",
            "attributes": {**KNOWN, "emotion": rng.choice(moods), "gender": rng.choice(["male", "female"])},
        }
        for n in range(count)
    ]


def test_a_teacher_is_always_told_what_the_prompt_asks_for() -> None:
    telling = DescribeSection(include=["noise", "gender"], dropout=0.9).telling()
    many = clips(60)
    questioner = Questioner(many, "key_value", True, 3, telling)
    seen = set()
    for clip in many:
        question = questioner.question(clip["attributes"], pool(), clip["id"])
        assert f"emotion: {clip['attributes']['emotion']}" in question.context
        assert "sound event" not in question.context
        seen.add(tuple(line.split(":")[0] for line in question.context.splitlines()))
        assert question.example is not None
        shown, _ = question.example
        assert "emotion: " in shown
        assert "gender: " in shown  # the worked answer names it
        assert question == questioner.question(clip["attributes"], pool(), clip["id"])
    assert len(seen) > 1
    plain = Questioner(many, "key_value", True, 3)
    assert plain.question(KNOWN, pool(), "x").context == compose(
        {name: value for name, value in KNOWN.items() if name not in ("transcript", "duration")}, "key_value"
    )
