"""Several processes do what one does with the same global batch: whole copies (data parallel) and shards (FSDP2), on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel
import pytest
import safetensors.torch
import torch
from learning import tiny_examples, tiny_recipe

from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl
from speech_llm.training.log import MEASURED
from speech_llm.training.loop import train
from speech_llm.training.processes import Processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with answers of very different lengths, and what one process makes of them in accumulated batches."""
    path: Path = tmp_path_factory.mktemp("processes")
    parallel.alone(path)
    return path


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = [row for _, row in read_jsonl(folder / name / "train" / "log.jsonl")]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name / "model" / "model.safetensors")


def test_two_copies_do_what_one_process_does_bit_for_bit(folder: Path) -> None:
    parallel.launch(folder, "copies", parallel.COPIES)
    assert len({row["answer_tokens"] for row in rows_of(folder, "one")}) > 1  # answers are uneven
    # The divergence is measured at each process's first batch, so of more batches than in one process.
    divergence = "kl_base"
    expected, found = ([{k: v for k, v in row.items() if k != divergence} for row in rows_of(folder, name)] for name in ("one", "copies"))  # fmt: skip
    assert found == expected
    one, two = weights_of(folder, "one"), weights_of(folder, "copies")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_shards_do_what_one_process_does(folder: Path) -> None:
    parallel.launch(folder, "shards", parallel.SHARDS)
    expected, found = rows_of(folder, "one"), rows_of(folder, "shards")
    assert len(found) == len(expected) == 6
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert (two["rows"], two["answer_tokens"]) == (one["rows"], one["answer_tokens"])
    one, two = weights_of(folder, "one"), weights_of(folder, "shards")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_what_no_process_has_a_gradient_for_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in one process, where the optimiser then passes it over.
    processes = Processes()
    processes.count = 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    nowhere, here = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    here.grad = torch.ones(3)
    processes.sum_gradients([nowhere, here])
    assert nowhere.grad is None
    assert here.grad.tolist() == [2.0, 2.0, 2.0]


def test_ways_to_launch_that_are_not_supported_are_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UserError, match="FSDP2 only"):
            Processes()
    with pytest.raises(UserError, match="nosuch is not known; known are"):
        Processes(["nosuch"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.l2_start=0.1", "eval.probes=[]"], "loss: .*other weights"),
        (["loss={type: kl, top_k: null}", "eval.probes=[]"], r"loss\.type: .*asked at each step"),
        (["eval.probes=[json]"], r"eval\.probes: .*set eval\.probes to \[\]"),
        (
            ["eval.probes=[]", "optimizer.compile=true"],
            r"optimizer\.compile: .*set optimizer\.compile to false",
        ),
    ],
)
def test_what_shards_cannot_do_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], said: str
) -> None:
    recipe = tiny_recipe(monkeypatch, tmp_path, *overrides)
    processes = Processes()
    processes.check(recipe)  # one process does it all
    processes.sharded = True
    with pytest.raises(UserError, match=said):
        processes.check(recipe)


def test_a_run_goes_on_with_as_many_batches_a_step_as_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips", 4))
    places = tmp_path / "examples.jsonl", tmp_path / "train", tmp_path / "model"
    settings = "optimizer.max_steps=2", "eval.probes=[]"
    train(tiny_recipe(monkeypatch, tmp_path, *settings), *places, progress=False)
    with pytest.raises(
        UserError, match=r"a step was 1 batches .* would now be 2.*as many processes as before"
    ):
        train(
            tiny_recipe(monkeypatch, tmp_path, *settings, "optimizer.accumulate=2"), *places, progress=False
        )
