"""`accelerate launch ... -m speech_llm run RECIPE`: all stages and phases with two processes on CPU do what one process does."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import saved_recipe
from parallel import COPIES, SHARDS, accelerate_launch

import speech_llm.launch
from speech_llm.files import read_json, read_jsonl
from speech_llm.launch import Launch, OtherFailed, launched
from speech_llm.pipeline import run_stages
from speech_llm.recipe import load_recipe
from speech_llm.training.log import MEASURED

# One process has the same global batch when it accumulates twice as much.
ALONE = ["optimizer.accumulate=2"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_recipe(tmp_path_factory.mktemp("launch"))


def launch(options: Sequence[str], verb: str, recipe: Path, out: Path, *overrides: str) -> Any:
    """`accelerate launch` of the command line with two processes."""
    changed = [word for override in overrides for word in ("--set", override)]
    command = ["-m", "speech_llm", verb, str(recipe), "--out", str(out), "--quiet", *changed]
    return accelerate_launch(
        options, *command, CUDA_VISIBLE_DEVICES="", SPEECH_LLM_CACHE=str(out.parent / "cache")
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [row for _, row in read_jsonl(run / "train" / "log.jsonl")]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(recipe_file: Path) -> Path:
    """The run folder of one process."""
    out = recipe_file.parent / "alone"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEECH_LLM_CACHE", str(recipe_file.parent / "cache"))
        run_stages(load_recipe(recipe_file, ALONE), out, progress=False, say=lambda _: None)
    torch.set_num_threads(threads)
    return out


def test_a_whole_run_of_two_processes_is_that_of_one_bit_for_bit(recipe_file: Path, alone: Path) -> None:
    out = recipe_file.parent / "copies"
    done = launch(COPIES, "run", recipe_file, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("backward transfer") == done.stdout.count("try it:") == 1  # one process speaks
    for phase in ("phases/1-first", "phases/2-second"):
        assert read_json(out / phase / "train" / "manifest.json")["counts"]["processes"] == 2
        steps = [row for row in rows_of(out / phase) if "grad_norm" in row]
        assert len(steps) >= 4
        assert rows_of(out / phase) == rows_of(alone / phase)
        one, two = weights_of(alone / phase), weights_of(out / phase)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        answers = f"{phase}/eval/after/first/predictions.jsonl"
        assert (out / answers).read_bytes() == (alone / answers).read_bytes()
    assert (out / "report.html").exists()


def _but_for_training(run: Path, out: Path) -> Path:
    """A copy of a run in which nothing was trained yet."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("train", "model", "results.json"))
    return out


def test_training_in_two_shards_by_the_command_line_is_that_of_one_process(
    recipe_file: Path, alone: Path
) -> None:
    out = _but_for_training(alone, recipe_file.parent / "shards")
    done = launch(SHARDS, "train", recipe_file, out, "eval.probes=[]")
    assert done.returncode == 0, done.stderr[-3000:]
    for phase in ("phases/1-first", "phases/2-second"):
        expected, found = (
            [row for row in rows_of(run / phase) if "grad_norm" in row] for run in (alone, out)
        )
        assert len(found) == len(expected)
        for one, two in zip(expected, found, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
            assert two["answer_tokens"] == one["answer_tokens"]
    assert (out / "model" / "model.safetensors").exists()


def test_a_mistake_that_the_main_process_finds_ends_all_with_one_sentence(
    recipe_file: Path, alone: Path
) -> None:
    # Only the main process asks probes; the other one is waiting for it in the midst of training then.
    out = _but_for_training(alone, recipe_file.parent / "wrong")
    done = launch(COPIES, "run", recipe_file, out, "optimizer.best=json.nothing")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: optimizer.best: no probe tells 'json.nothing'" in done.stderr
    assert "exitcode  : 2" in done.stderr  # what the launcher tells of the process that failed first
    assert "RuntimeError" not in done.stderr


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> tuple[Launch, Launch]:
    """The main process of a launch and another one."""
    monkeypatch.setattr(speech_llm.launch, "TELL_S", 0.0)
    monkeypatch.setattr(speech_llm.launch, "POLL_S", 0.001)
    store = torch.distributed.HashStore()
    return Launch(store), Launch(store, main=False)


def test_another_process_does_what_it_is_called_for_until_it_may_leave(two: tuple[Launch, Launch]) -> None:
    main, other = two
    done: list[dict[str, Any]] = []
    thread = threading.Thread(target=other.follow, args=(done.append,))
    thread.start()
    main.call({"stage": "train", "phase": None})
    main.call({"stage": "train", "phase": "second"})
    main.end()
    main.end()
    thread.join(10)
    assert not thread.is_alive()
    assert [part["phase"] for part in done] == [None, "second"]


def test_the_first_process_that_fails_tells_it_and_all_end_with_its_code(two: tuple[Launch, Launch]) -> None:
    main, other = two
    assert main.fails(2) is None
    assert other.fails(1) == 2
    with pytest.raises(OtherFailed) as caught:
        other.follow(lambda _: None)
    assert caught.value.code == 2


def test_one_process_needs_no_launch_and_a_launch_is_known_by_its_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = Launch()
    alone.call({"stage": "train"})
    alone.end()
    assert alone.main
    assert alone.fails(2) is None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert launched.__wrapped__().main
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "0")
    found: list[Launch] = []
    thread = threading.Thread(target=lambda: found.append(launched.__wrapped__()))
    thread.start()  # it holds the store and waits for the other
    with monkeypatch.context() as patched:
        thread.join(0.5)
        patched.setenv("RANK", "1")
        found.append(launched.__wrapped__())
    thread.join(10)
    assert sorted(launch.main for launch in found) == [False, True]
