"""Features of the clips of coming batches, read by threads while the model computes; how long the model waited for them.

What is read does not depend on who reads it when, so the number of workers changes nothing but time.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Feed:
    """Stands before a feature store. `wait_s`: seconds that `stacked` took since it was last set to 0."""

    def __init__(self, features: Any, workers: int) -> None:
        """`workers`: threads that read ahead; 0 reads when features are asked for."""
        self.features, self.wait_s = features, 0.0
        self._pool = concurrent.futures.ThreadPoolExecutor(workers) if workers else None
        self._coming: dict[tuple[str, ...], concurrent.futures.Future[tuple[Tensor, Tensor]]] = {}

    def expect(self, batches: Sequence[Sequence[str]]) -> None:
        """Begin to read the clips of batches that will come; those announced before and not among them are let go."""
        if self._pool is None:
            return
        wanted = {tuple(clips) for clips in batches if clips}
        kept = {clips: future for clips, future in self._coming.items() if clips in wanted}
        for clips in wanted - kept.keys():
            kept[clips] = self._pool.submit(self.features.stacked, clips)
        self._coming = kept

    def stacked(self, clips: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """As `FeatureStore.stacked`."""
        started = time.perf_counter()
        coming = self._coming.pop(tuple(clips), None)
        if coming is None:
            features, counts = self.features.stacked(clips, device)
        else:
            features, counts = (part.to(device) for part in coming.result())
        self.wait_s += time.perf_counter() - started
        return features, counts

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
