"""The training loop: Examples in, a trained model out.

    rows -> rendered ids -> packs (rows of one clip behind one prefix) -> batches -> loss at answer positions -> step

The constant prefix (system prompt) is run once; clips' encoder features come from the cache; only answer positions get
logits; the loss is normalised over the whole global batch. The plan of an epoch is a pure function of the seed, so a killed
run continues from its last checkpoint as if nothing had happened. What the loss of a batch is, an `Objective` says.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from speech_llm.data.features import FeatureStore
from speech_llm.data.live import LiveFeatures
from speech_llm.data.packing import TEXT_PACK_TOKENS, padding_share, plan_epoch, told_batches
from speech_llm.data.stream import open_stream
from speech_llm.errors import UserError
from speech_llm.examples import read_examples
from speech_llm.files import write_jsonl
from speech_llm.kv_cache import run_prefix
from speech_llm.model.trainable import part_of, told_parts, trained_parts
from speech_llm.training.best import Best
from speech_llm.training.checkpoint import (
    export_checkpoint,
    latest_checkpoint,
    load_weights,
    save_checkpoint,
    save_form,
)
from speech_llm.training.compiled import CompiledLayers
from speech_llm.training.feed import Feed
from speech_llm.training.log import TrainingLog, memory_mb
from speech_llm.training.objectives import Objective, PairLoss, TokenLoss
from speech_llm.training.optimizer import make_optimizer
from speech_llm.training.processes import Processes
from speech_llm.training.rollout import Judge, RolloutLoss, verify_answers
from speech_llm.training.rows import NO_CONTEXT, TrainingSet, build_training_set
from speech_llm.training.step import Step, seed_chance
from speech_llm.training.student import Origin, Student
from speech_llm.training.warm_up import fixed_vectors, warm_up
from speech_llm.training.watch import BaseDivergence

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

Probe = Callable[[Any, Any, float], dict[str, Any]]
# The probe's place between "before training" (0) and the end of the first epoch (1).
WARMED_UP = 0.5


def train(
    recipe: Recipe,
    examples: Path,
    out_dir: Path,
    model_dir: Path,
    described: Path | None = None,
    probe: Probe | None = None,
    progress: bool = True,
    start_from: Path | None = None,
    extra_examples: Path | None = None,
    ask_base: Callable[[Any, Any], None] | None = None,
) -> dict[str, Any]:
    """Train by a recipe; resumes from the newest checkpoint under `out_dir`; writes the model to `model_dir`.

    `described`: the described training clips, for the connector's warm-up. `probe(model, processor, epoch)` is called
    before the first step (epoch 0), after the warm-up (0.5), after every epoch and every `eval.probe_every` steps (a fraction of an
    epoch); its result is logged. `extra_examples`: rows
    mixed in after those of `examples`. `start_from`: a trained model whose weights this training goes on from.
    `ask_base(model, processor)` is called once, with the base LLM, before anything that was trained is loaded. Returns the counts
    of the stage.
    """
    from speech_llm.model import build_model
    from speech_llm.precision import choose_dtype

    settings = recipe.optimizer
    processes = Processes(settings.trackers, out_dir)
    main, device = processes.main, processes.device
    show = progress and main
    torch.manual_seed(recipe.seed)
    # Which format is faster is measured, so only one process says it.
    dtype = processes.gathered(choose_dtype(settings.precision, device))[0]
    model, processor = build_model(recipe.model, recipe.trainable, dtype=dtype)
    model.to(device)
    parts = trained_parts(model)
    features = open_features(recipe, model, processor)
    if show:
        tqdm.write(told_parts(parts))
        if isinstance(features, LiveFeatures):
            tqdm.write(
                "the encoder is trained, so clips are encoded anew at every step and no features are cached"
            )
    origin = Origin(model, keep_base=recipe.loss.asks_base)
    rejects: list[dict[str, Any]] = []
    files = [path for path in (examples, extra_examples) if path]
    llm_frozen = not any(p.requires_grad for p in model.llm.parameters())
    data: Any
    steps: Any
    with processes.main_first():  # which fills the cache of features that all read
        if recipe.data.stream:
            data, steps = open_stream(recipe, files, processor, features, out_dir, main)
        else:
            data = build_training_set(
                [row for path in files for row in read_examples(path, rejects)],
                processor,
                features,
                settings.max_tokens,
                # Layers whose activations are computed again cannot continue from a cache.
                llm_frozen and not settings.gradient_checkpointing,
                show,
                style=recipe.style,
                needs_context=recipe.loss.asks_base,
                text_tokens=min(TEXT_PACK_TOKENS, settings.batch_tokens),
            )
    feed = Feed(features, 0 if isinstance(features, LiveFeatures) else settings.workers)
    prefix = run_prefix(model.llm, data.prefix)
    student = Student(
        model,
        processor,
        features,
        prefix,
        len(data.prefix),
        feed,
        processes.most_logits,
        every_layer=processes.sharded,
    )
    if settings.compile:
        student.compiled = CompiledLayers(model)
    judge = verify_answers(data) if recipe.style == "rollout" else None
    if main and not recipe.data.stream:
        write_jsonl(out_dir / "rejects.jsonl", [*rejects, *data.rejects])
    if not data.packs and not recipe.data.stream:
        raise UserError(_nothing_to_train(recipe, examples, data, out_dir / "rejects.jsonl"))
    mute = [name for name, row in data.rows.items() if not row.clips and model.text_path_is_base]
    if mute and len(mute) == len(data.rows):
        raise UserError(
            f"{examples}: no row has sound, and without sound nothing takes part that trainable trains "
            f"(model.gate_adapters is {str(recipe.model.gate_adapters).lower()}); to learn plain text give trainable.lora with "
            "model.gate_adapters false"
        )
    if mute and show:
        tqdm.write(
            f"{len(mute):,} rows have no sound: the LLM answers them as the base LLM does, so they teach nothing"
        )
    processes.check(recipe)
    checkpoints = out_dir / "checkpoints"
    found = latest_checkpoint(checkpoints)
    processes.wait()  # all have looked before any writes
    # The base LLM is asked before anything that was trained is loaded.
    with processes.main_first():
        objective = make_objective(recipe, student, data, origin, judge, out_dir, show)
    if ask_base is not None and main and found is None:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            ask_base(model, processor)
    if start_from is not None:
        _load_start(model, start_from)
    # Streamed steps are rows, however many processes share them.
    step_batches = None if recipe.data.stream else settings.accumulate * processes.count
    state: dict[str, Any] = {"seconds": 0.0, "align": None, "step_batches": step_batches}
    first = 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if found is not None:
        weights, state = load_weights(found)
        model.load_trained(weights)
        # A checkpoint may also hold parts that are not trained now.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        first = state["step"]
        if state.get("step_batches", step_batches) != step_batches:
            raise UserError(
                f"{found}: a step was {state['step_batches']} batches (processes x optimizer.accumulate) and would now be {step_batches}, "
                f"so training would not go on as it began; launch as many processes as before, or remove {checkpoints} to start over"
            )
    elif main:
        save_form(checkpoints, model, processor)
    if not recipe.data.stream:
        steps = plan_steps(recipe, data, processes.count)
        batches = [batch for epoch, micro in steps for batch in micro if epoch == 0]
    if show:
        told = data.told() if recipe.data.stream else told_batches(data.packs, batches, len(data.prefix))
        tqdm.write(f"an epoch: {told}")
        if found is not None:
            tqdm.write(f"continuing from {found.name} of {len(steps)} steps")
    log = TrainingLog(out_dir / "log.jsonl" if main else None, kept=state.get("log_rows", 0))
    best = Best(settings.best, state.get("best"))

    def run_probe(epoch: float, step: int) -> None:
        if probe is not None and main:
            model.eval()
            with torch.random.fork_rng(), torch.no_grad():
                started = time.perf_counter()
                result = probe(model, processor, epoch)
            spent = round(time.perf_counter() - started, 1)
            log.write({**result, "step": step, "epoch": epoch, "seconds": spent})
            best.see(result, step)
        processes.wait()

    started = time.perf_counter()
    if found is None:
        run_probe(0, 0)
        warmed = recipe.trainable.connector and settings.align_epochs and fixed_vectors(model)
        if described is not None and warmed and start_from is None:
            heard = [] if recipe.data.stream else [pack for pack in data.packs if pack.clips]
            seed_chance(f"{recipe.seed}-align")
            state["align"] = warm_up(recipe, heard, student, described, out_dir, log.write, show)
            if state["align"]["epochs"]:
                best.state = None  # what was measured before the warm-up is in no checkpoint
                run_probe(WARMED_UP, 0)
    with processes.main_first():
        objective.begin(out_dir, resumed=found is not None)
        if recipe.loss.l2_start and not origin.began:
            origin.remember_start(out_dir / "start.safetensors", resumed=found is not None)
    processes.same_start([p for p in model.parameters() if p.requires_grad])
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    processes.shard(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, names = make_optimizer(model, settings, one_by_one=processes.sharded)
    sizes = model.count_parameters()
    processes.begin(model, optimizer, names, settings.clip, found)

    def checkpoint(step: int) -> None:
        state.update(log_rows=log.rows, best=best.state)
        weights = processes.weights(model.trained_state_dict())
        moments = processes.moments(optimizer, names)
        if main:
            save_checkpoint(checkpoints, step, weights, moments, state, settings.keep, best.step)
        processes.wait()

    if found is None:
        state["seconds"] = time.perf_counter() - started
        checkpoint(0)
    began, before = time.perf_counter(), state["seconds"]
    make_step = Step(
        recipe=recipe,
        data=data,
        student=student,
        objective=objective,
        optimizer=optimizer,
        parameters=parameters,
        processes=processes,
        origin=origin,
        divergence=BaseDivergence(student, data, origin, settings.kl_every if _base_is_kept(origin) else 0),
        checkpoints=checkpoints,
    )
    model.train()
    rows_seen = 0
    with (
        contextlib.closing(feed),
        tqdm(total=len(steps), initial=first, desc="train", unit="step", disable=not show) as bar,
    ):
        for number in range(first, len(steps)):
            epoch, micro = steps[number]
            # A streamed step is rendered when it comes, so only a planned one can be read ahead of.
            coming = () if recipe.data.stream or number + 1 == len(steps) else steps[number + 1][1]
            row = make_step(number, len(steps), micro, coming)
            rows_seen += row["rows"]
            log.write({"step": number + 1, "epoch": epoch + 1, **row})
            processes.track(row, number + 1)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            state["seconds"] = before + time.perf_counter() - began
            last_of_epoch = number + 1 == len(steps) or steps[number + 1][0] != epoch
            due = recipe.eval.probe_every is not None and (number + 1) % recipe.eval.probe_every == 0
            keep_now = last_of_epoch or (number + 1) % settings.checkpoint_every == 0
            if last_of_epoch or due:
                before_probe = best.step
                run_probe(epoch + 1 if last_of_epoch else epoch_at(steps, number), number + 1)
                model.train()
                keep_now = keep_now or processes.gathered(best.step != before_probe)[0]
            if keep_now:
                checkpoint(number + 1)
    log.close()
    counts = {
        **(
            {"rows": data.pool.total, "rows_a_step": recipe.data.step_rows}
            if recipe.data.stream
            else {
                "rows": len(data.rows),
                "packs": len(data.packs),
                "padding_share": round(padding_share(data.packs, batches), 4),
            }
        ),
        "rejected": len(rejects) + len(data.rejects),
        "teach_nothing": len(mute),
        "steps": len(steps),
        "epochs": settings.epochs,
        "parameters": sizes,
        "parts": parts,
        "dtype": str(dtype).removeprefix("torch."),
        "align": state["align"],
        **({} if student.compiled is None else {"compiled": student.compiled.told}),
        "objective": {"style": recipe.style, "loss": recipe.loss.type, **objective.told},
        "prefix_tokens": len(data.prefix),
        "rows_per_s": round(rows_seen / max(1e-9, time.perf_counter() - began), 2),
        "peak_memory_mb": memory_mb(),
        "processes": processes.count,
        "best": best.state,
        "seconds_training": round(state["seconds"], 1),
    }
    # Every run ends at a checkpoint; the model is what it holds.
    last = latest_checkpoint(checkpoints)
    assert last is not None
    if main:
        told = {"recipe": recipe.name, "cache": recipe.cache.model_dump(), **counts}
        export_checkpoint(last, model_dir, told)
    processes.wait()
    processes.close()
    return counts


def make_objective(
    recipe: Recipe,
    student: Student,
    data: TrainingSet,
    origin: Origin,
    judge: Judge | None,
    out_dir: Path,
    progress: bool,
) -> Objective:
    """What the recipe's style and loss minimise; `judge` rewards the answers of rollouts."""
    if judge is not None:
        return RolloutLoss(recipe.loss, student, data, origin, judge)
    if recipe.style == "preference":
        return PairLoss(recipe.loss, student, data, origin, out_dir, progress, recipe.data.stream)
    return TokenLoss(recipe.loss, student, data, origin, out_dir, progress)


