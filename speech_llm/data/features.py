"""The feature cache: tapped encoder layers, computed once per clip and kept on disk.

In: paths of clips. Out: `(frames, taps, width)` tensors, trimmed to the clip's real frames.
The encoder is frozen, so its output for a clip never changes: every epoch, every prompt about the clip and every
later run with the same encoder reads the stored layers instead of running the encoder again.

Entries are keyed by the file's content, and lie in a folder keyed by encoder, layers, encoding and number format, so a changed
clip or encoder can never meet a stale entry. How they survive kills and keep to a bound, `entries` says.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speech_llm.audio import AudioError, load_audio
from speech_llm.data.entries import HEADER_BYTES, SUFFIX, Entries
from speech_llm.errors import UserError
from speech_llm.files import sha256_file, stable_hash

if TYPE_CHECKING:
    from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

# Whisper has no attention mask, so a clip's features would depend on the clips it is padded against. Only clips
# padded to the same length share a batch, and that length is the clip's own, rounded up to this quantum.
LENGTH_QUANTUM_S = 0.25
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Clips that are decoded before they are sorted into batches.
WINDOW_CLIPS = 256
BATCH_CLIPS = 8
# The usual bound, what Whisper hears: only under a lower one can a stored clip be too long.
LONGEST_S = 30.0


def feature_key(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    encoding: str,
    dtype: torch.dtype = torch.float16,
) -> str:
    """Short key of everything but the clip that the features depend on."""
    config = model.config
    shape = {
        k: v
        for k, v in config.encoder_config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    extractor = processor.feature_extractor.to_dict()
    parts = {
        "config": shape,
        "extractor": {k: v for k, v in extractor.items() if isinstance(v, (bool, int, float, str))},
        "weights": encoder_revision(model.encoder),
        "taps": list(config.taps),
        "encoding": encoding,
        "quantum_s": LENGTH_QUANTUM_S,
        "computed_in": str(next(model.encoder.parameters()).dtype),
        "dtype": str(dtype),
    }
    return stable_hash(parts)[:16]


def encoder_revision(encoder: torch.nn.Module) -> str:
    """Hex SHA-256 of an encoder's weights: two revisions of one model differ, whatever they are called."""
    digest = hashlib.sha256()
    for name, parameter in encoder.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bytes_of_frames(frames: int, taps: int, width: int, itemsize: int = 2) -> int:
    """What an entry of so many frames takes on disk."""
    return frames * taps * width * itemsize + HEADER_BYTES


