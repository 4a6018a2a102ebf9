"""The prompt pools that come with the recipes: enough of them, apart from each other, and answered rightly by their own examples."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from describers.vocabulary import values
from speech_llm.errors import UserError
from speech_llm.recipe import load_recipe
from speech_llm.targets.prompts import KINDS, PoolPrompt, load_pool
from speech_llm.targets.verify import verdict

RECIPES = Path(__file__).parent.parent / "recipes"
POOLS = {path.stem: load_pool(path) for path in sorted((RECIPES / "prompts").glob("*.yaml"))}
CHOICES = ("gender", "accent", "speed", "emotion", "age_group", "pitch", "volume", "noise", "reverberation", "event")  # fmt: skip
WORDS = "We parked the car by the river."


def plain(text: str) -> str:
    """A prompt without what does not change it: case, punctuation, spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.casefold()))


def test_there_are_enough_prompts_of_every_kind() -> None:
    assert len(POOLS["speech"]) >= 120
    assert len(POOLS["sound"]) >= 60
    for name, least in (("speech", 20), ("sound", 10), ("heldout", 3)):
        counts = Counter(prompt.kind for prompt in POOLS[name])
        assert set(counts) == set(KINDS), name
        assert min(counts.values()) >= least, (name, counts)
    assert [prompt.text for prompt in POOLS["what_can_you_hear"]] == ["What can you hear?"]


def test_no_two_prompts_of_a_pool_are_the_same() -> None:
    for name, pool in POOLS.items():
        same = [text for text, count in Counter(plain(prompt.text) for prompt in pool).items() if count > 1]
        assert not same, (name, same)


def test_what_is_held_out_stands_in_no_other_pool_and_no_recipe_trains_on_it() -> None:
    held = {plain(prompt.text) for prompt in POOLS["heldout"]}
    for name, pool in POOLS.items():
        if name != "heldout":
            assert not held & {plain(prompt.text) for prompt in pool}, name
    assert all(prompt.seen is False for prompt in POOLS["heldout"])
    for path in RECIPES.glob("*.yaml"):
        overrides = ["data.manifests=[x.jsonl]"] if "manifests" in path.read_text() else []
        assert Path(load_recipe(path, overrides).targets.prompts).stem != "heldout"


def some_values(prompt: PoolPrompt) -> list[dict[str, Any]]:
    """Clips with every value of what a prompt asks for (of several attributes not every combination)."""
    names = sorted({*prompt.asks, *prompt.example_fields(), *prompt.json_keys.values()} & set(CHOICES))
    columns = [list(values(name)) for name in names]
    longest = max(map(len, columns), default=1)
    return [
        {name: column[(i + k) % len(column)] for k, (name, column) in enumerate(zip(names, columns, strict=True))}
        | {"transcript": WORDS}
        for i in range(longest)
    ]  # fmt: skip


OPTIONS = {name: list(values(name)) for name in CHOICES}
NEW = [(name, prompt) for name in ("speech", "sound", "heldout") for prompt in POOLS[name]]


@pytest.mark.parametrize(("pool", "prompt"), NEW, ids=[f"{name}-{prompt.id}" for name, prompt in NEW])
def test_the_worked_example_of_a_prompt_is_a_right_answer_and_another_clips_is_not(
    pool: str, prompt: PoolPrompt
) -> None:
    assert prompt.kind in KINDS
    if prompt.example is None:
        return
    clips = some_values(prompt)
    for clip in clips:
        outcome = verdict(prompt.example_answer(clip), prompt, clip, OPTIONS)
        assert outcome == "ok", (clip, prompt.example_answer(clip))
    for clip, other in itertools.islice(itertools.permutations(clips, 2), 20):
        asked = [name for name in prompt.asks if name != "transcript"]
        if any(clip[name] != other[name] for name in asked):
            assert verdict(prompt.example_answer(other), prompt, clip, OPTIONS) != "ok"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("example: {gender}", "'example' must be a text"),
        ("example: 5", "'example' must be a text"),
        ("json: [gender]", "'json' must name"),
        ("json: {answer: [gender]}", "'json' must name"),
        ("seen: maybe", "'seen' must be true or false"),
    ],
)
def test_a_slip_in_a_pool_is_a_sentence(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "pool.yaml").write_text(f"prompts:\n- {{id: a, text: Who, asks: [gender], {line}}}\n")
    with pytest.raises(UserError, match=why):
        load_pool(tmp_path / "pool.yaml")


def test_a_pool_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_bytes("prompts: [é]".encode("latin-1"))
    with pytest.raises(UserError, match="not YAML in UTF-8"):
        load_pool(tmp_path / "pool.yaml")
    with pytest.raises(UserError):
        load_pool(tmp_path)
