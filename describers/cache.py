"""What describers told about a sound before, kept on disk: the same sound is never asked the same thing twice.

In: the hash of a clip's samples, a describer, and what is known about the clip of the attributes that it `reads`. Out: the
attributes it told, or that it told nothing. Kept in one SQLite file (`$SPEECH_LLM_CACHE` or `~/.cache/speech-llm`,
`told.sqlite`), which a kill at any moment leaves whole; it never grows beyond a limit, and may be deleted at any time.

Cached are the describers of the package, whose version is a hash of their own code, and any other that has a `version`:
by that it promises to look at nothing but the sound and what it `reads`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from describers.records import Attribute, Clip, Describer
from speech_llm.assets import cache_dir, resolve
from speech_llm.files import stable_hash

# About two million answers.
MAX_BYTES = 1 << 30
# They read the manifest's line or need no time at all.
_NEVER = ("duration", "labels")
# Modules that decide nothing about what is heard in a sound.
_DEAF = {
    "benchmark", "cache", "compose", "fit", "inputs", "lines", "material", "measure", "named", "perturb", "run", "scoring", "wording",
}  # fmt: skip
# SQLite takes so many values in one question on every system.
_AT_ONCE = 500


class Cache:
    """Answers by key. A file that is damaged is replaced by an empty one; one that cannot be used switches the cache off.

    `path`: the file. `max_bytes`: when the file is larger, the answers that were written first are forgotten.
    `trouble`: why the cache is off, else empty.
    """

    def __init__(self, path: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.path = path or default_path()
        self.max_bytes = max_bytes
        self.trouble = ""
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except sqlite3.OperationalError as error:  # no right to write, locked, a full disk
            self._switch_off(error)
        except sqlite3.DatabaseError:  # not SQLite's, or damaged
            self.close()
            self._replace()
        except OSError as error:
            self._switch_off(error)

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Attribute]]:
        """key -> what was told, for the keys that are there."""
        found: dict[str, dict[str, Attribute]] = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            for key, text in self._run(f"SELECT key, told FROM told WHERE key IN ({marks})", part):
                found[key] = {name: Attribute(**fields) for name, fields in json.loads(text).items()}
        return found

    def put(self, told: Mapping[str, dict[str, Attribute]]) -> None:
        """Keep answers, all of them or, after a kill, none."""
        rows = [
            (key, json.dumps({name: dataclasses.asdict(item) for name, item in attributes.items()}))
            for key, attributes in told.items()
        ]
        if self._connection is None or not rows:
            return
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO told VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            self._switch_off(error)
        self._forget()

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Two runs may write at once: each waits for the other's short transactions.
        self._connection = sqlite3.connect(self.path, timeout=60)
        self._connection.execute("CREATE TABLE IF NOT EXISTS told (key TEXT PRIMARY KEY, told TEXT NOT NULL)")
        self._connection.execute("SELECT key FROM told LIMIT 1").fetchall()
        self._forget()

    def _replace(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._switch_off(error)

    def _forget(self) -> None:
        """Forget the oldest quarter when the file is too large; its pages are used again, so that it grows no further."""
        pages, free, size = (
            next(iter(self._run(f"PRAGMA {name}")), (0,))[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size > self.max_bytes and self._connection is not None:
            try:
                with self._connection:
                    self._connection.execute(
                        "DELETE FROM told WHERE rowid IN (SELECT rowid FROM told ORDER BY rowid LIMIT (SELECT count(*) FROM told) / 4)"
                    )
            except sqlite3.Error as error:
                self._switch_off(error)

    def _run(self, question: str, values: Sequence[str] = ()) -> list[tuple]:
        if self._connection is None:
            return []
        try:
            return self._connection.execute(question, values).fetchall()
        except sqlite3.Error as error:
            self._switch_off(error)
            return []

    def _switch_off(self, error: Exception) -> None:
        self.trouble = f"{self.path}: {error}"
        self.close()


def default_path() -> Path:
    """Where answers are kept unless the caller says otherwise."""
    return cache_dir() / "told.sqlite"


def keys_of(describer: Describer, clips: Sequence[Clip]) -> list[str] | None:
    """The key of each clip's answer by `describer`, from the clip's sound and what is `known` of it; None: not cached."""
    version = version_of(describer)
    if version is None or not all(clip.sound for clip in clips):
        return None
    reads = sorted(getattr(describer, "reads", ()))
    return [
        stable_hash(
            [
                clip.sound,
                describer.name,
                version,
                [clip.known[name].value if name in clip.known else None for name in reads],
            ]
        )
        for clip in clips
    ]


def version_of(describer: Describer) -> str | None:
    """Changes when a describer would tell something else about the same sound; None for one that is not cached."""
    stated = getattr(describer, "version", None)
    if not type(describer).__module__.startswith("describers."):
        return None if stated is None else str(stated)
    if describer.name in _NEVER:
        return None
    return stable_hash(
        [_code(), stated, [_files(reference) for reference in getattr(describer, "models", ())]]
    )


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the code that hears, so that nobody can forget to count a version up."""
    import speech_llm.convert_whisper
    import speech_llm.model.encoding

    files = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in _DEAF]
    files += [
        Path(str(module.__file__)) for module in (speech_llm.convert_whisper, speech_llm.model.encoding)
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _files(reference: str) -> list[object]:
    """What a model reference stands for now: a folder or a hub id may get other weights under the same name."""
    if reference.startswith("pypi:"):
        return [reference]
    stats = [(path.name, path.stat()) for path in sorted(resolve(reference).glob("*")) if path.is_file()]
    return [reference, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]
