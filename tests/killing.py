"""A training that is killed: run as a script, it trains tiny models in children that it forks and kills.

    python killing.py FOLDER NUMBER SEED

    random    NUMBER children killed at random instants, each going on from where the last died
    writing   children that die while a checkpoint is written, in the middle of a file or before the folder has its name
    workers   killed children that read with different numbers of workers
    phases    children of a whole run in two phases that die between these

Prints one JSON line: `{"steps", "runs", "random": [...], "writing": [...], "workers": [...]}`, the newest checkpoint at each death, and
`"phases"`, the finished stages of both phases at each death. Every run that ends is compared with the one that nobody disturbed, bit for bit.
Forks, as loading the libraries takes longer than the training.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from learning import saved_recipe, tiny_examples, tiny_recipe

import speech_llm.files
from speech_llm.examples import write_examples
from speech_llm.files import read_jsonl
from speech_llm.pipeline import run_stages
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.training.checkpoint import latest_checkpoint
from speech_llm.training.log import MEASURED
from speech_llm.training.loop import train

STEPS = 24


def recipe_of(folder: Path, workers: int = 1) -> Recipe:
    """Connector and adapters with dropout, so that chance has a part in it; a checkpoint every third step."""
    patch = pytest.MonkeyPatch()
    return tiny_recipe(
        patch,
        folder,
        "trainable.lora.rank=2",
        "trainable.lora.dropout=0.3",
        "optimizer.epochs=20",
        f"optimizer.max_steps={STEPS}",
        "optimizer.batch_tokens=128",
        "optimizer.checkpoint_every=3",
        "optimizer.kl_every=7",
        f"optimizer.workers={workers}",
        "eval.probe_every=10",
    )


def life(folder: Path, name: str, workers: int = 1) -> None:
    """One whole training, or what is left of it."""

    def probe(model: torch.nn.Module, _processor: object, _epoch: float) -> dict[str, object]:
        torch.randn(3)  # a probe that draws from chance must not disturb
        size = float(sum(p.detach().abs().sum() for p in model.parameters() if p.requires_grad))
        return {"probe": {"size": {"of weights": {"value": size}}}}

    train(
        recipe_of(folder, workers),
        folder / "examples.jsonl",
        folder / name / "train",
        folder / name / "model",
        probe=probe,
        progress=False,
    )


def child(work: Callable[[], None]) -> int:
    """Fork, do `work` there; returns the child's process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int, most_s: float | None = None) -> int | None:
    """The child's exit code, negative where a signal ended it; after `most_s` it is killed."""
    ends = None if most_s is None else time.perf_counter() + most_s
    while True:
        done, status = os.waitpid(pid, 0 if ends is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if ends is not None and time.perf_counter() >= ends:
            os.kill(pid, signal.SIGKILL)
            ends = None
        time.sleep(0.0005)


def log_of(folder: Path, name: str) -> list[dict[str, object]]:
    """The log of a run without what it tells of the machine."""
    rows = [row for _, row in read_jsonl(folder / name / "train" / "log.jsonl")]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def check_same(folder: Path, name: str) -> None:
    """Log and weights of a run are those of the undisturbed one, bit for bit."""
    assert log_of(folder, name) == log_of(folder, "whole")
    last = latest_checkpoint(folder / "whole" / "train" / "checkpoints")
    assert last is not None
    for file in ("model/model.safetensors", f"train/checkpoints/{last.name}/optimizer.safetensors"):
        expected, found = (safetensors.torch.load_file(folder / run / file) for run in ("whole", name))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert not list((folder / name / "train").rglob("*.part"))


def killed_at_random(folder: Path, number: int, seed: int) -> tuple[int, list[str]]:
    """Runs until `number` children were killed; how many runs were finished, and where each kill found its run."""
    rng = random.Random(seed)
    started = time.perf_counter()
    assert wait(child(lambda: life(folder, "again"))) == 0
    length_s = time.perf_counter() - started
    check_same(folder, "again")
    runs, at = 0, []
    while len(at) < number:
        name = f"run{runs}"
        code = wait(child(lambda name=name: life(folder, name)), rng.uniform(0.05, 0.6) * length_s)
        if code == -signal.SIGKILL:
            found = latest_checkpoint(folder / name / "train" / "checkpoints")
            at.append("none" if found is None else found.name)
            continue
        assert code == 0
        check_same(folder, name)
        runs += 1
    assert wait(child(lambda: life(folder, f"run{runs}"))) == 0
    check_same(folder, f"run{runs}")
    return runs + 1, at


def dies(work: Callable[[], None], here: Callable[[Path], bool], before: bool) -> Callable[[], None]:
    """`work`, killing itself where a file or folder gets a name that is `here`: before it has that name, or just after."""
    replace = os.replace

    def rename(source: str | Path, target: str | Path) -> None:
        found = here(Path(target))
        if found and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if found:
            os.kill(os.getpid(), signal.SIGKILL)

    def until_then() -> None:
        os.replace = rename  # type: ignore[assignment]
        work()

    return until_then


def killed_while_writing(folder: Path) -> list[str]:
    """Children that kill themselves when a checkpoint's file is half written, or whole and not yet renamed; where each died."""
    at = []
    write = speech_llm.files.os.fsync

    def dies_at(place: int, half: bool) -> Callable[[], None]:
        seen = 0

        def sync(descriptor: int) -> None:
            nonlocal seen
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if "checkpoints" in path:
                seen += 1
                if seen == place and half:
                    os.truncate(path, os.path.getsize(path) // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            write(descriptor)

        def work() -> None:
            os.fsync = sync  # type: ignore[assignment]
            life(folder, "written")

        return dies(work, lambda target: seen >= place and not half and "step-" in target.name, before=True)

    # The three files of a checkpoint, torn; a checkpoint whole but without its name; an old one losing its name.
    for place, half in ((1, True), (2, True), (3, True), (3, False), (4, True), (9, True), (9, False)):
        assert wait(child(dies_at(place, half))) == -signal.SIGKILL
        found = latest_checkpoint(folder / "written" / "train" / "checkpoints")
        at.append("none" if found is None else found.name)
    assert wait(child(lambda: life(folder, "written"))) == 0
    check_same(folder, "written")
    return at


def other_workers(folder: Path) -> list[str]:
    """Children with 0, 3, 1 and 2 workers; each but the last dies where a later checkpoint is about to get its name."""
    checkpoints, at = folder / "read" / "train" / "checkpoints", []
    for workers, second in ((0, "step-000006"), (3, "step-000009"), (1, "step-000012")):
        work = dies(
            lambda workers=workers: life(folder, "read", workers), (checkpoints / second).__eq__, before=True
        )
        assert wait(child(work)) == -signal.SIGKILL
        found = latest_checkpoint(checkpoints)
        at.append("none" if found is None else found.name)
    assert wait(child(lambda: life(folder, "read", 2))) == 0
    check_same(folder, "read")
    return at


def killed_between_phases(folder: Path) -> list[list[str]]:
    """Children that die on their way from one phase to the next, each a little later than the one before; what was finished then."""
    recipe_file = saved_recipe(folder / "recipe")
    first, second = "phases/1-first", "phases/2-second"

    def whole_run(name: str) -> None:
        run_stages(load_recipe(recipe_file), folder / name, "train", progress=False, say=lambda _: None)

    whole_run("phased/whole")
    at = []

    # The first phase has just its manifest; the second is being begun from copies; it has begun; it is over and the model not in place.
    for name, before in (
        (f"{first}/train/manifest.json", False),
        (f"{second}/corpus", True),
        (f"{second}/describe", True),
        (f"{second}/recipe.yaml", True),
        (f"{second}/targets/in_progress.json", True),
        (f"{second}/train/in_progress.json", False),
        (f"{second}/train/manifest.json", False),
        ("model", True),
    ):
        place = folder / "phased" / "killed" / name
        work = dies(lambda: whole_run("phased/killed"), place.__eq__, before)
        assert wait(child(work)) == -signal.SIGKILL, name
        manifests = (folder / "phased" / "killed").glob("phases/*/[!.]*/manifest.json")
        at.append(sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in manifests))
    assert wait(child(lambda: whole_run("phased/killed"))) == 0
    for phase in (first, second):
        for run in ("whole", "killed"):
            (folder / phase).mkdir(parents=True, exist_ok=True)
            os.symlink(folder / "phased" / run / phase, folder / phase / run)
        check_same(folder / phase, "killed")
    expected, found = (
        (folder / "phased" / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "killed")
    )
    assert found == expected
    told = json.loads((folder / "phased" / "killed" / second / "targets" / "manifest.json").read_text())
    assert not [name for name in told["outputs"] if ".part" in name]
    return at


def main(folder: Path, number: int, seed: int) -> None:
    torch.set_num_threads(1)
    write_examples(folder / "examples.jsonl", tiny_examples(folder / "clips", 8))
    life(folder, "whole")  # here, so that children find every library loaded
    runs, at = killed_at_random(folder, number, seed)
    found = {
        "random": at,
        "writing": killed_while_writing(folder),
        "workers": other_workers(folder),
        "phases": killed_between_phases(folder),
    }
    print(json.dumps({"steps": STEPS, "runs": runs, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