def plan_steps(recipe: Recipe, data: TrainingSet, processes: int) -> list[tuple[int, list[list[int]]]]:
    """Every step of the run: its epoch (from 0) and its batches of pack numbers. A pure function of recipe and data."""
    settings = recipe.optimizer
    per_step = settings.accumulate * processes
    steps = []
    for epoch in range(settings.epochs):
        batches = plan_epoch(data.packs, settings.batch_tokens, recipe.seed, epoch)
        steps += [(epoch, batches[start : start + per_step]) for start in range(0, len(batches), per_step)]
    return steps if settings.max_steps is None else steps[: settings.max_steps]


def epoch_at(steps: Any, number: int) -> float:
    """How many epochs have passed after step `number` (from 0)."""
    epoch = int(steps[number][0])
    first = next((n for n in range(number, 0, -1) if steps[n - 1][0] != epoch), 0)
    last = next((n for n in range(number, len(steps) - 1) if steps[n + 1][0] != epoch), len(steps) - 1)
    return round(epoch + (number + 1 - first) / (last + 1 - first), 4)


def _base_is_kept(origin: Origin) -> bool:
    """Whether the base LLM can still be asked: it is frozen, or a copy of what moves was kept."""
    own = {n for n, p in origin.model.named_parameters() if p.requires_grad and part_of(n) == "llm"}
    return own <= origin.base_llm.keys()


