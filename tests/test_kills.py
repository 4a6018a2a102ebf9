"""A run killed at any instant goes on as if nothing had happened: weights, optimiser and every later loss are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from learning import tiny_examples, tiny_recipe

import speech_llm.training.loop as loop
from speech_llm.cli import main
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import read_json, read_jsonl
from speech_llm.training.best import Best
from speech_llm.training.checkpoint import export_checkpoint, latest_checkpoint

HERE = Path(__file__).parent
KILLS = 20


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `killing.py` tells; it fails where a run that was killed differs from the one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), str(folder), str(KILLS), "0"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_run_killed_at_twenty_random_instants_equals_an_undisturbed_one(killed: dict[str, Any]) -> None:
    assert len(killed["random"]) == KILLS
    # They fell on different places: in the first steps, and later ones.
    assert len(set(killed["random"])) >= 5


def test_death_in_the_middle_of_a_checkpoint_leaves_the_one_before(killed: dict[str, Any]) -> None:
    at = killed["writing"]
    assert at[:4] == ["none"] * 4  # the very first was torn, at each of its files, or had no name yet
    assert "step-" in at[-1]


def test_another_number_of_data_workers_changes_nothing(killed: dict[str, Any]) -> None:
    assert killed["workers"] == ["step-000003", "step-000008", "step-000009"]  # 8: the end of an epoch


def test_a_run_killed_between_two_phases_equals_an_undisturbed_one(killed: dict[str, Any]) -> None:
    at = killed["phases"]
    assert len(at) == 8
    trained = [f"1-first/{stage}" for stage in ("corpus", "describe", "targets", "train")]
    assert at[0] == at[1] == trained  # the first phase is finished, and nothing of the second is there
    assert at[-1] == [*trained, *(name.replace("1-first", "2-second") for name in trained)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run whose probe found the most after its third step."""
    recipe = tiny_recipe(
        monkeypatch,
        tmp_path,
        "optimizer.max_steps=8",
        "optimizer.batch_tokens=128",
        "optimizer.checkpoint_every=4",
        "optimizer.keep=2",
        "optimizer.best=json.audio answer",
        "eval.probe_every=1",
    )
    write_examples(tmp_path / "examples.jsonl", tiny_examples(tmp_path / "clips", 8))
    values = iter([0.1, 0.2, 0.3, 0.9, 0.4, 0.9, 0.3, 0.2, 0.1, 0.0])

    def probe(_model: Any, _processor: Any, _epoch: float) -> dict[str, Any]:
        return {"probe": {"json": {"audio answer": {"value": next(values), "better": "higher"}}}}

    loop.train(
        recipe,
        tmp_path / "examples.jsonl",
        tmp_path / "train",
        tmp_path / "model",
        probe=probe,
        progress=False,
    )
    return tmp_path


def test_the_newest_checkpoints_and_the_best_are_kept(trained: Path) -> None:
    names = sorted(path.name for path in (trained / "train" / "checkpoints").glob("step-*"))
    assert names[0] == "step-000003"  # the first of equals
    assert len(names) == 3
    assert names[-1] == "step-000008"
    assert read_json(trained / "model" / "training.json")["best"] == {"step": 3, "value": 0.9}
    rows = [row for _, row in read_jsonl(trained / "train" / "log.jsonl") if "probe" in row]
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["epoch"] for row in rows][:2] == [0, pytest.approx(1 / 8, abs=0.13)]


def test_any_checkpoint_is_a_model_without_its_optimiser(trained: Path, tmp_path: Path) -> None:
    best = trained / "train" / "checkpoints" / "step-000003"
    (best / "optimizer.safetensors").unlink()
    assert export_checkpoint(best, tmp_path / "best")["step"] == 3
    files = {path.name for path in (tmp_path / "best").iterdir()}
    assert files == {path.name for path in (trained / "model").iterdir()}
    found = safetensors.torch.load_file(tmp_path / "best" / "model.safetensors")
    last = safetensors.torch.load_file(trained / "model" / "model.safetensors")
    assert found.keys() == last.keys()
    assert not all(torch.equal(value, last[name]) for name, value in found.items())
    shutil.rmtree(trained / "train" / "checkpoints" / "model")
    with pytest.raises(UserError, match="cannot be made a model"):
        export_checkpoint(best, tmp_path / "other")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "other")


def test_export_on_the_command_line_takes_a_checkpoint_or_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as ended:
            main(["export", *arguments])
        return ended.value.code

    assert call(str(trained), "--out", str(tmp_path / "newest")) == 0
    assert "after step 8" in capsys.readouterr().out
    newest, last = (folder / "model.safetensors" for folder in (tmp_path / "newest", trained / "model"))
    assert newest.read_bytes() == last.read_bytes()
    assert call(str(trained), "--out", str(tmp_path / "newest")) == 2
    assert call(str(tmp_path / "nothing"), "--out", str(tmp_path / "other")) == 2
    assert "not a whole checkpoint" in capsys.readouterr().err


def test_a_folder_without_its_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000002").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_the_best_of_what_is_better_lower_is_the_lowest() -> None:
    best = Best("forgetting.KL audio")

    def told(value: float) -> dict[str, Any]:
        return {"probe": {"forgetting": {"KL audio": {"value": value, "better": "lower"}}}}

    assert [best.see(told(value), step) for step, value in enumerate((0.3, 0.4, 0.2, 0.2))] == [
        True,
        False,
        True,
        False,
    ]
    assert best.step == 2
    with pytest.raises(UserError, match=r"optimizer\.best.*there are forgetting\.KL audio"):
        Best("json.nothing").see(told(1.0), 1)
