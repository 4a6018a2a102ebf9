"""Dynamic-SUPERB's tasks (phase 1: 2309.09510, phase 2: 2411.05361), from the hub or from local folders in exactly that form.

    instance.json   name, description, metrics, path, version
    rows            audio, file, instruction, label, and on demand audio2, audio3, ..., text

A local folder holds either a table (`metadata.csv` or `metadata.jsonl`, sounds beside it under `file_name` or `file`), or parquet or
arrow files as the hub has them, or is a dataset saved by `datasets`; or it holds such folders, one a task. Sounds inside a table's
cells are written to the cache once, named by their content.

The options of an answer stand in the instruction ("The answer could be A, B, or C."); where they do not, they are the labels that
occur. A row whose label is not among its options, or that has no sound, is set aside with its reason.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.tasks import Instance, Task
from speech_llm.errors import UserError
from speech_llm.examples import Message
from speech_llm.files import atomic_write, read_jsonl

# METHODS: the dimension of each of phase 1's 55 instances, by the task's name (before the first "_").
DIMENSIONS = {
    "audio": "BirdSoundDetection ChordClassification EnvironmentalSoundClassification",
    "content": "LanguageIdentification SpeechCommandRecognition SpeechDetection SpeechTextMatching SpokenTermDetection",
    "degradation": "EnhancementDetection NoiseDetection NoiseSNRLevelPrediction ReverberationDetection",
    "paralinguistic": "AccentClassification DialogueEmotionClassification EmotionRecognition HowFarAreYou SpoofDetection StressDetection",
    "semantic": "DialogueActClassification DialogueActPairing IntentClassification SarcasmDetection",
    "speaker": "MultiSpeakerDetection SpeakerCounting SpeakerVerification",
}
_DIMENSION_OF = {task: dimension for dimension, tasks in DIMENSIONS.items() for task in tasks.split()}
# What `metrics` of instance.json name, by how we score it; anything else is a choice among options.
_METRICS = {
    "wer": "wer", "cer": "cer", "per": "per", "mse": "number", "mae": "number", "rmse": "number", "pcc": "number",
    "pearson": "number", "lcc": "number", "srcc": "number", "regression": "number", "llm_regression": "number", "f1": "f1",
}  # fmt: skip
# More labels than these are no options that an answer could be chosen from.
MOST_OPTIONS = 60
# What stands before the options of an instruction; the last of them counts.
_BEFORE_OPTIONS = re.compile(
    r"\b(?:(?:could|can|may|might|should|must|will|would) be|(?:choose|choosing|select|selecting|pick|picking) (?:one )?(?:from|between|among)|"
    r"(?:options?|choices?|labels?|classes|categories|answers?) (?:are|is|include)|(?:answer|respond|reply) (?:with|in)|"
    r"(?:following|given|possible) (?:options?|choices?|labels?|answers?|classes|categories)|one of|either)\b\s*:?\s*|:\s+",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"^(?:either|one of|the following|among|between|from|options?|only|just|simply|a single|are)\b:?\s*",
    re.IGNORECASE,
)


def dynamic_superb_tasks(reference: str) -> list[Task]:
    """The tasks of a local folder, or of a hub id. Raises `UserError` when there is none or no row can be used."""
    folder = Path(reference).expanduser()
    if not folder.exists():
        if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
            return [_from_hub(reference)]
        raise UserError(
            f"{reference}: no such folder; give a folder of Dynamic-SUPERB or a hub id such as DynamicSuperb/NAME"
        )
    places = [folder] if _is_task(folder) else sorted({p.parent for p in folder.rglob("instance.json")})
    if not places:
        raise UserError(
            f"{folder}: neither it nor a folder in it is a task of Dynamic-SUPERB: expected instance.json beside metadata.csv, "
            "metadata.jsonl, parquet or arrow files"
        )
    return [_task(place, _instance_json(place / "instance.json"), _local_rows(place)) for place in places]


def options_of(instruction: str) -> list[str]:
    """The options that an instruction names at its end, in order; empty when it names none."""
    sentences = [part for part in re.split(r"(?<=[.?!])\s+", instruction.strip()) if part.strip()]
    for sentence in reversed(sentences[-2:]):
        sentence = sentence.rstrip(" .?!")
        ends = [hit.end() for hit in _BEFORE_OPTIONS.finditer(sentence)]
        lists = [sentence[end:] for end in reversed(ends)]
        lists += [found.group(1) for found in re.finditer(r"[(\[]([^()\[\]]+)[)\]]", sentence)]
        for text in lists:
            while (shorter := _LEAD.sub("", text)) != text:
                text = shorter
            pieces = re.split(r"\s*[,;/]\s*(?:or\s+|and\s+)?|\s+or\s+|\s+and\s+", text.strip())
            options = [piece.strip(" '\"“”‘’`()[]") for piece in pieces]
            options = list(dict.fromkeys(option for option in options if option))
            if len(options) >= 2 and all(len(option.split()) <= 6 for option in options):
                return options
    return []


def _is_task(folder: Path) -> bool:
    return (folder / "instance.json").exists() or any(
        (folder / name).exists()
        for name in ("metadata.csv", "metadata.jsonl", "dataset_info.json", "state.json")
    )


def _instance_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object with name, metrics, path")
    return found


Row = tuple[
    str, dict[str, Any], Path | None
]  # where it stands, its cells, the folder that its paths start from


def _local_rows(folder: Path) -> Iterator[Row]:
    for base in (folder, folder / "test", folder / "data"):
        for name in ("metadata.csv", "metadata.jsonl"):
            path = base / name
            if not path.exists():
                continue
            if path.suffix == ".jsonl":
                broken: list[tuple[int, str]] = []
                for number, row in read_jsonl(path, lambda n, _t, why: broken.append((n, why))):  # noqa: B023
                    yield f"{path}, line {number}", row, base
                for number, why in broken:
                    yield f"{path}, line {number}", {"_broken": why}, base
                return
            with open(path, newline="", encoding="utf-8-sig", errors="replace") as handle:
                for number, row in enumerate(csv.DictReader(handle), start=2):
                    more = row.pop(None, None)  # type: ignore[call-overload]
                    broken_row = {"_broken": f"there are more cells than columns ({', '.join(more or [])})"}
                    yield f"{path}, line {number}", broken_row if more else dict(row), base
            return
    import datasets

    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(folder))
        loaded = loaded["test"] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        files = sorted(str(file) for kind in ("parquet", "arrow") for file in folder.rglob(f"*.{kind}"))
        if not files:
            raise UserError(
                f"{folder}: there is no table: metadata.csv, metadata.jsonl, parquet or arrow files"
            )
        kind = "parquet" if files[0].endswith("parquet") else "arrow"
        own = [file for file in files if file.endswith(kind)]
        tested = [file for file in own if "test" in Path(file).name]
        try:
            loaded = datasets.load_dataset(kind, data_files={"test": tested or own}, split="test")
        except Exception as error:  # the library raises many kinds
            why = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(f"{folder}: its {kind} files cannot be read ({why})") from None
    yield from _dataset_rows(loaded, str(folder), folder)


def _dataset_rows(loaded: Any, where: str, base: Path | None) -> Iterator[Row]:
    import datasets

    for name, feature in (loaded.features or {}).items():
        if isinstance(feature, datasets.Audio):
            loaded = loaded.cast_column(name, datasets.Audio(decode=False))
    for number, row in enumerate(loaded, start=1):
        yield f"{where}, row {number}", dict(row), base


def _from_hub(reference: str) -> Task:
    import datasets

    try:
        loaded = datasets.load_dataset(reference, split="test", streaming=True)
    except Exception as error:  # whatever a hub answers
        raise UserError(
            f"{reference}: not a local folder, and it could not be had from the hub ({type(error).__name__}: {error})"
        ) from error
    return _task(
        Path(reference), {"name": reference.rpartition("/")[2]}, _dataset_rows(loaded, reference, None)
    )


def _task(place: Path, about: dict[str, Any], rows: Iterator[Row]) -> Task:
    name = str(about.get("name") or place.name)
    metrics = [str(metric).casefold() for metric in about.get("metrics") or []]
    metric = next((_METRICS[m] for m in metrics if m in _METRICS), "option")
    dimension = str(
        about.get("dimension")
        or about.get("domain")
        or _DIMENSION_OF.get(re.split(r"[_-]", name)[0], "other")
    )
    rejects: list[dict[str, Any]] = []
    read: list[tuple[str, str, list[Message], str, dict[str, Any]]] = []
    ids: set[str] = set()
    for number, (where, row, base) in enumerate(rows, start=1):
        found = _read(row, base, number)
        if isinstance(found, str):
            rejects.append({"where": where, "reason": found})
            continue
        identity, messages, label = found
        identity = f"{identity}#{number}" if identity in ids else identity
        ids.add(identity)
        read.append((where, identity, messages, label, row))
    occurring = list(dict.fromkeys(label for *_, label, _ in read))
    instances = []
    for where, identity, messages, label, row in read:
        own, options = metric, None
        if metric == "option":
            options = options_of(str(row["instruction"])) or (
                occurring if 2 <= len(occurring) <= MOST_OPTIONS else []
            )
            same = next((option for option in options if option.casefold() == label.casefold()), None)
            if not options:
                own, options = "exact", None
            elif same is None:
                rejects.append(
                    {"where": where, "reason": f"the label {label!r} is not among the options {options}"}
                )
                continue
            else:
                label = same
        elif metric == "number" and _float(label) is None:
            rejects.append({"where": where, "reason": f"the label {label!r} is not a number"})
            continue
        seen = about.get("seen")
        instances.append(
            Instance(
                identity,
                messages,
                label,
                name,
                own,
                options or None,
                seen=seen if isinstance(seen, bool) else None,
            )
        )
    if not instances:
        why = f" ({rejects[0]['where']}: {rejects[0]['reason']})" if rejects else ""
        raise UserError(f"{place}: no row can be used{why}")
    shared = {tuple(sorted(instance.options or [])) for instance in instances}
    return Task(
        name,
        dimension,
        instances,
        instances[0].metric,
        instances[0].options if len(shared) == 1 else None,
        rejects,
    )


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read(row: dict[str, Any], base: Path | None, number: int) -> tuple[str, list[Message], str] | str:
    """Id, conversation and label of a row; the reason when it has none."""
    try:
        return _parts(row, base, number)
    except (ValueError, OSError) as error:
        return str(error)


def _parts(row: dict[str, Any], base: Path | None, number: int) -> tuple[str, list[Message], str]:
    if "_broken" in row:
        raise ValueError(str(row["_broken"]))
    label = row.get("label")
    if label is None or not str(label).strip():
        raise ValueError("there is no 'label'")
    instruction = str(row.get("instruction") or "").strip()
    if not instruction:
        raise ValueError("there is no 'instruction'")
    names = sorted((name for name in row if re.fullmatch(r"audio\d*", name)), key=lambda n: int(n[5:] or 1))
    cells = [row[name] for name in names if row[name] not in (None, "")]
    if not cells:  # a table whose sounds lie beside it
        keys = [
            "file_name",
            *sorted(key for key in row if re.fullmatch(r"audio\d+_file_name|file_name\d+", key)),
        ]
        cells = [row[key] for key in keys if row.get(key)] or ([row["file"]] if row.get("file") else [])
    if not cells:
        raise ValueError("there is no audio")
    parts: list[dict[str, Any]] = [{"type": "audio", "path": str(_sound(cell, base))} for cell in cells]
    text = str(row.get("text") or "").strip()
    parts.append({"type": "text", "text": f"{instruction}\n{text}" if text else instruction})
    name = row.get("id") or row.get("file") or row.get("file_name") or number
    return str(name), [{"role": "user", "content": parts}], str(label).strip()


def _sound(cell: Any, base: Path | None) -> Path:
    """A cell's sound as a file: a path, or `{"bytes", "path"}` as the hub's tables hold it."""
    if isinstance(cell, dict) and cell.get("bytes"):
        from speech_llm.assets import cache_dir

        data = bytes(cell["bytes"])
        suffix = Path(str(cell.get("path") or "sound.wav")).suffix or ".wav"
        path = cache_dir() / "task_sounds" / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        if not path.exists():
            with atomic_write(path, "wb") as handle:
                handle.write(data)
        return path
    name = cell.get("path") if isinstance(cell, dict) else cell
    if not name:
        raise ValueError("there is no audio")
    path = Path(str(name))
    path = path if path.is_absolute() or base is None else base / path
    if not path.exists():
        raise ValueError(f"{path}: no such audio file")
    return path.resolve()
