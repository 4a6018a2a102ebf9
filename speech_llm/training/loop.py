"""The training loop: Examples in, a trained model out.

    rows -> rendered ids -> packs (rows of one clip behind one prefix) -> batches -> loss at answer positions -> step

The constant prefix (system prompt) is run once; clips' encoder features come from the cache; only answer positions get
logits; the loss is normalised over the whole global batch. The plan of an epoch is a pure function of the seed, so a killed
run continues from its last checkpoint as if nothing had happened. What the loss of a batch is, an `Objective` says.
"""

from __future__ import annotations

import os
import resource
import shutil
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
from speech_llm.files import write_json, write_jsonl
from speech_llm.kv_cache import run_prefix
from speech_llm.model.trainable import told_parts, trained_parts
from speech_llm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from speech_llm.training.log import TrainingLog
from speech_llm.training.losses import all_finite, l2_start
from speech_llm.training.objectives import Objective, PairLoss, TokenLoss
from speech_llm.training.optimizer import make_optimizer, set_learning_rates
from speech_llm.training.rollout import Judge, RolloutLoss, verify_answers
from speech_llm.training.rows import NO_CONTEXT, TrainingSet, build_training_set
from speech_llm.training.student import Origin, Student
from speech_llm.training.warm_up import fixed_vectors, warm_up

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
    before the first step (epoch 0), after the warm-up (0.5) and after every epoch; its result is logged. `extra_examples`: rows
    mixed in after those of `examples`. `start_from`: a trained model whose weights this training goes on from.
    `ask_base(model, processor)` is called once, with the base LLM, before anything that was trained is loaded. Returns the counts
    of the stage.
    """
    from accelerate import Accelerator

    from speech_llm.model import build_model
    from speech_llm.precision import choose_dtype

    settings = recipe.optimizer
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    main, device = accelerator.is_main_process, accelerator.device
    show = progress and main
    torch.manual_seed(recipe.seed)
    dtype = choose_dtype(settings.precision, device)
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
    if recipe.data.stream:
        data, steps = open_stream(recipe, files, processor, features, out_dir, main)
    else:
        data = build_training_set(
            [row for path in files for row in read_examples(path, rejects)],
            processor,
            features,
            settings.max_tokens,
            llm_frozen,
            show,
            style=recipe.style,
            needs_context=recipe.loss.asks_base,
            text_tokens=min(TEXT_PACK_TOKENS, settings.batch_tokens),
        )
    student = Student(model, processor, features, run_prefix(model.llm, data.prefix), len(data.prefix))
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
    # The base LLM is asked before anything that was trained is loaded.
    objective = make_objective(recipe, student, data, origin, judge, out_dir, show)
    if ask_base is not None and main and latest_checkpoint(out_dir / "checkpoints") is None:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            ask_base(model, processor)
    if start_from is not None:
        _load_start(model, start_from)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, names = make_optimizer(model, settings)
    if not recipe.data.stream:
        steps = plan_steps(recipe, data, accelerator.num_processes)
        batches = [batch for epoch, micro in steps for batch in micro if epoch == 0]
    if show:
        told = data.told() if recipe.data.stream else told_batches(data.packs, batches, len(data.prefix))
        tqdm.write(f"an epoch: {told}")
    checkpoints = out_dir / "checkpoints"
    state: dict[str, Any] = {"seconds": 0.0, "align": None}
    found = latest_checkpoint(checkpoints)
    first = 0
    if found is not None:
        weights, state = load_checkpoint(found, optimizer, names)
        model.load_trained(weights)
        # A checkpoint may also hold parts that are not trained now.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        first = state["step"]
        if show:
            tqdm.write(f"continuing from {found.name} of {len(steps)} steps")
    log = TrainingLog(out_dir / "log.jsonl" if main else None, kept=state.get("log_rows", 0))

    def run_probe(epoch: float) -> None:
        if probe is None or not main:
            return
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            started = time.perf_counter()
            result = probe(model, processor, epoch)
        log.write({**result, "epoch": epoch, "seconds": round(time.perf_counter() - started, 1)})

    def checkpoint(step: int) -> None:
        if main:
            saved = {**state, "log_rows": log.rows}
            save_checkpoint(
                checkpoints, step, model.trained_state_dict(), optimizer, names, saved, settings.keep
            )

    started = time.perf_counter()
    if found is None:
        run_probe(0)
        warmed = recipe.trainable.connector and settings.align_epochs and fixed_vectors(model)
        if described is not None and warmed and start_from is None:
            heard = [] if recipe.data.stream else [pack for pack in data.packs if pack.clips]
            state["align"] = warm_up(recipe, heard, student, described, out_dir, log.write, show)
            if state["align"]["epochs"]:
                run_probe(WARMED_UP)
    objective.begin(out_dir, resumed=found is not None)
    if recipe.loss.l2_start and not origin.began:
        origin.remember_start(out_dir / "start.safetensors", resumed=found is not None)
    if found is None:
        state["seconds"] = time.perf_counter() - started
        checkpoint(0)
    began, before = time.perf_counter(), state["seconds"]
    model.train()
    rows_seen = 0
    with tqdm(total=len(steps), initial=first, desc="train", unit="step", disable=not show) as bar:
        for number in range(first, len(steps)):
            epoch, micro = steps[number]
            tick = time.perf_counter()
            weight = max(1e-9, sum(objective.weight(batch) for batch in micro))
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            mine = list(enumerate(micro))[accelerator.process_index :: accelerator.num_processes]
            padding, answer_tokens = 0.0, 0
            figures: dict[str, list[float]] = {}
            for place, batch_indices in mine:
                done = objective.loss(batch_indices, f"{recipe.seed}-{number}-{place}")
                if not all_finite(done.loss):
                    last = latest_checkpoint(checkpoints)
                    raise UserError(
                        f"step {number + 1}: the loss is not finite on the rows {', '.join(done.rows)}; "
                        f"the last good checkpoint is {last}; try a lower optimizer.lr"
                    )
                if done.loss.requires_grad:  # rows that nothing trained takes part in teach nothing
                    (done.loss / weight).backward()
                total += done.loss.detach()
                padding += done.padding_share / len(mine)
                answer_tokens += done.answer_tokens
                for name, (value, over) in done.figures.items():
                    had = figures.setdefault(name, [0.0, 0.0])
                    had[0], had[1] = had[0] + value, had[1] + over
            if recipe.loss.l2_start and main:
                moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
                distance = l2_start(moved, origin.began)
                (recipe.loss.l2_start * distance).backward()
                figures["l2_start"] = [float(distance.detach()), 1.0]
            if accelerator.num_processes > 1:
                for parameter in parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = accelerator.reduce(gradient, "sum")
                total = accelerator.reduce(total, "sum")
                counted = torch.tensor(answer_tokens, device=device)
                answer_tokens = int(accelerator.reduce(counted, "sum"))
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            rates = set_learning_rates(optimizer, number, len(steps), settings.warmup_ratio)
            optimizer.step()
            seconds = time.perf_counter() - tick
            rows_here = sum(len(data.packs[i].rows) for batch in micro for i in batch)
            rows_seen += rows_here
            mean = float(total) / weight
            different = len(set(rates.values())) > 1
            log.write(
                {
                    "step": number + 1,
                    "epoch": epoch + 1,
                    "loss": round(mean, 5),
                    **{name: round(value / max(1e-9, over), 5) for name, (value, over) in figures.items()},
                    "lr": rates if different else next(iter(rates.values())),
                    "grad_norm": round(float(norm), 4),
                    "rows": rows_here,
                    "answer_tokens": answer_tokens,
                    "answer_tokens_per_s": round(answer_tokens / seconds, 1),
                    "padding_share": round(padding, 4),
                    "seconds": round(seconds, 3),
                }
            )
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", lr=f"{max(rates.values()):.1e}")
            state["seconds"] = before + time.perf_counter() - began
            last_of_epoch = number + 1 == len(steps) or steps[number + 1][0] != epoch
            if last_of_epoch:
                run_probe(epoch + 1)
                model.train()
            if last_of_epoch or (number + 1) % settings.checkpoint_every == 0:
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
        "parameters": model.count_parameters(),
        "parts": parts,
        "dtype": str(dtype).removeprefix("torch."),
        "align": state["align"],
        "objective": {"style": recipe.style, "loss": recipe.loss.type, **objective.told},
        "prefix_tokens": len(data.prefix),
        "rows_per_s": round(rows_seen / max(1e-9, time.perf_counter() - began), 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds_training": round(state["seconds"], 1),
    }
    if main:
        save_model(model, processor, model_dir, {"recipe": recipe.name, **counts})
    accelerator.wait_for_everyone()
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
        return PairLoss(recipe.loss, student, data, origin, out_dir, progress)
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


def save_model(model: Any, processor: Any, model_dir: Path, training: dict[str, Any]) -> None:
    """Write the model's folder aside and rename it."""
    aside = model_dir.with_name(f".{model_dir.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    write_json(aside / "training.json", training)
    shutil.rmtree(model_dir, ignore_errors=True)
    os.replace(aside, model_dir)
