"""Files of tensors that survive kills, may be shared by processes, and together take no more than a bound.

In: a tensor and the path of its entry. Out: the entry, whole or absent. Entries are written aside and renamed, so a kill leaves none
half-written; one that is damaged by other means is thrown away when it is read.

At the bound, what no run has used for longest makes room, but nothing that was used since this process began: an epoch reads every
clip in turn, and where not all fit, dropping the least recently used would drop each one just before it is needed. So
when only this run's own entries are left, nothing more is stored.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

from speech_llm.errors import UserError
from speech_llm.files import explain_os_error

SUFFIX = ".safetensors"
# What a kill left half-written is removed once it cannot be somebody's work in progress.
ABANDONED_S = 3600
# An entry's last use is its modification time. Where there is no bound a day is exact enough, and saves a write per read.
UNBOUNDED_PRECISION_S = 86_400
# Of the file around the numbers: name, dtype, shape and place, padded to eight bytes.
HEADER_BYTES = 96
_BEGAN = time.time()


class Entries:
    """All entries under `root`, at most `max_bytes` of them (None: no bound). `bound_met`: nothing more is stored."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.bound_met = False
        self._aside = root / ".parts"

    def find(self, entry: Path) -> bool:
        """Whether there is such an entry; it counts as used now."""
        try:
            unused_s = time.time() - entry.stat().st_mtime
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain_os_error(error, entry) from error
        if self.max_bytes is not None or unused_s > UNBOUNDED_PRECISION_S:
            try:
                os.utime(entry)
            except FileNotFoundError:
                return False
            except OSError:  # a cache that may be read but not written
                pass
        return True

    def read(self, entry: Path) -> Tensor | None:
        """The tensor of an entry; None where there is none, or a damaged one (which is removed)."""
        try:
            return safetensors.torch.load_file(entry)["features"]
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, KeyError):
            entry.unlink(missing_ok=True)
            return None

    def length(self, entry: Path) -> int | None:
        """The first dimension of an entry's tensor, from its head alone; None as for `read`."""
        try:
            with open(entry, "rb") as handle:
                head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
            return int(head["features"]["shape"][0])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, MemoryError, OverflowError):
            entry.unlink(missing_ok=True)
            return None

    def write(self, entry: Path, tensor: Tensor) -> bool:
        """Keep a tensor; False where the bound leaves no room for it. Raises `UserError` when the disk is full."""
        size = tensor.numel() * tensor.element_size() + HEADER_BYTES
        aside = self._aside / f"{entry.name}.{uuid.uuid4().hex}"
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
            entry.parent.mkdir(parents=True, exist_ok=True)
            # Held while writing, so that another process that counts sees whole files only.
            with contextlib.nullcontext() if self.max_bytes is None else self._lock():
                if self.max_bytes is not None and not self._reserve(size):
                    return False
                safetensors.torch.save_file({"features": tensor}, aside)
                os.replace(aside, entry)
        except OSError as error:
            raise explain_os_error(error, entry) from error
        except safetensors.SafetensorError as error:
            raise UserError(f"{entry}: could not be written ({error}); is the disk full?") from error
        finally:
            aside.unlink(missing_ok=True)
        return True

    def size_bytes(self) -> int:
        """What all entries take on disk."""
        return sum(size for _, size, _ in self._scan())

    def tidy(self) -> None:
        """Remove what kills left half-written, and count anew what the entries take."""
        if not self._aside.is_dir():
            return
        for part in os.scandir(self._aside):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    os.unlink(part.path)
        if self.max_bytes is not None:
            with self._lock():
                self._make_room(0)

    def _reserve(self, size: int) -> bool:
        """Count `size` more bytes, after making room for them; False where there is none.

        Counted before they are written: a kill in between makes the count too high until `tidy`, never too low.
        """
        assert self.max_bytes is not None
        if self.bound_met:
            return False
        used = self._counted()
        if used is None or used + size > self.max_bytes:
            used = self._make_room(size)
        self.bound_met = used + size > self.max_bytes
        if not self.bound_met:
            self._count(used + size)
        return not self.bound_met

    def _make_room(self, size: int) -> int:
        """Remove entries that were not used since this process began, the oldest first; returns what is left in bytes."""
        assert self.max_bytes is not None
        found = sorted(self._scan())
        used = sum(size for _, size, _ in found)
        for last_used, taken, path in found:
            if used + size <= self.max_bytes or last_used >= _BEGAN:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= taken
        self._count(used)
        return used

    def _scan(self) -> Iterator[tuple[float, int, str]]:
        """Last use, size and path of every entry, and of what is being written."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                if SUFFIX in name:
                    path = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        stat = os.stat(path)
                        yield stat.st_mtime, stat.st_size, path

    def _lock(self) -> contextlib.AbstractContextManager[object]:
        """Only one process counts at a time; the lock ends with its holder, killed or not."""
        self._aside.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self._aside / "lock")

    def _counted(self) -> int | None:
        """How many bytes all entries take, as last counted; None where that is not known."""
        try:
            return int((self._aside / "bytes").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _count(self, used: int) -> None:
        (self._aside / "bytes").write_text(f"{used}\n")
