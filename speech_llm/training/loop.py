"""The training loop: Examples in, a trained connector (and adapters) out.

    rows -> rendered ids -> packs (rows of one clip behind one prefix) -> batches -> loss at answer positions -> step

The constant prefix (system prompt) is run once; clips' encoder features come from the cache; only answer positions get
logits; the loss is normalised by the answer tokens of the whole global batch. The plan of an epoch is a pure function
of the seed, so a killed run continues from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.data.features import FeatureStore, stack_features
from speech_llm.data.packing import (
    IGNORE,
    Pack,
    PackBatch,
    Row,
    collate,
    constant_prefix,
    pack_rows,
    plan_epoch,
)
from speech_llm.errors import UserError
from speech_llm.examples import Example, read_examples
from speech_llm.files import JsonlAppender, atomic_write, read_json, write_json, write_jsonl
from speech_llm.kv_cache import Prefix, expanded, run_prefix
from speech_llm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from speech_llm.training.losses import all_finite, cross_entropy_sum
from speech_llm.training.schedule import learning_rate_at

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

Probe = Callable[[Any, Any, float], dict[str, Any]]
# The probe's place between "before training" (0) and the end of the first epoch (1).
WARMED_UP = 0.5


@dataclass
class TrainingSet:
    """Packs ready to be batched, and what was left out on the way."""

    packs: list[Pack]
    prefix: list[int]
    rejects: list[dict[str, Any]]
    rows: int


def build_training_set(
    examples: list[Example],
    processor: Any,
    features: FeatureStore,
    max_tokens: int,
    use_prefix: bool,
    progress: bool,
) -> TrainingSet:
    """Render every Example and pack the rows of each clip; rows that cannot be used are rejected with a reason."""
    paths = [part["path"] for example in examples for part in example.audio_parts()]
    features.fill(paths, progress=progress)
    rows, rejects = [], []
    frame_counts: dict[str, int] = {}
    for example in examples:
        clips = [part["path"] for part in example.audio_parts()]
        bad = next((clip for clip in clips if clip in features.rejects), None)
        if bad is not None:
            rejects.append({"id": example.id, "audio": bad, "reason": features.rejects[bad]})
            continue
        for clip in clips:
            if clip not in frame_counts:
                frame_counts[clip] = len(features.load(clip))
        rendered = processor.render(example.messages, frame_counts=[frame_counts[clip] for clip in clips])
        if not rendered.answer_spans:
            rejects.append({"id": example.id, "reason": "no assistant turn to learn"})
        elif len(rendered.input_ids) > max_tokens:
            rejects.append(
                {
                    "id": example.id,
                    "reason": f"{len(rendered.input_ids)} tokens; over {max_tokens} is left out, never cut",
                }
            )
        else:
            rows.append(Row(example.id, list(rendered.input_ids), list(rendered.answer_spans), clips))
    prefix = constant_prefix(rows, processor.audio_token_id) if use_prefix else []
    return TrainingSet(pack_rows(rows, len(prefix), max_tokens), prefix, rejects, len(rows))


def batch_loss(
    model: Any,
    batch: PackBatch,
    features: FeatureStore,
    prefix: Prefix,
    device: torch.device,
    vectors: Tensor | None = None,
) -> Tensor:
    """Summed cross-entropy of a batch's answer tokens; `vectors` stand for its sounds instead of the connector's."""
    ids = batch.ids.to(device)
    if batch.clips and vectors is None:
        stacked, counts = stack_features([features.load(clip) for clip in batch.clips], device)
        vectors, _ = model.audio_vectors(stacked, counts)
    embeds = model.embed(ids, vectors)
    targets = batch.targets.to(device)
    cache = expanded(prefix, len(ids)) if prefix else None
    answer_mask = targets != IGNORE
    logits = model(
        inputs_embeds=embeds,
        attention_mask=batch.mask.to(device),
        position_ids=batch.positions.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        answer_mask=answer_mask,
        has_audio=(ids == model.config.audio_token_id).any(dim=1),
    ).logits
    return cross_entropy_sum(logits, targets[answer_mask])


def train(
    recipe: Recipe,
    examples: Path,
    out_dir: Path,
    model_dir: Path,
    described: Path | None = None,
    probe: Probe | None = None,
    progress: bool = True,
    extra_examples: Path | None = None,
) -> dict[str, Any]:
    """Train by a recipe; resumes from the newest checkpoint under `out_dir`; writes the model to `model_dir`.

    `described`: the described training clips, for the connector's warm-up. `probe(model, processor, epoch)` is called
    before the first step (epoch 0), after the warm-up (0.5) and after every epoch; its result is logged. `extra_examples`: rows
    mixed in after those of `examples`. Returns the counts of the stage.
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
    features = FeatureStore(feature_root(), model, processor, recipe.model.encode, recipe.data.max_duration_s)
    rejects: list[dict[str, Any]] = []
    rows = [row for path in (examples, extra_examples) if path for row in read_examples(path, rejects)]
    llm_frozen = not any(p.requires_grad for p in model.llm.parameters())
    data = build_training_set(rows, processor, features, settings.max_tokens, llm_frozen, show)
    if main:
        write_jsonl(out_dir / "rejects.jsonl", [*rejects, *data.rejects])
    if not data.packs:
        raise UserError(f"{examples}: no row can be trained on; {out_dir / 'rejects.jsonl'} says why")

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = [name for name, _ in named], [p for _, p in named]
    decay = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    names = [n for n, p in named if p.dim() > 1] + [n for n, p in named if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, 0.98),
    )
    plan = [
        plan_epoch(data.packs, settings.batch_tokens, recipe.seed, epoch) for epoch in range(settings.epochs)
    ]
    per_step = settings.accumulate * accelerator.num_processes
    steps = [
        (epoch, batches[start : start + per_step])
        for epoch, batches in enumerate(plan)
        for start in range(0, len(batches), per_step)
    ]
    if settings.max_steps is not None:
        steps = steps[: settings.max_steps]

    checkpoints = out_dir / "checkpoints"
    state: dict[str, Any] = {"seconds": 0.0, "align": None}
    log = JsonlAppender(out_dir / "log.jsonl") if main else None
    kept_rows: list[dict[str, Any]] = [] if log is None else log.rows

    found = latest_checkpoint(checkpoints)
    first = 0
    if found is not None:
        weights, state = load_checkpoint(found, optimizer, names)
        model.load_trained(weights)
        first = state["step"]
        if log is not None:
            log.close()
            write_jsonl(out_dir / "log.jsonl", kept_rows[: state["log_rows"]])
            log = JsonlAppender(out_dir / "log.jsonl")
            kept_rows = log.rows
        if show:
            tqdm.write(f"continuing from {found.name} of {len(steps)} steps")
    elif log is not None and kept_rows:
        log.close()
        write_jsonl(out_dir / "log.jsonl", [])
        log = JsonlAppender(out_dir / "log.jsonl")
        kept_rows = log.rows
    logged = len(kept_rows)

    def write_log(row: dict[str, Any]) -> None:
        nonlocal logged
        logged += 1
        if log is not None:
            log.append(row)

    def run_probe(epoch: float) -> None:
        if probe is None or not main:
            return
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            started = time.perf_counter()
            result = probe(model, processor, epoch)
        write_log({"probe": result, "epoch": epoch, "seconds": round(time.perf_counter() - started, 1)})

    def checkpoint(step: int) -> None:
        if main:
            save_checkpoint(
                checkpoints,
                step,
                model.trained_state_dict(),
                optimizer,
                names,
                {**state, "log_rows": logged},
                settings.keep,
            )

    started = time.perf_counter()
    prefix = run_prefix(model.llm, data.prefix)
    if first == 0 and found is None:
        run_probe(0)
        if described is not None and settings.align_epochs and fixed_vectors(model):
            state["align"] = warm_up(
                recipe, model, processor, features, data, prefix, described, out_dir, write_log, show
            )
            if state["align"]["epochs"]:
                run_probe(WARMED_UP)
        state["seconds"] = time.perf_counter() - started
        checkpoint(0)
    prefix_length = len(data.prefix)
    began, before = time.perf_counter(), state["seconds"]
    model.train()
    tokens_seen = rows_seen = 0
    with tqdm(total=len(steps), initial=first, desc="train", unit="step", disable=not show) as bar:
        for number in range(first, len(steps)):
            epoch, micro = steps[number]
            tick = time.perf_counter()
            answer_tokens = sum(data.packs[i].answer_tokens for batch in micro for i in batch)
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=device)
            padding, mine = 0.0, micro[accelerator.process_index :: accelerator.num_processes]
            for batch_indices in mine:
                batch = collate([data.packs[i] for i in batch_indices], prefix_length, processor.pad_token_id)
                loss = batch_loss(model, batch, features, prefix, device)
                if not all_finite(loss):
                    last = latest_checkpoint(checkpoints)
                    raise UserError(
                        f"step {number + 1}: the loss is not finite on the rows {', '.join(batch.rows)}; "
                        f"the last good checkpoint is {last}; try a lower optimizer.lr"
                    )
                (loss / answer_tokens).backward()
                total += loss.detach()
                padding += batch.padding_share / len(mine)
            if accelerator.num_processes > 1:
                for parameter in parameters:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = accelerator.reduce(gradient, "sum")
                total = accelerator.reduce(total, "sum")
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            rate = learning_rate_at(number, len(steps), settings.lr, settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            seconds = time.perf_counter() - tick
            tokens_seen += answer_tokens
            rows_here = sum(len(data.packs[i].rows) for batch in micro for i in batch)
            rows_seen += rows_here
            mean = float(total) / answer_tokens
            write_log(
                {
                    "step": number + 1,
                    "epoch": epoch + 1,
                    "loss": round(mean, 5),
                    "lr": rate,
                    "grad_norm": round(float(norm), 4),
                    "rows": rows_here,
                    "answer_tokens": answer_tokens,
                    "answer_tokens_per_s": round(answer_tokens / seconds, 1),
                    "padding_share": round(padding, 4),
                    "seconds": round(seconds, 3),
                }
            )
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", lr=f"{rate:.1e}")
            state["seconds"] = before + time.perf_counter() - began
            last_of_epoch = number + 1 == len(steps) or steps[number + 1][0] != epoch
            if last_of_epoch:
                run_probe(epoch + 1)
                model.train()
            if last_of_epoch or (number + 1) % settings.checkpoint_every == 0:
                checkpoint(number + 1)
    if log is not None:
        log.close()
    counts = {
        "rows": data.rows,
        "packs": len(data.packs),
        "rejected": len(rejects) + len(data.rejects),
        "steps": len(steps),
        "epochs": settings.epochs,
        "parameters": model.count_parameters(),
        "dtype": str(dtype).removeprefix("torch."),
        "align": state["align"],
        "prefix_tokens": prefix_length,
        "rows_per_s": round(rows_seen / max(1e-9, time.perf_counter() - began), 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds_training": round(state["seconds"], 1),
    }
    if main:
        save_model(model, processor, model_dir, {"recipe": recipe.name, **counts})
    accelerator.wait_for_everyone()
    return counts


def fixed_vectors(model: Any) -> bool:
    """Whether every clip becomes the same number of vectors, so that each can have a meaning of its own."""
    return model.config.connector["type"] == "qformer"


def warm_up(
    recipe: Recipe,
    model: Any,
    processor: Any,
    features: FeatureStore,
    data: TrainingSet,
    prefix: Prefix,
    described: Path,
    out_dir: Path,
    log: Callable[[dict[str, Any]], None],
    progress: bool,
) -> dict[str, Any]:
    """What comes before training on answers: tune soft words, then draw the connector to them; returns what it did.

    Tuned soft words are kept in `out_dir`, so that a run killed during the alignment need not tune them again.
    """
    from speech_llm.targets.run import read_described
    from speech_llm.training.align import align
    from speech_llm.training.soft_words import SoftWords, learn_soft_words

    settings = recipe.optimizer
    clips = read_described(described)
    features.fill([clip["audio"] for clip in clips], progress=progress)
    device = model.llm.get_input_embeddings().weight.device
    soft = SoftWords(
        clips,
        processor.tokenizer,
        model.llm.get_input_embeddings().weight,
        model.connector.num_vectors(1),
        [name for name in recipe.describe.labels.values() if name != "transcript"],
    )
    tuned: dict[str, Any] | None = None
    if settings.soft_word_epochs and soft.names:
        kept = out_dir / "soft_words.safetensors"
        if kept.exists():
            soft.load_state_dict(safetensors.torch.load_file(kept))
            tuned, told = (read_json(kept.with_suffix(".json"))[key] for key in ("counts", "log"))
            for row in told:
                log(row)
        else:
            told = []

            def keep_and_log(row: dict[str, Any]) -> None:
                told.append(row)
                log(row)

            tuned = learn_soft_words(
                soft,
                model,
                [pack for pack in data.packs if pack.clips],
                {clip["audio"]: clip["attributes"] for clip in clips},
                lambda batch, vectors: batch_loss(model, batch, features, prefix, device, vectors),
                prefix_length=len(data.prefix),
                pad_id=processor.pad_token_id,
                epochs=settings.soft_word_epochs,
                learning_rate=settings.soft_word_lr,
                batch_tokens=settings.batch_tokens,
                seed=recipe.seed,
                log=keep_and_log,
                progress=progress,
            )
            write_json(kept.with_suffix(".json"), {"counts": tuned, "log": told})
            with atomic_write(kept, "wb") as handle:
                handle.write(
                    safetensors.torch.save({k: v.detach().cpu() for k, v in soft.state_dict().items()})
                )
    aligned = align(
        model,
        soft,
        clips,
        features,
        tuned=tuned is not None,
        epochs=settings.align_epochs,
        learning_rate=settings.align_lr,
        seed=recipe.seed,
        log=log,
        progress=progress,
    )
    return {**aligned, "soft_words": tuned}


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