class FeatureStore:
    """Encoder features of clips by path, from disk where they are there, else encoded now and kept.

    `max_gb`: the most that the features of all runs may take on disk (None: no bound); clips that find no room are encoded at
    each use. `dtype`: the number format of the entries.
    """

    def __init__(
        self,
        root: Path,
        model: SpeechLLMForConditionalGeneration,
        processor: SpeechLLMProcessor,
        encoding: str = "own_length",
        max_duration_s: float = 30.0,
        max_gb: float | None = None,
        dtype: str = "float16",
    ) -> None:
        self.model, self.processor, self.encoding = model, processor, encoding
        self.max_duration_s = max_duration_s
        self.dtype = DTYPES[dtype]
        self.entries = Entries(root, None if max_gb is None else int(max_gb * 1e9))
        self.rejects: dict[str, str] = {}
        self._entry: dict[str, Path] = {}
        self._frames: dict[str, int] = {}
        self._folder: Path | None = None
        self._tidied = False

    @property
    def folder(self) -> Path:
        """Where the features of this encoder lie."""
        if self._folder is None:
            key = feature_key(self.model, self.processor, self.encoding, self.dtype)
            self._folder = self.entries.root / key
        return self._folder

    def entry(self, path: str) -> Path:
        """Where the features of a clip are or will be."""
        if path not in self._entry:
            digest = sha256_file(path)
            self._entry[path] = self.folder / digest[:2] / f"{digest[2:34]}{SUFFIX}"
        return self._entry[path]

    def forget(self) -> None:
        """Forget which clips were asked for, so that memory does not grow with how many there are; entries stay."""
        self._entry.clear()
        self._frames.clear()

    def load(self, path: str) -> Tensor:
        """Features (frames, taps, width) of one clip; encodes it when it is not stored (yet)."""
        if path in self.rejects:
            raise UserError(f"{path}: {self.rejects[path]}")
        entry = self.entry(path)
        features = self.entries.read(entry)
        if features is not None:
            return features
        decoded = self._decode(path)
        if decoded is None:
            raise UserError(f"{path}: {self.rejects[path]}")
        features = self._encode([decoded])[0]
        self.entries.write(entry, features)
        return features

    def unusable(self, paths: Iterable[str]) -> dict[str, str]:
        """Those of the clips that cannot be encoded, and why; what is stored is not decoded again."""
        for path in dict.fromkeys(paths):
            try:
                stored = self.entries.find(self.entry(path))
            except OSError as error:
                self.rejects[path] = f"cannot be read ({error.strerror})"
                continue
            if not stored:
                self._decode(path)
            else:
                self._too_long(path)
        return {path: self.rejects[path] for path in paths if path in self.rejects}

    def frame_count(self, path: str) -> int:
        """Encoder frames of a clip."""
        if path not in self._frames:
            count = None if path in self.rejects else self.entries.length(self.entry(path))
            self._frames[path] = len(self.load(path)) if count is None else count
        return self._frames[path]

    def size_bytes(self, path: str) -> int:
        """What a clip's features take on disk."""
        return self._bytes(self.frame_count(path))

    def predicted_bytes(self, durations_s: Iterable[float]) -> int:
        """What the features of clips of these lengths will take on disk, seconds."""
        rate = self.processor.sample_rate_hz
        return sum(
            self._bytes(max(1, self.processor.frames(round(seconds * rate))))
            for seconds in durations_s
            if seconds <= self.max_duration_s
        )

    def _bytes(self, frames: int) -> int:
        config = self.model.config
        return bytes_of_frames(frames, len(config.taps), config.encoder_width, self.dtype.itemsize)

    def stacked(self, paths: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Features of clips side by side: see `stack_features`."""
        return stack_features([self.load(path) for path in paths], device)

    def fill(self, paths: Iterable[str], progress: bool = True) -> dict[str, int]:
        """Encode and keep every clip that is not stored; unreadable or over-long clips go to `rejects`.

        Returns how many were stored now, found, rejected, and without room under the bound. Which clips share a batch, and so
        the last bit of their features, depends on `paths` alone: what was stored before a kill and after it
        is the same. Processes that fill together begin at different places and leave out what another has stored.
        """
        if not self._tidied:
            self.entries.tidy()
            self._tidied = True
        usable = []
        for path in dict.fromkeys(paths):
            try:
                if not self._too_long(path):
                    usable.append(path)
            except OSError as error:  # noqa: PERF203 (one unreadable file must not end the loop)
                self.rejects[path] = f"cannot be read ({error.strerror})"
        windows = [usable[start : start + WINDOW_CLIPS] for start in range(0, len(usable), WINDOW_CLIPS)]
        rank, processes = _place()
        turn = len(windows) * rank // processes
        counts = {"stored": 0, "found": 0, "rejected": 0, "without_room": 0}
        missing = {path for path in usable if not self.entries.find(self.entry(path))}
        counts["found"] = len(usable) - len(missing)
        bar = tqdm(total=len(missing), desc="encode clips", unit="clip", disable=not progress or not missing)
        with bar, concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            for window in [*windows[turn:], *windows[:turn]]:
                lacking = {path for path in window if path in missing and not self.entry(path).exists()}
                if lacking:
                    self._fill_window(window, lacking, pool, counts)
                bar.update(sum(path in missing for path in window))
        counts["rejected"] = len(self.rejects)
        if counts["without_room"] and progress:
            assert self.entries.max_bytes is not None
            tqdm.write(
                f"the feature cache has met its bound of {self.entries.max_bytes / 1e9:g} GB (cache.max_gb): "
                f"{counts['without_room']:,} clips are encoded anew at each use"
            )
        return counts

    def _too_long(self, path: str) -> bool:
        """Whether a clip that is stored, under another bound, is longer than this one (and a reject)."""
        entry = self.entry(path)
        if self.max_duration_s >= LONGEST_S:
            return False
        frames = self.entries.length(entry)
        most = int(self.processor.frames(round(self.max_duration_s * self.processor.sample_rate_hz)))
        if frames is None or frames <= most:
            return False
        self.rejects[path] = f"clips over {self.max_duration_s:g} s are left out, never cut"
        return True

    def _fill_window(
        self,
        window: list[str],
        lacking: set[str],
        pool: concurrent.futures.ThreadPoolExecutor,
        counts: dict[str, int],
    ) -> None:
        """Encode the batches of a window that hold a clip that is lacking."""
        groups: dict[int, list[tuple[str, tuple[np.ndarray, int]]]] = {}
        for path, decoded in zip(window, pool.map(self._decode, window), strict=True):
            if decoded is not None:
                self._frames[path] = max(1, int(self.processor.frames(decoded[1])))
                groups.setdefault(self._length(decoded[0]), []).append((path, decoded))
        batches = [
            group[first : first + BATCH_CLIPS]
            for group in groups.values()
            for first in range(0, len(group), BATCH_CLIPS)
        ]
        rank, processes = _place()
        turn = len(batches) * rank // processes
        for batch in [*batches[turn:], *batches[:turn]]:
            wanted = {path for path, _ in batch if path in lacking and not self.entry(path).exists()}
            if not wanted:
                continue
            if self.entries.bound_met:
                counts["without_room"] += len(wanted)
                continue
            for (path, _), features in zip(batch, self._encode([clip for _, clip in batch]), strict=True):
                if path in wanted:
                    kept = self.entries.write(self.entry(path), features)
                    counts["stored" if kept else "without_room"] += 1

    def _length(self, samples: np.ndarray) -> int:
        """Clips of the same length share a batch; padded to the encoder's native length all are alike."""
        return 0 if self.encoding == "padded" else len(samples)

    def _decode(self, path: str) -> tuple[np.ndarray, int] | None:
        """Samples padded to the quantum, and the clip's real sample count; None (and a reject) when unreadable."""
        rate = self.processor.sample_rate_hz
        try:
            samples = load_audio(path, rate)
        except AudioError as error:
            self.rejects[path] = error.reason
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

    @torch.no_grad()
    def _encode(self, clips: Sequence[tuple[np.ndarray, int]]) -> list[Tensor]:
        """Features of decoded clips, each (frames, taps, width) without its padding."""
        features: Any = self.processor.mel_features([samples for samples, _ in clips])
        device = next(self.model.encoder.parameters()).device
        encoded, _ = self.model.encode_audio(
            features[0].to(device), features[1].to(device), padded=self.encoding == "padded"
        )
        out = []
        for row, (_, real) in zip(encoded, clips, strict=True):
            frames = min(max(1, int(self.processor.frames(real))), row.shape[0])
            kept = row[:frames].to("cpu", self.dtype).contiguous()
            if not torch.isfinite(kept).all():
                raise UserError(
                    f"the encoder's output does not fit {str(self.dtype).removeprefix('torch.')}; set cache.dtype to bfloat16 or "
                    "float32, or use another layer than those in model.taps"
                )
            out.append(kept)
        return out


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def stack_features(clips: list[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad features of several clips: (n, longest, taps, width) float32 and frame counts (n,)."""
    counts = torch.tensor([len(clip) for clip in clips])
    padded = torch.nn.utils.rnn.pad_sequence([clip.float() for clip in clips], batch_first=True)
    return padded.to(device), counts.to(device)
