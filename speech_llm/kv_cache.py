"""Key/value caches for batched generation: a prefix run once, and rows with room to grow.

In: key/value states that an LLM computed. Out: caches that the same LLM continues from.
The library's own cache copies everything at every token; here each row has room ahead, and a token is written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

# Keys and values (1, heads, length, width) of every layer.
Prefix = list[tuple[Tensor, Tensor]]
# Columns added at a time when a batch outgrows its room.
BLOCK = 32


def run_prefix(llm: Any, ids: list[int]) -> Prefix:
    """Keys and values of a prefix; an empty list when it is empty."""
    if not ids:
        return []
    cache = DynamicCache()
    device = llm.get_input_embeddings().weight.device
    with torch.no_grad():
        llm(
            input_ids=torch.tensor([ids], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def expanded(prefix: Prefix, rows: int) -> DynamicCache:
    """A fresh cache in which every one of `rows` rows begins with the prefix; the prefix itself is never changed."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return cache


class RoomyLayer(DynamicLayer):
    """One layer's keys and values in memory that is larger than what is filled of it, (rows, heads, room, width)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """`keys`, `values`: what is there already."""
        super().__init__()
        self.filled = keys.shape[2]
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = _roomy(keys, BLOCK), _roomy(values, BLOCK)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        end = self.filled + key_states.shape[2]
        if end > self.keys.shape[2]:
            room = end - self.filled + BLOCK
            self.keys = _roomy(self.keys[:, :, : self.filled], room)
            self.values = _roomy(self.values[:, :, : self.filled], room)
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[indices], self.values[indices]


def roomy_cache(layers: Prefix) -> Cache:
    """A cache that begins with these keys and values (rows, heads, length, width) and grows without being copied."""
    return Cache(layers=[RoomyLayer(keys, values) for keys, values in layers])


def _roomy(states: Tensor, room: int) -> Tensor:
    rows, heads, length, width = states.shape
    out = states.new_empty(rows, heads, length + room, width)
    out[:, :, :length] = states
    return out