def _nothing_to_train(recipe: Recipe, examples: Path, data: TrainingSet, rejects: Path) -> str:
    if any(row["reason"] == NO_CONTEXT for row in data.rejects):
        key = "loss.mask" if getattr(recipe.loss, "mask", "none") != "none" else "loss.type"
        key = "loss.reference" if hasattr(recipe.loss, "reference") else key
        value = recipe
        for name in key.split("."):
            value = getattr(value, name)
        return (
            f"{key} is {value}, for which the base LLM must read a description in place of the sound, but targets.strategy "
            f"{recipe.targets.strategy} gave no row of {examples} a 'context'; use targets that are written from a description, "
            f"or another {key}"
        )
    return f"{examples}: no row can be trained on; {rejects} says why"


def _load_start(model: Any, folder: Path) -> None:
    """Load what an earlier training left; parts that it did not train stay as they are."""
    import safetensors.torch

    parameters = dict(model.named_parameters())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    unknown = [
        name for name in state if name not in parameters or parameters[name].shape != state[name].shape
    ]
    if unknown:
        raise UserError(
            f"{folder}: its {unknown[0]} does not fit the model of this recipe, so training cannot go on from it; "
            "keep model and trainable.lora as they were there"
        )
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def open_features(recipe: Recipe, model: Any, processor: Any) -> FeatureStore:
    """The cache of encoder features; while the encoder is trained, features that are computed anew at every use."""
    settings = recipe.model.encode, recipe.data.max_duration_s
    if recipe.trainable.encoder_lora is not None:
        return LiveFeatures(model, processor, *settings)
    return FeatureStore(feature_root(), model, processor, *settings, recipe.cache.max_gb, recipe.cache.dtype)


def feature_root() -> Path:
    """Where encoder features are cached, across runs."""
    from speech_llm.assets import cache_dir

    return cache_dir() / "features"
