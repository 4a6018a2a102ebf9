"""The stages of a run: corpus -> describe -> targets (-> mixture) -> train -> eval -> report, each into its own folder.

In: a recipe and a run folder. Out: `RUN/<stage>/` with a `manifest.json`, written last: the recipe's part, the hashes of
what went in and came out, versions, seconds, counts. A stage is skipped when it is finished and nothing that it depends on
has changed; one that was interrupted continues; one whose recipe part or input changed starts over.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speech_llm.corpus import SPLITS, build_corpus, manifest_files
from speech_llm.errors import UserError
from speech_llm.files import (
    atomic_write,
    explain_os_error,
    read_json,
    read_jsonl,
    sha256_file,
    stable_hash,
    write_json,
)
from speech_llm.launch import Launch, launched
from speech_llm.recipe import Recipe
from speech_llm.recipe_targets import OF_LABELS

Say = Callable[[str], None]
PACKAGES = ("speech-llm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")
HUGE_BYTES = 256 << 20
HEADER = "# The whole recipe of this run, as"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `version` changes whenever the same recipe and input would give another output. `part`: what of the recipe it depends
    on. `inputs`: files whose contents it depends on. `run(recipe, run_dir, progress)` does it, resuming by itself, and
    returns its counts. `outputs`: what it makes outside its own folder, relative to the run folder. `when`: whether a run
    of this recipe has the stage at all. `together`: whether all processes of a launch do it, and not the main one alone.
    """

    name: str
    version: int
    part: Callable[[Recipe], dict[str, Any]]
    inputs: Callable[[Recipe, Path], list[Path]]
    run: Callable[[Recipe, Path, bool], dict[str, Any]]
    outputs: tuple[str, ...] = ()
    when: Callable[[Recipe], bool] = lambda _: True
    together: bool = False


