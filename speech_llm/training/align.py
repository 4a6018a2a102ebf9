"""Warm-up of the connector: put its vectors where the LLM keeps the words that describe the clip.

In: described clips and their cached features. Out: a connector whose first vectors the frozen LLM can already read.
The LLM itself is not run, only its embedding table is looked at, so an epoch costs seconds where an epoch of answers
costs minutes. Each attribute owns a few of the connector's vectors ("slots"); those are drawn to the embeddings of the
attribute's words. Training on answers then starts from vectors that mean something.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from describers.vocabulary import display
from speech_llm.data.features import FeatureStore, stack_features
from speech_llm.targets.verify import closed_options
from speech_llm.training.losses import alignment_loss


class Slots:
    """Which word each of the connector's vectors is drawn to, for a clip's attributes."""

    def __init__(
        self, clips: Sequence[dict[str, Any]], tokenizer: Any, vectors: int, use: Sequence[str]
    ) -> None:
        options = closed_options([clip["attributes"] for clip in clips])
        self.attributes = [name for name in use if name in options][:vectors]
        self.per_attribute = max(1, vectors // max(1, len(self.attributes)))
        ids: dict[str, dict[str, list[int]]] = {
            name: {
                value: tokenizer(f" {display(name, value)}", add_special_tokens=False)["input_ids"][
                    : self.per_attribute
                ]
                for value in options[name]
            }
            for name in self.attributes
        }
        self.words = sorted(
            {token for values in ids.values() for tokens in values.values() for token in tokens}
        )
        place = {token: i for i, token in enumerate(self.words)}
        self._targets = {
            name: {value: [place[token] for token in tokens] for value, tokens in values.items()}
            for name, values in ids.items()
        }
        self.vectors = vectors

    def targets(self, attributes: dict[str, Any]) -> list[int]:
        """For each vector an index into `words`, -100 where it has none. A short word fills all its slots."""
        out = [-100] * self.vectors
        for number, name in enumerate(self.attributes):
            places = self._targets[name].get(attributes.get(name))  # type: ignore[arg-type]
            if places:
                for slot in range(self.per_attribute):
                    out[number * self.per_attribute + slot] = places[min(slot, len(places) - 1)]
        return out


def align(
    model: Any,
    tokenizer: Any,
    clips: Sequence[dict[str, Any]],
    features: FeatureStore,
    *,
    use: Sequence[str],
    epochs: int,
    learning_rate: float,
    batch_clips: int = 16,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Warm up the connector in place; returns the last epoch's loss and the share of slots that name their word."""
    table = model.llm.get_input_embeddings().weight
    slots = Slots(clips, tokenizer, model.connector.num_vectors(1), use)
    usable = [clip for clip in clips if clip["audio"] not in features.rejects]
    if not slots.attributes or not usable or epochs <= 0:
        return {"epochs": 0}
    words = torch.tensor(slots.words, device=table.device)
    targets = torch.tensor([slots.targets(clip["attributes"]) for clip in usable])
    parameters = [p for p in model.connector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches_per_epoch = math.ceil(len(usable) / batch_clips)
    total = epochs * batches_per_epoch
    lengths = [Path(features.entry(clip["audio"])).stat().st_size for clip in usable]
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
                stacked, counts = stack_features([loaded[i] for i in batch], table.device)
                vectors, _ = model.connector(stacked, counts)
                wanted = targets[batch].to(table.device)
                loss = alignment_loss(vectors, words, wanted, table)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                warm = min(1.0, (step + 1) / max(1, total // 20))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / total))
                optimizer.step()
                losses.append(float(loss.detach()))
                with torch.no_grad():
                    near = (
                        torch.nn.functional.normalize(vectors.float(), dim=-1)
                        @ torch.nn.functional.normalize(table[words].float(), dim=-1).T
                    )
                    hit = near.argmax(-1) == wanted
                    hits += int(hit[wanted != -100].sum())
                    counted += int((wanted != -100).sum())
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
            mean_loss = sum(losses) / len(losses)
            if log is not None:
                log(
                    {
                        "phase": "align",
                        "epoch": epoch + 1,
                        "loss": round(mean_loss, 4),
                        "named": round(hits / counted, 4),
                    }
                )
    return {
        "epochs": epochs,
        "loss": round(mean_loss, 4),
        "named": round(hits / max(1, counted), 4),
        "attributes": slots.attributes,
    }
