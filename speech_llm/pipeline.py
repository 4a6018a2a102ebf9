"""The running of stages: which are finished, which go on where they were stopped, which start over.

In: a recipe, a run folder and the stages (`speech_llm.stages`). Out: `RUN/<stage>/` with a `manifest.json`, written last: the
recipe's part, the hashes of what went in and came out, versions, seconds, counts. A stage is skipped when it is finished and
nothing that it depends on has changed; one that was interrupted continues; one whose recipe part or input changed starts over.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from speech_llm.errors import UserError
from speech_llm.files import (
    atomic_write,
    explain_os_error,
    read_json,
    sha256_file,
    stable_hash,
    write_json,
)
from speech_llm.launch import Launch
from speech_llm.recipe import Recipe
from speech_llm.stages import STAGES, Stage

Say = Callable[[str], None]
PACKAGES = ("speech-llm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")
HUGE_BYTES = 256 << 20
HEADER = "# The whole recipe of this run, as"


def run_stages(
    recipe: Recipe,
    run_dir: Path,
    until: str = "report",
    *,
    progress: bool = True,
    say: Say = print,
    command: str | None = None,
    stages: tuple[Stage, ...] | None = None,
    launch: Launch | None = None,
) -> None:
    """Run the stages up to and including `until` in `run_dir`, skipping those that are finished.

    `say` gets one line per stage; `command` is what the user typed, kept at the head of `RUN/recipe.yaml`. Of several processes of a
    `launch` only the main one does so; the others do their part of what all do together.
    Raises `UserError`: a user's mistake, a folder that is no run's, another process at work in the folder.
    """
    every = stages or STAGES
    # A later phase may have a stage that the recipe's head has not, such as a mixture.
    of = [recipe, *recipe.phase_recipes]
    stages = tuple(stage for stage in every if any(stage.when(part) for part in of))
    if until not in [stage.name for stage in stages]:
        raise UserError(
            f"{recipe.path}: a run of this recipe has no stage {until}, because its {until} is empty; "
            f"it has: {', '.join(stage.name for stage in stages)}"
        )
    launch = launch or Launch()
    if not launch.main:
        launch.follow(lambda part: _do_part(part, recipe, every))
        return
    last = [stage.name for stage in stages].index(until)
    with _locked(run_dir):
        _claim(recipe, run_dir, stages, command)
        if recipe.phases:
            from speech_llm.phases import run_phases

            def run_phase(phase: Recipe, folder: Path, last: str) -> None:
                run_stages(phase, folder, last, progress=progress, say=say, command=command, stages=every, launch=launch)  # fmt: skip
                if phase is recipe.phase_recipes[-1]:
                    launch.end()

            run_phases(recipe, run_dir, until, run_phase, progress, say)
            return
        for number, stage in enumerate(stages[: last + 1], start=1):
            title = f"[{number}/{last + 1}] {stage.name}"
            manifest = finished(stage, recipe, run_dir)
            if manifest is not None:
                say(
                    f"{title}: already done in {_time(manifest['seconds'])}, skipped{_summary(manifest['counts'])}"
                )
            else:
                say(f"{title} ...")
                manifest = run_stage(stage, recipe, run_dir, progress, say, launch)
                say(f"{title}: done in {_time(manifest['seconds'])}{_summary(manifest['counts'])}")
            if stage.together and recipe.phase_name is None:
                launch.end()


def _do_part(part: dict[str, Any], recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """As another process than the main one: do the stage that it has begun."""
    phases = {phase.phase_name: phase for phase in recipe.phase_recipes}
    recipe = phases.get(part["phase"], recipe)
    if part["start_from"] is not None:
        recipe.start_from = Path(part["start_from"])
    stage = next(stage for stage in stages if stage.name == part["stage"])
    stage.run(recipe, Path(part["run_dir"]), False)


def finished(stage: Stage, recipe: Recipe, run_dir: Path) -> dict[str, Any] | None:
    """The manifest of a stage that needs not run again: nothing that it depends on has changed, its output is there."""
    path = run_dir / stage.name / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = read_json(path)
        key = _key(stage, recipe, _hashes(stage.inputs(recipe, run_dir), run_dir))
        made = [run_dir / name for name in (*manifest["outputs"], *stage.outputs)]
        good = manifest["key"] == key and all(output.exists() for output in made)
        return {**manifest, "seconds": float(manifest["seconds"])} if good else None
    except (UserError, KeyError, TypeError, ValueError):  # damaged: made again
        return None


def run_stage(
    stage: Stage,
    recipe: Recipe,
    run_dir: Path,
    progress: bool = True,
    say: Say = print,
    launch: Launch | None = None,
) -> dict[str, Any]:
    """Run one stage, from where an interrupted run of the same stage stopped; returns its manifest.

    What an earlier run left is thrown away when it was made with another recipe part or input. No manifest is there
    while the stage runs or after it failed.
    """
    folder = run_dir / stage.name
    marker, manifest_path = folder / "in_progress.json", folder / "manifest.json"
    inputs = _hashes(stage.inputs(recipe, run_dir), run_dir)
    key = _key(stage, recipe, inputs)
    earlier_key, spent_s = _earlier(marker, manifest_path)
    manifest_path.unlink(missing_ok=True)
    if earlier_key != key:
        if earlier_key is not None:
            say(f"{stage.name}: the recipe or its input has changed, so it starts over")
        for path in (folder, *(run_dir / name for name in stage.outputs)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        spent_s = 0.0
    elif marker.exists():
        say(f"{stage.name}: continues where it was interrupted after {_time(spent_s)}")
    write_json(marker, {"stage": stage.name, "key": key, "seconds": spent_s})
    if stage.together and launch is not None:
        start = None if recipe.start_from is None else str(recipe.start_from)
        launch.call(
            {"stage": stage.name, "phase": recipe.phase_name, "run_dir": str(run_dir), "start_from": start}
        )
    started = time.perf_counter()
    try:
        counts = stage.run(recipe, run_dir, progress)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    finally:
        spent_s = round(spent_s + time.perf_counter() - started, 2)
        with contextlib.suppress(UserError):  # a full disk has its own message
            write_json(marker, {"stage": stage.name, "key": key, "seconds": spent_s})
    # Names with a dot in front are what a kill left of files half written.
    made = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    files = [path for path in made if path not in (marker, manifest_path)]
    manifest = {
        "stage": stage.name,
        "version": stage.version,
        "key": key,
        "recipe": stage.part(recipe),
        "inputs": inputs,
        "outputs": _hashes(files, run_dir),
        "versions": versions(),
        "seconds": spent_s,
        "counts": counts,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(manifest_path, manifest)
    marker.unlink()
    return manifest


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name.replace("-", "_")] = importlib.metadata.version(name)
    return found


def _key(stage: Stage, recipe: Recipe, inputs: dict[str, str]) -> str:
    """Everything that a stage's output depends on, as one hash."""
    # Of files outside the run only the content counts, so that the project's folder can be moved.
    contents = sorted(("" if Path(name).is_absolute() else name) + digest for name, digest in inputs.items())
    return stable_hash(
        {"stage": stage.name, "version": stage.version, "recipe": stage.part(recipe), "inputs": contents}
    )


