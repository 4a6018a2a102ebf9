"""Soft words: vectors that tell the frozen LLM what is heard, learned before any sound is.

In: Examples in packs, and the attributes of their clips. Out: a table with a few vectors for each value of each attribute
("female", "Scottish"), and a few that are always there.

What a connector must learn is two things: to hear, and to say what it hears so that the frozen LLM answers by it. The
second needs the LLM, which is what training costs, but no sound: the soft words stand where the sound's vectors will
stand and are tuned on the same answers (prompt tuning, Lester et al. 2021, 2104.08691), a few thousand numbers instead of
a network. Then the connector learns to produce the soft words of what it hears (`align`), which needs the sound but not
the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from describers.vocabulary import display
from speech_llm.data.packing import Pack, collate, plan_epoch
from speech_llm.targets.verify import closed_options
from speech_llm.training.schedule import learning_rate_at

# Vectors per attribute: most values are one or two tokens long.
SLOTS = 2
# What the vectors that are always there start as.
COMMON = " recording sound voice speaker hear person audio speech"


class SoftWords(nn.Module):
    """The table: `(values + 1, slots, llm_width)` for each attribute, the last row for "not known", and common vectors."""

    def __init__(
        self,
        clips: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        embeddings: Tensor,
        vectors: int,
        use: Sequence[str],
    ) -> None:
        """Start as the words themselves.

        `clips`: described clips. `embeddings`: the LLM's input embeddings (vocabulary, width). `vectors`: how many
        stand for a sound. `use`: the attributes that may have soft words; those that are a choice among few get them.
        """
        super().__init__()
        options = closed_options([clip["attributes"] for clip in clips])
        self.names = [name for name in use if name in options][:vectors]
        self.options = {name: options[name] for name in self.names}
        self.slots = max(1, min(SLOTS, vectors // max(1, len(self.names))))
        table = embeddings.detach().float()

        def words(text: str, count: int) -> Tensor:
            ids = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"] or [0]
            return table[[ids[min(place, len(ids) - 1)] for place in range(count)]]

        self.values = nn.ParameterList()
        for name in self.names:
            known = torch.stack([words(str(display(name, v)), self.slots) for v in self.options[name]])
            self.values.append(nn.Parameter(torch.cat([known, known.mean(0, keepdim=True)])))
        self.common = nn.Parameter(words(COMMON, vectors - self.slots * len(self.names)))
        # Typical distance between words, per dimension: what a learning rate is relative to.
        self.spread = float((table - table.mean(0)).pow(2).mean().sqrt())

    def places(self, clips: Sequence[Mapping[str, Any]]) -> Tensor:
        """(n, attributes): the row of each clip's value in each attribute's table, the last where it is not known."""
        rows = []
        for attributes in clips:
            values = [attributes.get(name) for name in self.names]
            rows.append(
                [
                    options.index(value) if value in options else len(options)
                    for value, options in zip(values, self.options.values(), strict=True)
                ]
            )
        return torch.tensor(rows, dtype=torch.long).reshape(len(clips), len(self.names))

    def forward(self, places: Tensor) -> Tensor:
        """(n, vectors, llm_width): the common vectors, then each attribute's, for `places` (n, attributes)."""
        told = [table[places[:, number]] for number, table in enumerate(self.values)]
        return torch.cat([self.common.expand(len(places), -1, -1), *told], dim=1)

    def parts(self, vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Cut (n, vectors, width) into the common vectors and each attribute's (n, slots, width)."""
        common = self.common.shape[0]
        return vectors[:, :common], list(vectors[:, common:].split(self.slots, dim=1)) if self.names else []


def learn_soft_words(
    soft: SoftWords,
    model: Any,
    packs: list[Pack],
    attributes: Mapping[str, Mapping[str, Any]],
    loss_of: Callable[[Any, Tensor], Tensor],
    *,
    prefix_length: int,
    pad_id: int,
    epochs: int,
    learning_rate: float,
    batch_tokens: int,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tune the soft words in place on the answers of `packs`; returns epochs and the last epoch's mean loss.

    `attributes`: clip path -> its attributes. `loss_of(batch, vectors)`: summed loss of a batch whose sounds are
    replaced by `vectors` (clips x vectors, width). `prefix_length`: of the constant prefix that the packs leave out. `learning_rate` is relative to the distance between words, so that
    one value fits every LLM. The model stays as it is.
    """
    device = model.llm.get_input_embeddings().weight.device
    soft.to(device)
    plan = [plan_epoch(packs, batch_tokens, seed, epoch) for epoch in range(epochs)]
    total = sum(len(batches) for batches in plan)
    parameters = list(soft.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.98))
    step, mean_loss = 0, 0.0
    model.eval()
    with tqdm(total=total, desc="soft words", unit="step", disable=not progress) as bar:
        for epoch, batches in enumerate(plan):
            losses, tokens = 0.0, 0
            for indices in batches:
                batch = collate([packs[i] for i in indices], prefix_length, pad_id)
                places = soft.places([attributes.get(clip, {}) for clip in batch.clips]).to(device)
                loss = loss_of(batch, soft(places).flatten(0, 1))
                optimizer.zero_grad(set_to_none=True)
                (loss / batch.answer_tokens).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, total, learning_rate * soft.spread, 0.05)
                optimizer.step()
                losses, tokens, step = losses + float(loss.detach()), tokens + batch.answer_tokens, step + 1
                mean = float(loss.detach()) / batch.answer_tokens
                if log is not None:
                    log({"soft_step": step, "epoch": epoch + 1, "loss": round(mean, 5)})
                bar.update()
                bar.set_postfix(loss=f"{mean:.3f}")
            mean_loss = losses / max(1, tokens)
    return {"epochs": epochs, "steps": step, "loss": round(mean_loss, 4)}
