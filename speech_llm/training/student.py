"""The model being trained, as the losses use it: packs in, logits at answer positions out; and as it was before.

`Student` runs packs through encoder features, connector and LLM. `Origin` gives back the base LLM and the model as training
began, for the time of a block, without a second model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from speech_llm.data.features import FeatureStore
from speech_llm.data.packing import IGNORE, Pack, PackBatch, collate, longest_first
from speech_llm.errors import UserError
from speech_llm.files import atomic_write
from speech_llm.kv_cache import Prefix, expanded
from speech_llm.model.masks import states_at
from speech_llm.model.trainable import part_of
from speech_llm.training.answers import MOST_LOGITS, Answers, in_chunks, vocabulary_of
from speech_llm.training.compiled import CompiledLayers
from speech_llm.training.feed import Feed


@dataclass
class Student:
    """Model, processor, features of the clips, and the prefix that all packs leave out, run already.

    `feed`: reads features ahead (default: when they are used). `most_logits`: over so many, logits are made chunk by chunk.
    `every_layer`: a batch without sound runs the connector too, on a stand-in that changes nothing, and gradients go through all
    layers: for processes that each hold a part of them, and so must all run the same.
    `compiled`: runs the LLM's layers where there are gradients.
    """

    model: Any
    processor: Any
    features: FeatureStore
    prefix: Prefix
    prefix_length: int
    feed: Feed | None = None
    most_logits: int = MOST_LOGITS
    every_layer: bool = False
    compiled: CompiledLayers | None = None

    @property
    def device(self) -> torch.device:
        return self.model.llm.get_input_embeddings().weight.device

    def batch(self, packs: Sequence[Pack]) -> PackBatch:
        return collate(list(packs), self.prefix_length, self.processor.pad_token_id)

    def batches(self, packs: Sequence[Pack], batch_tokens: int) -> Iterator[PackBatch]:
        """Packs as batches for a look without gradients: those with sound, then those without, the longest first."""
        for has_sound in (True, False):
            chosen = [pack for pack in packs if bool(pack.clips) == has_sound]
            for numbers in longest_first(chosen, batch_tokens):
                yield self.batch([chosen[i] for i in numbers])

    def vectors(self, clips: Sequence[str]) -> Tensor | None:
        """The connector's vectors (total, llm_width) of clips one after the other; None without clips."""
        if not clips:
            return None
        stacked, counts = (self.feed or self.features).stacked(clips, self.device)
        return self.model.audio_vectors(stacked, counts)[0]

    def answer_logits(self, batch: PackBatch, vectors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n, vocabulary) that predict the answer tokens of a batch, and these tokens (n,).

        `vectors` stand for the batch's sounds instead of the connector's.
        """
        targets = batch.targets.to(self.device)
        wanted = targets != IGNORE
        return self._run(batch, vectors, answer_mask=wanted), targets[wanted]

    def answers(self, batch: PackBatch) -> Answers:
        """What predicts the answer tokens of a batch; where their logits would be many, they are made chunk by chunk."""
        llm = self.model.llm
        if batch.answer_tokens * vocabulary_of(llm) <= self.most_logits:
            return Answers(*self.answer_logits(batch))
        targets = batch.targets.to(self.device)
        wanted = targets != IGNORE
        with states_at(llm, wanted) as found:
            logits = self._run(batch, None)[0, 0].detach()
        chunked = in_chunks(llm, found[0], targets[wanted], logits, self.most_logits)
        return Answers(*self.answer_logits(batch)) if chunked is None else chunked

    def _run(self, batch: PackBatch, vectors: Tensor | None, **settings: Any) -> Tensor:
        ids = batch.ids.to(self.device)
        if vectors is None:
            vectors = self.vectors(batch.clips)
        cache = expanded(self.prefix, len(ids)) if self.prefix else None
        # Made before the embeddings, as vectors are: the order of layers must be the same too.
        stand_in = self._stand_in() if self.every_layer and vectors is None else None
        embeds = self.model.embed(ids, vectors)
        if stand_in is not None:
            embeds = embeds + stand_in.to(embeds.dtype)
        compiled = self.compiled if torch.is_grad_enabled() else None
        with contextlib.nullcontext() if compiled is None else compiled.on(self, embeds):
            logits: Tensor = self.model(
                inputs_embeds=embeds,
                attention_mask=batch.mask.to(self.device),
                position_ids=batch.positions.to(self.device),
                past_key_values=cache,
                use_cache=cache is not None,
                has_audio=(ids == self.model.config.audio_token_id).any(dim=1),
                **settings,
            ).logits
        return logits

    def _stand_in(self) -> Tensor:
        """Zero, by way of the connector, and with a gradient."""
        config = self.model.config
        silence = torch.zeros(1, 1, len(config.taps), config.encoder_width, device=self.device)
        vectors, _ = self.model.audio_vectors(silence, torch.ones(1, dtype=torch.long, device=self.device))
        return torch.zeros((), device=self.device, requires_grad=True) + 0.0 * vectors.sum()

    def token_log_probs(self, batch: PackBatch, temperature: float = 1.0) -> Tensor:
        """(n,) log-probability of each answer token of a batch, at a temperature."""
        answers = self.answers(batch)
        return answers.values(lambda logits, at: log_probs_of(logits, answers.targets[at], temperature))


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """(n,) log-probability of the targets (n,) under logits (n, vocabulary) at a temperature."""
    return (logits.float() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]


class Origin:
    """What the model was: the base LLM as it was loaded, and all that is trained as it was where training began."""

    def __init__(self, model: Any, keep_base: bool = True) -> None:
        """Remember the base LLM (if `keep_base`: it may take a copy); `model` must not have been trained on yet."""
        self.model = model
        # Frozen weights and switched-off adapters are the base LLM already; only what moves itself has to be kept.
        self.base_llm = {
            name: p.detach().clone()
            for name, p in model.named_parameters()
            if keep_base and p.requires_grad and part_of(name) == "llm"
        }
        self.began: dict[str, Tensor] = {}

    def remember_start(self, path: Path, resumed: bool) -> None:
        """Keep what is trained as it is now, in `path` too; a resumed run reads it from there (`UserError` if it is gone)."""
        if resumed:
            check_kept(path)
            # Copied: tensors of a file may lie at any address, and by it matrix products sum in another order.
            self.began = {n: value.clone() for n, value in safetensors.torch.load_file(path).items()}
        else:
            self.began = {
                n: p.detach().cpu().clone() for n, p in self.model.named_parameters() if p.requires_grad
            }
            with atomic_write(path, "wb") as handle:
                handle.write(safetensors.torch.save({n: p.contiguous() for n, p in self.began.items()}))
        device = next(self.model.parameters()).device
        self.began = {name: value.to(device) for name, value in self.began.items()}

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within it `model.llm` is the base LLM: adapters off, weights as loaded."""
        with self.model.adapters_off(), _exchanged(self.model, self.base_llm):
            yield

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Within it the model is what it was where training began."""
        with _exchanged(self.model, self.began):
            yield


def check_kept(path: Path) -> None:
    """Raise `UserError` when a file that a run kept for its resumption is not there."""
    if not path.exists():
        raise UserError(
            f"{path}: there is no such file, so this training cannot go on as it began; remove {path.parent} to start it over"
        )


@contextlib.contextmanager
def _exchanged(model: Any, values: dict[str, Tensor]) -> Iterator[None]:
    """Other values for some parameters for the time of a block; nothing is copied."""
    parameters = dict(model.named_parameters())
    now = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in now.items():
            parameters[name].data = value
