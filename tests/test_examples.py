"""Rows as tables and datasets hold them: what is an Example, what is set aside with its reason, and what a row may leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speech_llm.data.packing import Row, pack_rows
from speech_llm.data.shards import example_of
from speech_llm.examples import audio_parts, example_from_row, hub_turns
from speech_llm.training.checkpoint import latest_checkpoint

ASK = {"role": "user", "content": "Who speaks?"}
SAY = {"role": "assistant", "content": "A woman."}
AUDIO = 7


def of(row: dict[str, Any], tmp_path: Path, **columns: str) -> Any:
    return example_of("x", row, None, columns, tmp_path)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "user", "content": [{"type": "text", "content": "hi"}]}, SAY], "text part without 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}, SAY], "text part without 'text'"),
        ([{"role": "user", "content": [{"text": "hi"}]}, SAY], "part of type None"),
        ([{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, SAY], "part of type 'image'"),
        ([{"role": "user", "content": [{"type": "audio", "path": ["a.wav"]}]}, SAY], "has no 'path'"),
        (["hello", SAY], "no object"),
        ([ASK, {"role": "assistant", "content": "  "}], "empty"),
        ([ASK, {"role": "assistant", "content": [{"type": "audio", "path": "a.wav"}]}], "answers are text"),
        (hub_turns([{"from": "human", "value": "hi"}, {"value": "ho"}]), "role None"),
    ],
)
def test_a_malformed_row_is_a_sentence(messages: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        example_from_row({"messages": messages})


def test_nulls_of_a_table_say_nothing(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": None}, {**ASK, "train": None}, {**SAY, "train": None}]
    made = example_from_row({"messages": turns})
    assert made.messages == [ASK, SAY]
    columns = {"system": "s", "user": "q", "assistant": "a"}
    assert of({"s": float("nan"), "q": "Who speaks?", "a": "A woman."}, tmp_path, **columns).messages == [
        ASK,
        SAY,
    ]
    for bad in ({"q": None}, {"q": float("nan")}, {"a": None}, {"a": ""}, {"a": ["x"]}):
        with pytest.raises(ValueError, match=r"empty|no text"):
            of({"s": "", "q": "Who?", "a": "She.", **bad}, tmp_path, **columns)


def test_an_answer_in_parts_is_its_text() -> None:
    parts = [{"type": "text", "text": "A woman."}, {"type": "text", "text": "She laughs."}]
    made = example_from_row({"messages": [ASK, {"role": "assistant", "content": parts}]})
    assert made.messages[1]["content"] == "A woman.\nShe laughs."


def test_a_sound_without_a_mark_is_heard_before_the_question(tmp_path: Path) -> None:
    made = of({"audio": "a.wav", "messages": [ASK, SAY]}, tmp_path)
    assert made.messages[0]["content"] == [
        {"type": "audio", "path": "a.wav"},
        {"type": "text", "text": "Who speaks?"},
    ]
    made = of({"sound": "a.wav", "conv": [ASK, SAY]}, tmp_path, audio="sound", messages="conv")
    assert [part["path"] for part in audio_parts(made.messages)] == ["a.wav"]
    with pytest.raises(ValueError, match="more audios than"):
        of({"audios": ["a.wav", "b.wav"], "messages": [ASK, SAY]}, tmp_path)
    marked = {"role": "user", "content": "<|AUDIO|> Who speaks?"}
    with pytest.raises(ValueError, match="more audios than"):
        of({"audios": ["a.wav", "b.wav"], "messages": [marked, SAY]}, tmp_path)
    with pytest.raises(ValueError, match="which of them is the answer"):
        of({"audio": "a.wav", "text": "said words"}, tmp_path)
    held = {"role": "user", "content": [{"type": "audio", "path": "b.wav"}]}
    made = of({"audio": "a.wav", "messages": [held, SAY]}, tmp_path)  # a column that says the same again
    assert [part["path"] for part in audio_parts(made.messages)] == ["b.wav"]


def test_rows_share_a_sound_only_where_they_are_alike_until_it_has_been_heard() -> None:
    def row(name: str, ids: list[int], span: tuple[int, int]) -> Row:
        return Row(name, ids, [span], ["a.wav"])

    heard_first = [row("a", [1, AUDIO, AUDIO, 2, 3, 9], (5, 6)), row("b", [1, AUDIO, AUDIO, 2, 4, 9], (5, 6))]
    asked_first = [row("c", [1, 5, AUDIO, AUDIO, 2, 9], (5, 6)), row("d", [1, 6, AUDIO, AUDIO, 2, 9], (5, 6))]
    heard_late = [Row("e", [1, AUDIO, 2, 9, 3, AUDIO, 4, 9], [(3, 4), (7, 8)], ["a.wav", "a.wav"])]
    packs = pack_rows([*heard_first, *asked_first, *heard_late], 0, 100, audio_token_id=AUDIO)
    assert [pack.rows for pack in packs] == [["a", "b"], ["c"], ["d"], ["e"]]
    for pack in packs:
        assert pack.ids.count(AUDIO) == 2


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (999_950, 1_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-1000000"
