"""Rows of text pack too, and nothing leaks between the rows of a batch, with sound or without: logits equal the unpacked ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import tiny_examples
from tiny_models import tiny_model

from speech_llm.data.features import FeatureStore
from speech_llm.data.packing import (
    Row,
    fill_packs,
    pack_group,
    padding_share,
    plan_epoch,
    told_batches,
)
from speech_llm.examples import Example
from speech_llm.kv_cache import run_prefix
from speech_llm.training.rows import TrainingSet, build_training_set
from speech_llm.training.student import Student


def text_examples(count: int = 9) -> list[Example]:
    """Questions and answers of unlike length, one of several turns, and plain text."""
    made = [
        Example(
            id=f"text/{i}",
            messages=[
                {"role": "user", "content": f"What is {i} plus {i}?" + " Tell me." * (i % 4)},
                {"role": "assistant", "content": f"It is {2 * i}." * (1 + i % 3)},
            ],
        )
        for i in range(count)
    ]
    again = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    made[1].messages += again
    made[2].messages = [{"role": "system", "content": "Be brief."}, *made[2].messages]
    return [*made, Example(id="plain/0", text="Once upon a time."), Example(id="plain/1", text="The end.")]


def training_set(
    examples: list[Example], folder: Path, text_tokens: int = 400, **settings: Any
) -> tuple[Student, TrainingSet]:
    model, processor = tiny_model(**settings)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # adapters that do something
            torch.nn.init.normal_(parameter, std=0.3)
    features = FeatureStore(folder / "features", model, processor)
    frozen = settings.get("lora") is None
    data = build_training_set(
        examples, processor, features, 512, frozen, progress=False, text_tokens=text_tokens
    )
    assert not data.rejects
    prefix = run_prefix(model.llm, data.prefix)
    return Student(model, processor, features, prefix, len(data.prefix)), data


def logits_by_row(student: Student, packs: list[Any]) -> dict[str, torch.Tensor]:
    batch = student.batch(packs)
    with torch.no_grad():
        logits, _ = student.answer_logits(batch)
    return {name: logits[batch.row_of == place] for place, name in enumerate(batch.rows)}


LORA = {"rank": 4}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("text", {}),
        ("audio", {}),
        ("mixed", {}),
        ("text", {"lora": LORA, "gate_adapters": False}),
        ("mixed", {"lora": LORA, "gate_adapters": False}),
        ("mixed", {"lora": LORA, "gate_adapters": True}),
        ("mixed", {"llm": "gemma"}),
        ("mixed", {"llm": "phi"}),
    ],
)
def test_packed_logits_equal_the_unpacked_ones(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    sounds = tiny_examples(tmp_path / "clips", clips=3) if kind != "text" else []
    texts = text_examples() if kind != "audio" else []
    student, data = training_set([*texts, *sounds], tmp_path, **settings)
    assert len(data.packs) < len(data.rows)
    if kind != "audio":
        assert max(len(pack.rows) for pack in data.packs if not pack.clips) > 2
    packed = logits_by_row(student, data.packs)
    assert packed.keys() == data.rows.keys()
    for name, row in data.rows.items():
        alone = logits_by_row(student, [pack_group([row], student.prefix_length)])[name]
        assert len(alone) == row.answer_tokens > 0
        torch.testing.assert_close(packed[name], alone, rtol=1e-4, atol=1e-5)


def test_the_words_of_a_text_row_do_not_reach_its_neighbours(tmp_path: Path) -> None:
    student, data = training_set(text_examples(), tmp_path)
    pack = max(data.packs, key=lambda pack: len(pack.rows))
    before = logits_by_row(student, [pack])
    branch = torch.tensor(pack.branch)
    pack.ids = torch.where(branch == 2, torch.tensor(pack.ids) % 200 + 7, torch.tensor(pack.ids)).tolist()
    after = logits_by_row(student, [pack])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {pack.rows[1]}


def test_every_text_row_is_in_one_pack_and_none_is_too_long(tmp_path: Path) -> None:
    for limit in (40, 120, 400):
        _, data = training_set(text_examples(40), tmp_path, text_tokens=limit)
        assert sorted(name for pack in data.packs for name in pack.rows) == sorted(data.rows)
        for pack in data.packs:
            assert len(pack.rows) == 1 or len(pack.ids) <= limit
            for number in range(1, len(pack.rows) + 1):  # positions go on from the shared part
                own = [p for p, b in zip(pack.positions, pack.branch, strict=True) if b in (0, number)]
                assert own == list(range(len(data.prefix), len(data.prefix) + len(own)))


def test_packs_are_filled_tightly_and_in_time_that_grows_with_the_rows() -> None:
    rows = [Row(str(i), [5] * (20 + 37 * i % 90), [(3, 4)], []) for i in range(3000)]
    packs = fill_packs(rows, 0, 512)
    assert sorted(int(row.id) for pack in packs for row in pack) == list(range(3000))
    tokens = sum(len(row.ids) for row in rows)
    assert len(packs) <= 1.03 * tokens / 512
    assert packs == fill_packs(rows, 0, 512)


def test_an_llm_that_looks_back_so_far_gets_packs_no_longer(tmp_path: Path) -> None:
    model, processor = tiny_model("gemma3")
    processor.config.get_text_config().sliding_window = 150
    features = FeatureStore(tmp_path / "features", model, processor)
    examples = [*text_examples(), Example(id="long", text="word " * 200)]
    data = build_training_set(examples, processor, features, 4096, True, progress=False, text_tokens=4096)
    assert max(len(pack.ids) for pack in data.packs) + len(data.prefix) <= 150
    assert [row["id"] for row in data.rejects if "how far back" in row["reason"]][-1] == "long"


def test_the_share_of_padding_is_told(tmp_path: Path) -> None:
    _, data = training_set(text_examples(40), tmp_path)
    batches = plan_epoch(data.packs, 1024, seed=0, epoch=0)
    computed = sum(len(batch) * max(len(data.packs[i].ids) for i in batch) for batch in batches)
    used = sum(len(pack.ids) for pack in data.packs)
    assert padding_share(data.packs, batches) == pytest.approx(1 - used / computed)
    singles = [pack_group([row], len(data.prefix)) for row in data.rows.values()]
    assert computed < sum(len(pack.ids) for pack in singles) * 1.05
    said = told_batches(data.packs, batches, 4)
    assert f"42 rows in {len(data.packs)} packs" in said
    assert "the 4 tokens that all begin with are run once" in said