def _corpus(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    return build_corpus(recipe, run_dir / "corpus", progress)


def _describe(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from describers.run import describe_inputs
    from speech_llm.targets.questions import asked_first

    counts: dict[str, Any] = {}
    for split in _splits(run_dir / "corpus"):
        only = None
        if split == "train" and recipe.targets.clips is not None:
            # Words are dear to find out, and only of use for a clip that is asked something.
            ids = [str(row["id"]) for _, row in read_jsonl(run_dir / "corpus" / "train.jsonl")]
            only = {"transcript": set(asked_first(ids, recipe.seed)[: recipe.targets.clips])}
        report = describe_inputs(
            run_dir / "corpus" / f"{split}.jsonl",
            run_dir / "describe" / f"{split}.jsonl",
            use=[_from_recipe(recipe, item) for item in recipe.describe.use],
            label_maps=recipe.describe.label_maps,
            label_columns=recipe.describe.labels or None,
            asr=recipe.describe.asr,
            form=recipe.describe.form,
            telling={**recipe.describe.telling(), "seed": recipe.seed},
            only=only,
            progress=progress,
        )
        counts[split] = {
            "described": report.described,
            "rejected": report.rejected,
            "coverage": report.coverage,
        }
        if report.reasons:
            counts[split]["reasons"] = report.reasons
        if not report.described and split != "natural":
            raise UserError(
                f"{run_dir / 'corpus' / split}.jsonl: none of its {report.rejected} clips can be used; "
                f"{run_dir / 'describe' / split}.rejects.jsonl says why"
            )
    return counts


def _from_recipe(recipe: Recipe, item: str) -> str:
    """A describer's name; the file or folder in ATTRIBUTE=FILE starts at the recipe where it exists there."""
    attribute, equals, reference = item.partition("=")
    path = recipe.resolve_path(reference.strip())
    return f"{attribute}={path}" if equals and path.exists() else item


def _describer_files(recipe: Recipe) -> list[Path]:
    """Probe files and folders of classifiers, which may change under the same name."""
    named = [_from_recipe(recipe, item).partition("=")[2] for item in recipe.describe.use]
    probes = [Path(reference) for reference in named if reference and Path(reference).is_file()]
    return [*probes, *_local_models(*named)]


def _targets(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from speech_llm.targets.run import write_targets

    return write_targets(recipe, run_dir / "describe" / "train.jsonl", run_dir / "targets", progress)


def _mixes(recipe: Recipe) -> bool:
    return bool(recipe.mixture.sources)


def _mixture(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from speech_llm.mixture.run import write_mixture

    return write_mixture(recipe, run_dir / "targets" / "examples.jsonl", run_dir / "mixture", progress)


def _mixture_part(recipe: Recipe) -> dict[str, Any]:
    """The mixture without the names of its files, whose contents count."""
    section = _pick(recipe.mixture)
    for item in section["sources"]:
        for key in recipe.mixture_paths(item):
            item.pop(key)
    return section


def _mixture_files(recipe: Recipe) -> list[Path]:
    paths = [
        path for item in _pick(recipe.mixture)["sources"] for path in recipe.mixture_paths(item).values()
    ]
    inside = [
        sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for path in paths
    ]
    return list(dict.fromkeys(itertools.chain(*inside)))


def _train(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from speech_llm.probes import make_probes
    from speech_llm.training.loop import train

    probes = make_probes(recipe, run_dir, progress) if launched().main else None
    return train(
        recipe,
        run_dir / "targets" / "examples.jsonl",
        run_dir / "train",
        run_dir / "model",
        described=run_dir / "describe" / "train.jsonl",
        extra_examples=run_dir / "mixture" / "examples.jsonl" if _mixes(recipe) else None,
        probe=probes,
        ask_base=None if probes is None else probes.begin,
        progress=progress,
        start_from=recipe.start_from,
    )


def _evaluate(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from speech_llm.evaluation import evaluate_run

    return evaluate_run(recipe, run_dir, progress)


def _report(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
    from eval.report import write_report

    write_report([run_dir], run_dir / "report.html")
    return {"bytes": (run_dir / "report.html").stat().st_size}


def _splits(folder: Path) -> list[str]:
    return [split for split in SPLITS if (folder / f"{split}.jsonl").exists()]


def _rows_part(recipe: Recipe) -> dict[str, Any]:
    """How rows are streamed, without the names of files, whose contents count."""
    section = _pick(recipe.data, "rows", "step_rows")
    for item in section["rows"]:
        for key in recipe.row_paths(item):
            item[key] = "file"
    return section


def _row_files(recipe: Recipe) -> list[Path]:
    """The files of `data.rows`; a folder that is streamed counts by its files too."""
    from speech_llm.data.shards import shard_files

    files: list[Path] = []
    for source in recipe.data.rows:
        for key, path in recipe.row_paths(source.model_dump()).items():
            files += (
                shard_files(str(source.path), path)
                if key == "path"
                else [f for f in sorted(path.rglob("*")) if f.is_file()]
            )
    return files


def _pick(section: Any, *keys: str) -> dict[str, Any]:
    values = section.model_dump(mode="json")
    return {key: values[key] for key in keys} if keys else values


def _targets_part(recipe: Recipe) -> dict[str, Any]:
    """What decides the targets: not where a server is and how it is reached, so that a stopped stage can go on elsewhere."""
    part = {key: value for key, value in _pick(recipe.targets).items() if key != "prompts"}
    if part["teacher"] is not None:
        part["teacher"] = {key: part["teacher"][key] for key in ("backend", "model")}
    return part


# What of `optimizer` changes nothing of what is learned, so that a stopped training can go on with other values.
UNFELT = ("checkpoint_every", "keep", "workers", "trackers")
STAGE_NAMES = ("corpus", "describe", "targets", "mixture", "train", "eval", "report")
# Bump a stage's version with every change that makes the same recipe and input give another output.
STAGES: tuple[Stage, ...] = (
    Stage(
        "corpus",
        1,
        lambda r: {
            "seed": r.seed,
            # Where the manifests are counts too: their audio paths start there.
            "data": {**_pick(r.data), "manifests": [str(path.resolve()) for path in manifest_files(r)]},
        },
        lambda r, _: manifest_files(r),
        _corpus,
    ),
    Stage(
        "describe",
        1,
        lambda r: {
            "describe": _pick(r.describe),
            # Which clips are asked decides whose words are found out.
            "asked": None if r.targets.clips is None else [r.seed, r.targets.clips],
        },
        lambda r, run: [*_tables(run / "corpus"), *_local_models(r.describe.asr), *_describer_files(r)],
        _describe,
    ),
    Stage(
        "targets",
        2,
        lambda r: {
            "seed": r.seed,
            "llm": r.model.llm,
            "telling": _pick(r.describe, "form", "include", "order", "dropout", "wording"),
            "targets": _targets_part(r),
        },
        lambda r, run: [
            run / "describe" / "train.jsonl",
            # People's own questions and answers stand in the manifest alone.
            *([run / "corpus" / "train.jsonl"] if r.targets.strategy in OF_LABELS else []),
            r.resolve_path(r.targets.prompts),
            *_local_models(r.model.llm, r.targets.teacher.model if r.targets.teacher else None),
        ],
        _targets,
    ),
    Stage(
        "mixture",
        1,
        lambda r: {"seed": r.seed, "llm": r.model.llm, "mixture": _mixture_part(r)},
        lambda r, run: [
            run / "targets" / "examples.jsonl",
            *_mixture_files(r),
            *_local_models(r.model.llm),
        ],
        _mixture,
        when=_mixes,
    ),
    Stage(
        "train",
        2,
        lambda r: {
            "seed": r.seed,
            "model": _pick(r.model),
            "data": _pick(r.data, "max_duration_s"),
            **({"rows": _rows_part(r)} if r.data.stream else {}),
            **({} if r.cache.dtype == "float16" else {"cache": _pick(r.cache, "dtype")}),
            "describe": _pick(r.describe, "labels", "form"),
            # What is mixed in counts as an input; a run without it keeps the key that it had.
            "mixture": {},
            "loss": _pick(r.loss),
            "trainable": _pick(r.trainable),
            "style": r.style,
            # How often a checkpoint is kept changes nothing that is learned.
            "optimizer": {k: v for k, v in _pick(r.optimizer).items() if k not in UNFELT},
            "probes": {name: _pick(getattr(r.eval, f"{name}_probe")) for name in r.eval.probes},
            **({} if r.eval.probe_every is None else {"probe_every": r.eval.probe_every}),
        },
        lambda r, run: [
            run / "targets" / "examples.jsonl",
            *([run / "mixture" / "examples.jsonl"] if _mixes(r) else []),
            *_row_files(r),
            run / "describe" / "train.jsonl",
            run / "describe" / "test.jsonl",
            *_local_models(r.model.llm, r.model.encoder),
            *([] if r.start_from is None else sorted(r.start_from.glob("*.safetensors"))),
        ],
        _train,
        ("model",),
        together=True,
    ),
    Stage(
        "eval",
        3,
        lambda r: {
            "seed": r.seed,
            "llm": r.model.llm,
            "telling": _pick(r.describe, "form", "include", "order", "wording"),
            "eval": {
                k: v
                for k, v in _pick(r.eval).items()
                if k not in ("prompts", "probes") and not k.endswith("_probe")
            },
        },
        lambda r, run: [
            *_tables(run / "corpus"),
            *_tables(run / "describe"),
            *sorted((run / "model").glob("*.safetensors")),
            run / "model" / "config.json",
            run / "train" / "log.jsonl",
            r.resolve_path(r.eval.prompts),
            *_local_models(r.model.llm),
        ],
        _evaluate,
        ("results.json",),
    ),
    Stage(
        "report",
        2,
        lambda r: {"name": r.name},
        lambda r, run: [
            run / "results.json",
            *(run / stage.name / "manifest.json" for stage in STAGES[:-1] if stage.when(r)),
        ],
        _report,
        ("report.html",),
    ),
)


def _tables(folder: Path) -> list[Path]:
    return [folder / f"{split}.jsonl" for split in _splits(folder)]


def _local_models(*references: str | None) -> list[Path]:
    """Files of models that are folders of the user's own, which may change under the same name."""
    folders = [Path(reference) for reference in references if reference and Path(reference).is_dir()]
    return [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]


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
    stages = tuple(stage for stage in stages or STAGES if stage.when(recipe))
    if until not in [stage.name for stage in stages]:
        raise UserError(
            f"{recipe.path}: a run of this recipe has no stage {until}, because its {until} is empty; "
            f"it has: {', '.join(stage.name for stage in stages)}"
        )
    launch = launch or Launch()
    if not launch.main:
        launch.follow(lambda part: _do_part(part, recipe, stages))
        return
    last = [stage.name for stage in stages].index(until)
    with _locked(run_dir):
        _claim(recipe, run_dir, stages, command)
        if recipe.phases:
            _run_phases(recipe, run_dir, until, progress, say, command, stages, launch)
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


def _run_phases(
    recipe: Recipe,
    run_dir: Path,
    until: str,
    progress: bool,
    say: Say,
    command: str | None,
    stages: tuple[Stage, ...],
    launch: Launch,
) -> None:
    """`run_stages` of every phase in its own folder, then every task after every phase."""
    from speech_llm.phases import phases_table, run_phases

    def run(phase: Recipe, folder: Path, last: str) -> None:
        say(f"phase {phase.phase_name}")
        run_stages(
            phase, folder, last, progress=progress, say=say, command=command, stages=stages, launch=launch
        )
        if phase is recipe.phase_recipes[-1]:
            launch.end()

    run_phases(recipe, run_dir, until, run, progress)
    if until in ("eval", "report"):
        say(phases_table(read_json(run_dir / "results.json")["phases"]))
    if until == "report":
        _report(recipe, run_dir, progress)


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


def cache_features(recipe: Recipe, run_dir: Path, progress: bool = True, say: Say = print) -> dict[str, int]:
    """Encode every clip of a finished corpus stage into the feature cache; returns how many were new, found, rejected.

    `say` gets what the features will take on disk before the first is computed, and what they take in the end.
    """
    if recipe.trainable.encoder_lora is not None:
        raise UserError(
            f"{recipe.path}: trainable.encoder_lora trains the encoder, so its features cannot be cached; "
            "`train` computes them as it goes"
        )
    import torch

    from speech_llm.audio import AudioError, duration_s
    from speech_llm.model import build_model
    from speech_llm.precision import choose_dtype
    from speech_llm.training.loop import open_features

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = build_model(
        recipe.model, recipe.trainable, dtype=choose_dtype(recipe.optimizer.precision, device)
    )
    model.to(device)
    store = open_features(recipe, model, processor)
    tables = _tables(run_dir / "corpus")
    paths = [str((table.parent / row["audio"]).resolve()) for table in tables for _, row in read_jsonl(table)]
    lengths = []
    for path in dict.fromkeys(paths):
        with contextlib.suppress(AudioError):  # it will be rejected when it is read
            lengths.append(duration_s(path))
    bound = (
        "no bound (cache.max_gb)" if recipe.cache.max_gb is None else f"cache.max_gb {recipe.cache.max_gb:g}"
    )
    say(
        f"the features of {len(lengths):,} clips ({sum(lengths) / 60:,.1f} minutes) take about "
        f"{store.predicted_bytes(lengths) / 1e6:,.1f} MB in {store.folder}; {bound}"
    )
    counts = store.fill(paths, progress)
    say(f"all features in {store.entries.root} take {store.entries.size_bytes() / 1e6:,.1f} MB")
    return counts


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
