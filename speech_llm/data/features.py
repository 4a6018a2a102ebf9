"""The feature cache: tapped encoder layers, computed once per clip and kept on disk.

In: paths of clips. Out: `(frames, taps, width)` float16 tensors, trimmed to the clip's real frames.
The encoder is frozen, so its output for a clip never changes: every epoch, every prompt about the clip and every
later run with the same encoder reads the stored layers instead of running the encoder again.

Entries are keyed by the file's content, and lie in a folder keyed by encoder, layers and encoding, so a changed
clip or encoder can never meet a stale entry. Each is written aside and renamed: a kill leaves none half-written.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.audio import AudioError, load_audio
from speech_llm.errors import UserError
from speech_llm.files import explain_os_error, sha256_file, stable_hash

if TYPE_CHECKING:
    from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

# Whisper has no attention mask, so a clip's features would depend on the clips it is padded against. Only clips
# padded to the same length share a batch, and that length is the clip's own, rounded up to this quantum.
LENGTH_QUANTUM_S = 0.25
CACHE_DTYPE = torch.float16


def feature_key(model: SpeechLLMForConditionalGeneration, encoding: str) -> str:
    """Short key of everything but the clip that the features depend on."""
    config = model.config
    encoder = config.encoder_config
    parts = {
        "config": {
            k: encoder.to_dict().get(k) for k in ("model_type", "d_model", "hidden_size", "encoder_layers")
        },
        "weights": _weights_fingerprint(model.encoder),
        "taps": list(config.taps),
        "encoding": encoding,
        "quantum_s": LENGTH_QUANTUM_S,
        "computed_in": str(next(model.encoder.parameters()).dtype),
        "dtype": str(CACHE_DTYPE),
    }
    return stable_hash(parts)[:16]


def _weights_fingerprint(module: torch.nn.Module) -> list[float]:
    """A cheap fingerprint of frozen weights: the mean magnitude of every parameter."""
    return [round(float(p.detach().float().abs().mean()), 7) for p in module.parameters()]


class FeatureStore:
    """Encoder features of clips by path, from disk where they are there, else encoded now and kept."""

    def __init__(
        self,
        root: Path,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        encoding: str = "own_length",
        max_duration_s: float = 30.0,
    ) -> None:
        self.model, self.processor, self.encoding = model, processor, encoding
        self.max_duration_s = max_duration_s
        self.folder = root / feature_key(model, encoding)
        self.rejects: dict[str, str] = {}
        self._entry: dict[str, Path] = {}

    def entry(self, path: str) -> Path:
        """Where the features of a clip are or will be."""
        if path not in self._entry:
            digest = sha256_file(path)
            self._entry[path] = self.folder / digest[:2] / f"{digest[2:34]}.safetensors"
        return self._entry[path]

    def load(self, path: str) -> Tensor:
        """Features (frames, taps, width) of one clip; encodes it when it is not stored yet."""
        entry = self.entry(path)
        if not entry.exists():
            self.fill([path], progress=False)
        if path in self.rejects:
            raise UserError(f"{path}: {self.rejects[path]}")
        return safetensors.torch.load_file(entry)["features"]

    def frame_count(self, path: str) -> int:
        """Encoder frames of a clip."""
        return len(self.load(path))

    def size_bytes(self, path: str) -> int:
        """What a clip's features take on disk."""
        return self.entry(path).stat().st_size

    def stacked(self, paths: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Features of clips side by side: see `stack_features`."""
        return stack_features([self.load(path) for path in paths], device)

    def fill(self, paths: Iterable[str], progress: bool = True, batch_clips: int = 8) -> dict[str, int]:
        """Encode and keep every clip that is not stored; unreadable or over-long clips go to `rejects`."""
        wanted: list[str] = []
        for path in dict.fromkeys(paths):
            try:
                if not self.entry(path).exists():
                    wanted.append(path)
            except OSError as error:  # noqa: PERF203 (one unreadable file must not end the loop)
                self.rejects[path] = f"cannot be read ({error.strerror})"
        found = len(self._entry) - len(wanted)
        bar = tqdm(total=len(wanted), desc="encode clips", unit="clip", disable=not progress or not wanted)
        with bar, concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            for start in range(0, len(wanted), 256):
                window = wanted[start : start + 256]
                groups: dict[int, list[tuple[str, tuple[np.ndarray, int]]]] = {}
                for path, samples in zip(window, pool.map(self._decode, window), strict=True):
                    if samples is None:
                        bar.update()
                        continue
                    groups.setdefault(len(samples[0]), []).append((path, samples))
                for group in groups.values():
                    for first in range(0, len(group), batch_clips):
                        batch = group[first : first + batch_clips]
                        self._encode([p for p, _ in batch], [s for _, s in batch])
                        bar.update(len(batch))
        return {"stored": len(wanted) - len(self.rejects), "found": found, "rejected": len(self.rejects)}

    def _decode(self, path: str) -> tuple[np.ndarray, int] | None:
        """Samples padded to the quantum, and the clip's real sample count; None (and a reject) when unreadable."""
        rate = self.processor.sample_rate_hz
        try:
            samples = load_audio(path, rate)
        except AudioError as error:
            self.rejects[path] = str(error)
            return None
        if len(samples) > self.max_duration_s * rate:
            self.rejects[path] = (
                f"{len(samples) / rate:.1f} s long; clips over {self.max_duration_s:g} s are left out, never cut"
            )
            return None
        if self.encoding == "padded":
            return samples, len(samples)
        quantum = int(LENGTH_QUANTUM_S * rate)
        padded = -(-len(samples) // quantum) * quantum
        return np.pad(samples, (0, padded - len(samples))), len(samples)

    @torch.inference_mode()
    def _encode(self, paths: list[str], clips: list[tuple[np.ndarray, int]]) -> None:
        features = self.processor.mel_features([samples for samples, _ in clips])
        device = next(self.model.encoder.parameters()).device
        encoded, _ = self.model.encode_audio(
            features[0].to(device), features[1].to(device), padded=self.encoding == "padded"
        )
        for path, row, (_, real) in zip(paths, encoded, clips, strict=True):
            frames = min(max(1, int(self.processor.frames(real))), row.shape[0])
            self._save(self.entry(path), row[:frames].to("cpu", CACHE_DTYPE).contiguous())

    def _save(self, entry: Path, features: Tensor) -> None:
        if not torch.isfinite(features).all():
            raise UserError(
                f"{entry}: the encoder's output does not fit float16; use another layer than those in model.taps"
            )
        aside = entry.with_name(f".{entry.name}.{os.getpid()}.part")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({"features": features}, aside)
            os.replace(aside, entry)
        except OSError as error:
            raise explain_os_error(error, entry) from error
        except safetensors.SafetensorError as error:
            raise UserError(f"{entry}: could not be written ({error}); is the disk full?") from error
        finally:
            aside.unlink(missing_ok=True)


def stack_features(clips: list[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad features of several clips: (n, longest, taps, width) float32 and frame counts (n,)."""
    counts = torch.tensor([len(clip) for clip in clips])
    padded = torch.nn.utils.rnn.pad_sequence([clip.float() for clip in clips], batch_first=True)
    return padded.to(device), counts.to(device)
