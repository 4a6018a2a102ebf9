"""Connectors: encoder frames in, vectors that the LLM reads as if they were words out.

    qformer   a few learned queries per tapped layer look at all frames (DeSTA2.5-Audio, 2507.02768): a fixed number of vectors
    stack     each k frames become one vector (SLAM-LLM, 2402.08846; Ultravox): a number that grows with the clip

Both take `features: (n, frames, taps, width)` and `frame_counts: (n,)`, frames beyond a clip's count being padding that is
never looked at, and give `vectors: (n, k_max, llm_width)` and `counts: (n,)`. Vectors start out among the LLM's own
embeddings (`calibrate`): `scale` has their size, so that the layers before it work at unit variance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from speech_llm.errors import UserError
from speech_llm.model.configuration import SpeechLLMConfig, vectors_per_clip


def frame_mask(frame_counts: Tensor, frames: int) -> Tensor:
    """(n, frames) bool, True on a clip's own frames."""
    return torch.arange(frames, device=frame_counts.device)[None] < frame_counts[:, None]


class CrossAttention(nn.Module):
    r"""Attention of a few queries to many frames, without projecting the frames when that costs more.

    With head $h$: $\mathrm{softmax}(q_h W_{k,h} x^\top / \sqrt{d_h})\, x\, W_{v,h}^\top + b_v$. Multiplying $q_h W_{k,h}$ first
    ("folded") moves both projections from the frames to the queries: the same numbers for about a tenth of the work when
    there are few queries. A key bias would add the same to all scores of a query, so there is none.
    """

    def __init__(self, width: int, frame_width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_width, self.dropout = heads, width // heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(frame_width, width, bias=False)
        self.value = nn.Linear(frame_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, frames: Tensor, mask: Tensor, folded: bool | None = None) -> Tensor:
        """`hidden` (m, taps, queries, width) with m = n or 1, `frames` (n, taps, frames, frame_width), `mask` (n, frames)."""
        if folded is None:
            folded = hidden.shape[2] * self.heads < frames.shape[-1]
        query = self.query(hidden).unflatten(-1, (self.heads, self.head_width))
        attend = self._folded if folded else self._projected
        return self.out(attend(query, frames, mask).flatten(-2))

    def _folded(self, query: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        key = self.key.weight.unflatten(0, (self.heads, self.head_width))
        value = self.value.weight.unflatten(0, (self.heads, self.head_width))
        queries = query.shape[2]
        reach = torch.einsum("mtqhd,hdw->mthqw", query, key).flatten(2, 3) / math.sqrt(self.head_width)
        scores = reach @ frames.transpose(-1, -2)
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        weights = functional.dropout(scores.softmax(-1), self.dropout, self.training)
        seen = (weights @ frames).unflatten(2, (self.heads, queries))
        # Dropped weights do not sum to one, so the bias is weighed like the frames, as the projected form does.
        bias = self.value.bias.view(self.heads, self.head_width)
        if self.dropout and self.training:
            total = weights.sum(-1).unflatten(2, (self.heads, queries)).permute(0, 1, 3, 2)[..., None]
            bias = bias * total
        return torch.einsum("nthqw,hdw->ntqhd", seen, value) + bias

    def _projected(self, query: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        split = (self.heads, self.head_width)
        key = self.key(frames).unflatten(-1, split).transpose(2, 3)
        value = self.value(frames).unflatten(-1, split).transpose(2, 3)
        query = query.expand(len(frames), -1, -1, -1, -1).transpose(2, 3)
        seen = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask[:, None, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return seen.transpose(2, 3)


class QFormerBlock(nn.Module):
    """Self-attention among a layer's queries, cross-attention to its frames, feed-forward; norm after each, as in BERT."""

    def __init__(self, width: int, frame_width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.self_norm = nn.LayerNorm(width)
        self.cross = CrossAttention(width, frame_width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, frames: Tensor, mask: Tensor) -> Tensor:
        hidden = self.self_norm(hidden + self._drop(self._self_attention(hidden)))
        hidden = self.cross_norm(hidden + self._drop(self.cross(hidden, frames, mask)))
        return self.ffn_norm(hidden + self._drop(self.ffn_out(functional.gelu(self.ffn_in(hidden)))))

    def _self_attention(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(2, 3)
            for part in self.self_qkv(hidden).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )
        return self.self_out(attended.transpose(2, 3).flatten(-2))

    def _drop(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training)


class QFormerConnector(nn.Module):
    """Queries per tapped layer, blocks shared by the layers, a softmax over layers per query, LayerNorm and Linear.

    DeSTA2.5-Audio (2507.02768, section 3.1). What does not depend on the clip (the first block's self-attention and query
    projections) is computed once per batch, not once per clip.
    """

    def __init__(self, settings: dict[str, Any], taps: int, frame_width: int, llm_width: int) -> None:
        super().__init__()
        width = settings["width"] or frame_width
        if width % settings["heads"]:
            raise UserError(
                f"connector.width {width} is not a multiple of connector.heads {settings['heads']}; change one of them"
            )
        self.settings = settings
        self.queries = nn.Parameter(torch.randn(taps, settings["queries"], width))
        self.layer_weights = nn.Parameter(torch.zeros(settings["queries"], taps))
        self.blocks = nn.ModuleList(
            QFormerBlock(
                width, frame_width, settings["heads"], settings["ffn"] or 2 * width, settings["dropout"]
            )
            for _ in range(settings["layers"])
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, llm_width)
        self.scale = nn.Parameter(torch.ones(()))
        _init(self)

    def num_vectors(self, frame_count: int) -> int:
        """How many vectors a clip of so many encoder frames becomes."""
        return vectors_per_clip(self.settings, frame_count)

    def forward(self, features: Tensor, frame_counts: Tensor) -> tuple[Tensor, Tensor]:
        mask = _checked_mask(features, frame_counts)
        frames = _prepared(features, mask, self.proj.weight.dtype, self.settings["normalize"])
        hidden = self.queries[None]
        for block in self.blocks:
            hidden = block(hidden, frames, mask)
        weights = self.layer_weights.softmax(-1).T[None, :, :, None]
        vectors = self.scale * self.proj(self.norm((hidden * weights).sum(1)))
        return vectors, torch.full_like(frame_counts, self.queries.shape[1])


class StackConnector(nn.Module):
    """Stack k frames, norm, gated MLP, norm, project; several tapped layers are first mixed by a learned softmax.

    Ultravox's projector (RMSNorm, SwiGLU, RMSNorm, Linear) on the frame stacking of SLAM-LLM (2402.08846).
    """

    def __init__(self, settings: dict[str, Any], taps: int, frame_width: int, llm_width: int) -> None:
        super().__init__()
        hidden = settings["width"] or llm_width
        self.settings, self.stack = settings, settings["stack"]
        self.layer_weights = nn.Parameter(torch.zeros(taps)) if taps > 1 else None
        self.norm_in = nn.RMSNorm(frame_width * self.stack, eps=1e-6)
        self.gate_up = nn.Linear(frame_width * self.stack, 2 * hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.proj = nn.Linear(hidden, llm_width)
        self.scale = nn.Parameter(torch.ones(()))
        _init(self)

    def num_vectors(self, frame_count: int) -> int:
        """How many vectors a clip of so many encoder frames becomes."""
        return vectors_per_clip(self.settings, frame_count)

    def forward(self, features: Tensor, frame_counts: Tensor) -> tuple[Tensor, Tensor]:
        mask = _checked_mask(features, frame_counts)
        frames = _prepared(features, mask, self.proj.weight.dtype, self.settings["normalize"])
        if self.layer_weights is None:
            mixed = frames[:, 0]
        else:
            mixed = torch.einsum("ntfw,t->nfw", frames, self.layer_weights.softmax(0))
        mixed = functional.pad(mixed, (0, 0, 0, -mixed.shape[1] % self.stack))
        stacked = mixed.unflatten(1, (-1, self.stack)).flatten(2)
        gate, up = self.gate_up(self.norm_in(stacked)).chunk(2, dim=-1)
        hidden = functional.dropout(functional.silu(gate) * up, self.settings["dropout"], self.training)
        vectors = self.scale * self.proj(self.norm(hidden))
        counts = torch.div(frame_counts + self.stack - 1, self.stack, rounding_mode="floor")
        return vectors[:, : int(counts.max())], counts


def _checked_mask(features: Tensor, frame_counts: Tensor) -> Tensor:
    counts = frame_counts.tolist()
    if len(counts) != len(features) or min(counts) < 1 or max(counts) > features.shape[1]:
        raise ValueError(
            f"frame counts {counts} do not fit features of shape {tuple(features.shape)} (clips, frames, taps, width)"
        )
    return frame_mask(frame_counts, features.shape[1])


def _prepared(features: Tensor, mask: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Features as (n, taps, frames, width) in the connector's dtype, normalised per frame and layer, padding set to zero.

    The one copy that this makes lies as the attention reads it: without it, every block would make its own.
    """
    frames = features.to(dtype).transpose(1, 2).contiguous()
    if normalize:
        # Tapped layers differ in size by an order of magnitude, and a few channels dwarf the rest.
        frames = functional.layer_norm(frames, frames.shape[-1:])
    if bool(mask.all()):
        return frames
    # Also where attention masks it: 0 x NaN from padding would spread.
    return frames.masked_fill(~mask[:, None, :, None], 0.0)


def _init(connector: nn.Module) -> None:
    """Unit variance through every Linear, so that the output has the size that `scale` says."""
    for module in connector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


Connector = QFormerConnector | StackConnector
CONNECTORS: dict[str, type[QFormerConnector] | type[StackConnector]] = {
    "qformer": QFormerConnector,
    "stack": StackConnector,
}


def make_connector(config: SpeechLLMConfig) -> Connector:
    """A fresh connector for a config."""
    kind = CONNECTORS[config.connector["type"]]
    return kind(config.connector, len(config.taps or []), config.encoder_width, config.llm_width)


@torch.no_grad()
def calibrate(connector: Connector, embeddings: nn.Module, vocabulary: int) -> None:
    """Start the connector's vectors among the LLM's token embeddings: around their mean, as far from it as words are.

    In many LLMs the mean is a large part of every embedding (two thirds of its length in SmolLM2), so vectors of the right
    length in random directions would be unlike any word. A sample of the vocabulary is looked at.
    """
    device = next(embeddings.parameters()).device
    ids = torch.linspace(0, vocabulary - 1, min(vocabulary, 4096), device=device).long()
    words = embeddings(ids).float()
    mean = words.mean(0)
    spread = float((words - mean).norm(dim=-1).median()) / math.sqrt(words.shape[-1])
    connector.scale.fill_(spread)
    connector.proj.bias.copy_(mean / spread)
