"""Files that survive a crash: JSON lines in and out, whole files written aside and renamed, rejects kept.

In: paths. Out: dictionaries, and files that are either complete or absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from speech_llm.errors import UserError


def explain_os_error(error: OSError, path: Path) -> UserError:
    """The sentence for a failed write or read: a full disk is named as such."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: the disk is full; free some space and run the same command again (finished work is kept)"
        )
    return UserError(f"{path}: {error.strerror or error}")


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside `path` and rename it over `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as handle:
        json.dump(value, handle, ensure_ascii=False, indent=2, default=str)
        handle.write("\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON file; a missing or malformed one is a `UserError` that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON lines, whole or not at all; returns how many."""
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | Path, on_bad_line: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, row)`; blank lines are passed over.

    A line that is not a JSON object calls `on_bad_line(line_number, text, reason)` and the reading goes on;
    without that callback it is a `UserError` that names file and line.
    """
    path = Path(path)
    try:
        handle = open(path, encoding="utf-8-sig", errors="replace")  # noqa: SIM115 - closed by the with below
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise explain_os_error(error, path) from error
    with handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, found {type(row).__name__}")
            except ValueError as error:
                reason = f"line {number} is not a JSON object ({error})"
                if on_bad_line is None:
                    raise UserError(f"{path}: {reason}") from None
                on_bad_line(number, line.rstrip("\n"), reason)
                continue
            yield number, row


class JsonlAppender:
    """Appends rows to a JSON-lines file, one flushed line at a time, so that work done before a kill is kept.

    On opening, a torn last line (a kill in the middle of a write) is cut off. `rows` are those already there (empty with
    `keep` false, for files that are too long to hold), `count` how many they are.
    """

    def __init__(self, path: str | Path, keep: bool = True) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self.count = 0
        good_bytes = 0
        if self.path.exists():
            with open(self.path, "rb") as handle:
                for raw in handle:
                    try:
                        row = json.loads(raw)
                    except ValueError:
                        break
                    if not raw.endswith(b"\n"):
                        break
                    if keep:
                        self.rows.append(row)
                    self.count += 1
                    good_bytes += len(raw)
            os.truncate(self.path, good_bytes)
        self._handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and flush it; a full disk is a `UserError` and leaves no torn line behind on resume."""
        try:
            self._handle.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._handle.flush()
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> JsonlAppender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def stable_hash(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
