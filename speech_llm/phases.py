"""Tasks learned one after another: each phase an ordinary run that goes on from the model before it.

    phases -> RUN/phases/1-NAME, RUN/phases/2-NAME, ... (corpus, describe, targets, train) -> every task after every phase

In: a recipe with `phases`. Out: a run folder per phase, and in `RUN/results.json` the matrix of how well every phase's tasks are
done after every phase, with what was forgotten. A killed run goes on in the phase and stage where it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.scoring import RATES
from speech_llm.files import read_json, sha256_file, stable_hash, write_json
from speech_llm.summary import score_of

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

RunStages = Callable[["Recipe", Path, str], None]


def phase_dir(run_dir: Path, number: int, phase: Recipe) -> Path:
    """The run folder of a phase (numbers from 0)."""
    return run_dir / "phases" / f"{number + 1}-{phase.phase_name}"


def run_phases(
    recipe: Recipe,
    run_dir: Path,
    until: str,
    run: RunStages,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Run every phase up to `until`; after the training of all, evaluate, write `results.json` and the report.

    `run(recipe, folder, until)` runs the stages of one phase, each resuming by itself; `say` gets a line a phase, and the matrix.
    """
    phases = recipe.phase_recipes
    folders = [phase_dir(run_dir, number, phase) for number, phase in enumerate(phases)]
    stage = "train" if until in ("eval", "report") else until
    for number, (phase, folder) in enumerate(zip(phases, folders, strict=True)):
        _reuse(phases, folders, number)
        if number:
            phase.start_from = folders[number - 1] / "model"
        say(f"phase {phase.phase_name}")
        run(phase, folder, stage)
    if stage == "train":
        _copy(folders[-1] / "model", run_dir / "model")
    if until in ("eval", "report"):
        results = evaluate_phases(phases, folders, progress)
        write_json(run_dir / "results.json", results)
        say(phases_table(results["phases"]))
    if until == "report":
        from eval.report import write_report

        write_report([run_dir], run_dir / "report.html")


def _reuse(phases: Sequence[Recipe], folders: Sequence[Path], number: int) -> None:
    """Copy clips and descriptions from an earlier phase that has the same, instead of making them again."""
    here, target = _heard(phases[number]), folders[number]
    if (target / "describe" / "manifest.json").exists():
        return
    for earlier, source in zip(phases[:number], folders, strict=False):
        if _heard(earlier) == here and (source / "describe" / "manifest.json").exists():
            target.mkdir(parents=True, exist_ok=True)
            # What makes the folder a run's own; the phase's own recipe is written over it.
            shutil.copy(source / "recipe.yaml", target / "recipe.yaml")
            for stage in ("corpus", "describe"):
                _copy(source / stage, target / stage)
            return


def _copy(source: Path, target: Path) -> None:
    """A folder copied aside and renamed, so that a kill leaves the whole of it or none."""
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def _heard(phase: Recipe) -> str:
    return stable_hash(
        [
            phase.data.model_dump(mode="json"),
            phase.describe.model_dump(mode="json"),
            phase.targets.clips,
            phase.seed,
        ]
    )


def evaluate_phases(phases: Sequence[Recipe], folders: Sequence[Path], progress: bool) -> dict[str, Any]:
    """Every phase's tasks after every phase; the results of the last model, the matrix and what was forgotten."""
    from eval.runner import evaluate
    from eval.tasks import Task, load_tasks, write_task
    from speech_llm.evaluation import build_tasks
    from speech_llm.responders import load_speech_model

    tasks: list[list[Task]] = []
    for phase, folder in zip(phases, folders, strict=True):
        place = folder / "eval" / "tasks"
        shutil.rmtree(place, ignore_errors=True)  # of attributes that are no longer asked
        for task in build_tasks(phase, folder):
            write_task(task, place / f"{task.name}.jsonl")
        tasks.append([task for path in sorted(place.glob("*.jsonl")) for task in load_tasks(f"jsonl:{path}")])
    results: list[list[dict[str, Any]]] = []
    for phase, folder in zip(phases, folders, strict=True):
        settings = phase.eval
        responder = load_speech_model(folder / "model", settings.max_new_tokens, settings.batch_tokens)
        row = []
        # Phases are trained again without their answers being thrown away.
        model = " ".join(
            [
                *map(sha256_file, sorted((folder / "model").glob("*.safetensors"))),
                str(settings.max_new_tokens),
            ]
        )
        for asked, own in zip(phases, tasks, strict=True):
            limit = asked.eval.limits.get("speech_llm", asked.eval.limit)
            out = folder / "eval" / "after" / str(asked.phase_name)
            row.append(evaluate(responder, own, out, limit=limit, progress=progress, model=model))
        results.append(row)
    names = [str(phase.phase_name) for phase in phases]
    matrix = [[mean_score(cell) for cell in row] for row in results]
    last = {
        f"{name}: {task}": value
        for name, cell in zip(names, results[-1], strict=True)
        for task, value in cell.items()
    }
    return {
        "models": {"speech_llm": last},
        "phases": {
            "names": names,
            "matrix": matrix,
            "tasks": [dict(zip(names, row, strict=True)) for row in results],
            "backward_transfer": backward_transfer(matrix),
            "average": average_score(matrix),
        },
        "training": read_json(folders[-1] / "model" / "training.json"),
    }


def mean_score(results: dict[str, dict[str, Any]]) -> float | None:
    """Mean over tasks of the accuracy, or of 1 - the error rate; None when nothing was scored."""
    found = [score for score in map(score_of, results.values()) if score is not None]
    values = [1 - value if metric in RATES else value for metric, value in found if metric != "mae"]
    return round(sum(values) / len(values), 4) if values else None


def backward_transfer(matrix: Sequence[Sequence[float | None]]) -> float | None:
    r"""$\frac{1}{T-1} \sum_{i<T} (R_{T,i} - R_{i,i})$: what later phases did to earlier tasks, negative when they forgot.

    $R_{i,j}$ is the score on the tasks of phase j after phase i, the row i and column j of `matrix`
    (Lopez-Paz & Ranzato 2017, 1706.08840, equation 3). None with one phase or where a score is missing.
    """
    last = len(matrix) - 1
    changes = []
    for place in range(last):
        then, now = matrix[place][place], matrix[last][place]
        if then is None or now is None:
            return None
        changes.append(now - then)
    return round(sum(changes) / len(changes), 4) if changes else None


def average_score(matrix: Sequence[Sequence[float | None]]) -> float | None:
    r"""$\frac{1}{T} \sum_i R_{T,i}$: the mean over all phases' tasks after the last (1706.08840, equation 2)."""
    known = [value for value in matrix[-1] if value is not None] if matrix else []
    return round(sum(known) / len(known), 4) if known and len(known) == len(matrix[-1]) else None


def phases_table(phases: dict[str, Any]) -> str:
    """The matrix as plain text, in per cent: a row for the model after each phase, a column for each phase's tasks."""
    names = phases["names"]
    width = max(9, *(len(name) + 2 for name in names))
    lines = ["after".ljust(width) + "".join(name.rjust(width) for name in names)]
    for name, row in zip(names, phases["matrix"], strict=True):
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in row]
        lines.append(name.ljust(width) + "".join(cell.rjust(width) for cell in cells))
    transfer = phases["backward_transfer"]
    told = "-" if transfer is None else f"{100 * transfer:+.1f}"
    return "\n".join([*lines, f"backward transfer {told} points (below 0: earlier tasks were forgotten)"])
