"""Encoder features computed anew at every use: what stands for the cache while the encoder itself is trained.

In: paths of clips. Out: the same features as the cache's, with gradients where they are enabled; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.data.features import FeatureStore
from speech_llm.errors import UserError


class LiveFeatures(FeatureStore):
    """A feature store without a store: each call runs the encoder as it is now."""

    def __init__(
        self, model: Any, processor: Any, encoding: str = "own_length", max_duration_s: float = 30.0
    ) -> None:
        super().__init__(Path(), model, processor, encoding, max_duration_s)

    def fill(self, paths: Iterable[str], progress: bool = True) -> dict[str, int]:
        """Read every clip once: how long it is, and `rejects` for those that cannot be used."""
        new = [path for path in dict.fromkeys(paths) if path not in self._frames and path not in self.rejects]
        for path in tqdm(new, desc="read clips", unit="clip", disable=not progress or not new):
            decoded = self._decode(path)
            if decoded is not None:
                self._frames[path] = max(1, int(self.processor.frames(decoded[1])))
        return {"stored": 0, "found": 0, "rejected": len(self.rejects), "without_room": 0}

    def frame_count(self, path: str) -> int:
        if path not in self._frames:
            self.fill([path], progress=False)
        if path in self.rejects:
            raise UserError(f"{path}: {self.rejects[path]}")
        return self._frames[path]

    @torch.no_grad()
    def load(self, path: str) -> Tensor:
        """Features (frames, taps, width) of one clip, without gradients."""
        return self.stacked([path])[0][0].cpu()

    def stacked(self, paths: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        counts = torch.tensor([self.frame_count(path) for path in paths])
        decoded = [self._decode(path) for path in paths]
        features, heard = self.processor.mel_features([samples for samples, _ in filter(None, decoded)])
        encoded, _ = self.model.encode_audio(features, heard, padded=self.encoding == "padded")
        longest = int(counts.max())
        keep = torch.arange(longest)[None] < counts[:, None]
        trimmed = encoded[:, :longest] * keep.to(encoded.device)[:, :, None, None]
        return trimmed.float().to(device), counts.to(device)
