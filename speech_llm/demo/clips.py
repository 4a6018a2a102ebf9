"""The sounds of the page: what was sent, checked and kept as WAV in a folder of its own for as long as the page runs.

In: the bytes of a file, or a described test clip. Out: a `Clip` with an id that nobody can guess. No path ever comes from the browser.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from describers.silence import SILENCE_DBFS, loudest_dbfs
from speech_llm.audio import MIN_DURATION_S, SAMPLE_RATE_HZ, AudioError, stream_audio
from speech_llm.demo.run_folder import clip_name
from speech_llm.errors import UserError

MAX_BYTES = 32 << 20
# So many of the sounds that were sent are kept; then the oldest goes.
KEPT = 64


class TooLong(UserError):
    """A sound that is longer than the model hears at once."""


@dataclass
class Clip:
    """One sound. `description`, `attributes`, `how`: what is told of it, None until it has been described.

    `example`: it is a test clip of the run, described there.
    """

    id: str
    name: str
    path: Path
    duration_s: float
    example: bool = False
    description: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)

    def tell(self, row: dict[str, Any]) -> None:
        """Take over what `describe` has written of it."""
        self.attributes = {name: value for name, value in row["attributes"].items() if name != "segments"}
        self.how = dict(row.get("how") or {})
        self.description = str(row["description"])

    def shown(self) -> dict[str, Any]:
        """As the page sees it."""
        return {
            "id": self.id,
            "name": self.name,
            "duration_s": round(self.duration_s, 2),
            "example": self.example,
            "description": self.description,
            "attributes": self.attributes,
            "how": self.how,
        }


class Clips:
    """All sounds by id. `folder`: where those that are sent are kept. `max_s`: the longest that the model hears."""

    def __init__(self, folder: Path, max_s: float = 30.0, kept: int = KEPT) -> None:
        self.folder, self.max_s, self.kept = folder, max_s, kept
        self._clips: dict[str, Clip] = {}
        self._lock = threading.Lock()

    def get(self, clip_id: Any) -> Clip:
        """Raises `UserError` for an id that is not known (any more)."""
        with self._lock:
            clip = self._clips.get(clip_id) if isinstance(clip_id, str) else None
        if clip is None:
            raise UserError("this sound is not kept any more; send or choose it again")
        return clip

    def examples(self) -> list[Clip]:
        with self._lock:
            return [clip for clip in self._clips.values() if clip.example]

    def add_example(self, row: dict[str, Any]) -> Clip:
        """A described test clip, as `describe` writes it."""
        duration_s = float(row["attributes"].get("duration") or 0.0)
        clip = Clip(secrets.token_urlsafe(12), str(row["id"]), Path(row["audio"]), duration_s, example=True)
        clip.tell(row)
        clip.name = clip_name(clip.attributes) or clip.name
        with self._lock:
            self._clips[clip.id] = clip
        return clip

    def add(self, data: bytes, name: str) -> Clip:
        """Check and keep a sound that was sent; `name` is only shown.

        Raises `UserError`: not a sound, damaged, too short, silent; `TooLong`.
        """
        clip_id = secrets.token_urlsafe(12)
        sent = self.folder / f"{clip_id}.sent"
        sent.write_bytes(data)
        try:
            samples = self._decode(sent)
        except AudioError as error:
            raise UserError(f"{name}: {error.reason}") from None
        except TooLong as error:
            raise TooLong(f"{name}: {error}") from None
        except (OSError, RuntimeError, ValueError) as error:  # decoders, on data that is not what it claims
            raise UserError(f"{name}: it cannot be decoded ({error})".replace(str(sent), name)) from None
        finally:
            sent.unlink(missing_ok=True)
        if loudest_dbfs(samples) < SILENCE_DBFS:
            raise UserError(
                f"{name}: it is silent, so there is nothing to hear; see that the microphone is on, or choose another file"
            )
        path = self.folder / f"{clip_id}.wav"
        # The samples as they are: the model then answers as it would about the file itself.
        soundfile.write(path, samples, SAMPLE_RATE_HZ, subtype="FLOAT")
        clip = Clip(clip_id, name, path, len(samples) / SAMPLE_RATE_HZ)
        with self._lock:
            self._clips[clip_id] = clip
            sent_ones = [other for other in self._clips.values() if not other.example]
            gone = sent_ones[: -self.kept]
            for other in gone:
                del self._clips[other.id]
        for other in gone:
            other.path.unlink(missing_ok=True)
        return clip

    def _decode(self, path: Path) -> np.ndarray:
        """The sound, no more of it held than may be used."""
        blocks: list[np.ndarray] = []
        count = 0
        for block in stream_audio(path):
            blocks.append(block)
            count += len(block)
            if count > self.max_s * SAMPLE_RATE_HZ:
                raise TooLong(f"it is longer than the {self.max_s:g} s that the model hears at once")
        if count < MIN_DURATION_S * SAMPLE_RATE_HZ:
            raise AudioError(
                path, f"only {count / SAMPLE_RATE_HZ:.3f} s of sound; at least {MIN_DURATION_S} s is needed"
            )
        return np.concatenate(blocks)
