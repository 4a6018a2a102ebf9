"""Warm-up of the connector: make it produce the soft words of what it hears.

In: described clips, their cached features, and soft words (`soft_words`, tuned or the plain words of the LLM). Out: a
connector whose vectors the frozen LLM can already read. The LLM is not run, so an epoch costs seconds where an epoch of
answers costs minutes. Training on answers then starts from vectors that mean something.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.data.features import FeatureStore, stack_features
from speech_llm.training.losses import alignment_loss
from speech_llm.training.schedule import learning_rate_at
from speech_llm.training.soft_words import SoftWords


def align(
    model: Any,
    soft: SoftWords,
    clips: Sequence[dict[str, Any]],
    features: FeatureStore,
    *,
    tuned: bool,
    epochs: int,
    learning_rate: float,
    batch_clips: int = 16,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Warm up the connector in place; returns the last epoch's loss and the share of attributes that it names.

    `tuned`: the soft words have been tuned, so that what stands for an unknown value and the vectors that are always
    there mean something too; plain words leave those to the training on answers.
    """
    usable = [clip for clip in clips if clip["audio"] not in features.rejects]
    if not soft.names or not usable or epochs <= 0:
        return {"epochs": 0}
    device = model.llm.get_input_embeddings().weight.device
    soft = soft.to(device).requires_grad_(False)
    places = soft.places([clip["attributes"] for clip in usable]).to(device)
    parameters = [p for p in model.connector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    total = epochs * math.ceil(len(usable) / batch_clips)
    lengths = [features.size_bytes(clip["audio"]) for clip in usable]
    loaded: dict[int, Tensor] = {}
    step, mean_loss, hits, counted = 0, 0.0, 0, 0
    model.connector.train()
    with tqdm(total=total, desc="align connector", unit="step", disable=not progress) as bar:
        for epoch in range(epochs):
            rng = random.Random(f"{seed}-align-{epoch}")
            order = sorted(range(len(usable)), key=lambda i: lengths[i] + rng.random() * 200_000)
            batches = [order[i : i + batch_clips] for i in range(0, len(order), batch_clips)]
            rng.shuffle(batches)
            losses, hits, counted = [], 0, 0
            for batch in batches:
                for i in batch:
                    if i not in loaded:
                        loaded[i] = features.load(usable[i]["audio"])
                stacked, counts = stack_features([loaded[i] for i in batch], device)
                vectors, _ = model.connector(stacked, counts)
                loss, right, asked = _loss(soft, vectors, places[batch], tuned)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, total, learning_rate, 0.05)
                optimizer.step()
                losses.append(float(loss.detach()))
                hits, counted, step = hits + right, counted + asked, step + 1
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            mean_loss = sum(losses) / len(losses)
            if log is not None:
                named = round(hits / max(1, counted), 4)
                log({"phase": "align", "epoch": epoch + 1, "loss": round(mean_loss, 4), "named": named})
    return {
        "epochs": epochs,
        "loss": round(mean_loss, 4),
        "named": round(hits / max(1, counted), 4),
        "attributes": soft.names,
    }


def _loss(soft: SoftWords, vectors: Tensor, places: Tensor, tuned: bool) -> tuple[Tensor, int, int]:
    """Mean alignment loss over attributes, how many known values are named, and out of how many."""
    common, parts = soft.parts(vectors.float())
    losses, hits, counted = [], 0, 0
    for number, (part, table) in enumerate(zip(parts, soft.values, strict=True)):
        labels = places[:, number]
        known = labels < len(table) - 1
        kept = torch.ones_like(known) if tuned else known
        if not bool(kept.any()):
            continue
        loss, named = alignment_loss(part[kept], table if tuned else table[:-1], labels[kept])
        losses.append(loss)
        hits += int((named == labels[kept])[known[kept]].sum())
        counted += int(known.sum())
    if tuned and common.shape[1]:
        losses.append((common - soft.common).pow(2).mean() / soft.spread**2)
    return torch.stack(losses).mean() if losses else vectors.sum() * 0.0, hits, counted