def _hashes(files: list[Path], run_dir: Path) -> dict[str, str]:
    """File -> hash of its content (of a huge one its size and time); files of the run are named relative to it."""
    out, root = {}, run_dir.resolve()
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file")
        whole = file.resolve()
        name = whole.relative_to(root).as_posix() if whole.is_relative_to(root) else str(whole)
        stat = file.stat()
        huge = stat.st_size > HUGE_BYTES
        out[name] = f"{stat.st_size} bytes, changed {stat.st_mtime_ns}" if huge else sha256_file(file)
    return out


def _earlier(marker: Path, manifest: Path) -> tuple[str | None, float]:
    """Key and seconds of what an earlier run of a stage left: interrupted (its marker) or finished (its manifest)."""
    for path in (marker, manifest):
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # absent or damaged
            found = read_json(path)
            return str(found["key"]), float(found["seconds"]) if path == marker else 0.0
    return None, 0.0


def _claim(recipe: Recipe, run_dir: Path, stages: tuple[Stage, ...], command: str | None) -> None:
    """Write `RUN/recipe.yaml`, which makes the folder a run's; one that holds another's files is left alone."""
    path = run_dir / "recipe.yaml"
    ours = path.exists() and path.read_text(encoding="utf-8", errors="replace").startswith(HEADER)
    names = [
        "recipe.yaml",
        *(stage.name for stage in stages),
        *(name for stage in stages for name in stage.outputs),
    ]
    taken = [run_dir / name for name in names if (run_dir / name).exists()]
    if taken and not ours:
        raise UserError(
            f"{taken[0]}: this was not made by a run, so nothing is written here; give another folder with --out"
        )
    with atomic_write(path) as handle:
        handle.write(f"{HEADER} `{command or 'speech-llm run'}` read it\n{recipe.to_yaml()}")


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of the run folder; the lock ends with the process, however it ends."""
    import filelock

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(run_dir / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(
            f"{run_dir}: another process is at work in this run folder; wait for it or give another --out"
        ) from None
    except OSError as error:
        raise explain_os_error(error, run_dir) from error


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _summary(counts: dict[str, Any]) -> str:
    """The plain numbers among a stage's counts, as the end of its line."""
    plain = [
        f"{name} {value:,}"
        for name, value in counts.items()
        if isinstance(value, int) and not isinstance(value, bool)
    ]
    nested = [
        f"{name} {value['described']:,}"
        + (f" (rejected {value['rejected']:,})" if value.get("rejected") else "")
        for name, value in counts.items()
        if isinstance(value, dict) and "described" in value
    ]
    return f" ({', '.join((plain + nested)[:4])})" if plain or nested else ""
