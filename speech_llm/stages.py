"""The stages of a run: corpus -> describe -> targets (-> mixture) -> train -> eval -> report, each into its own folder.

What each does, and what of the recipe and which files it depends on; `speech_llm.pipeline` runs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speech_llm.corpus import build_corpus, manifest_files, split_tables
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl
from speech_llm.launch import launched
from speech_llm.recipe import Recipe
from speech_llm.recipe_targets import OF_LABELS


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
    for manifest in split_tables(run_dir / "corpus"):
        split, only = manifest.stem, None
        if split == "train" and recipe.targets.clips is not None:
            # Words are dear to find out, and only of use for a clip that is asked something.
            ids = [str(row["id"]) for _, row in read_jsonl(manifest)]
            only = {"transcript": set(asked_first(ids, recipe.seed)[: recipe.targets.clips])}
        report = describe_inputs(
            manifest,
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
                f"{manifest}: none of its {report.rejected} clips can be used; "
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
        lambda r, run: [*split_tables(run / "corpus"), *_local_models(r.describe.asr), *_describer_files(r)],
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
            *split_tables(run / "corpus"),
            *split_tables(run / "describe"),
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


def _local_models(*references: str | None) -> list[Path]:
    """Files of models that are folders of the user's own, which may change under the same name."""
    folders = [Path(reference) for reference in references if reference and Path(reference).is_dir()]
    return [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]
