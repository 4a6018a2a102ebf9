"""How good probes are on real recordings: `python -m describers.benchmark DATA_DIR --out results.json --cache CACHE`.

In: a folder of data sets, each with a `metadata.jsonl` whose lines have `audio`, `split` (train or dev), `speaker` and label
columns. Out: a JSON file and a Markdown table. Every clip is encoded once, as it is and under three worse conditions (one
drawn at random for fitting, white noise at 5 dB, stored at 8 kHz); `--cache` keeps these features and the probes, so that
the same command goes on where it was stopped.

Probes are fitted on the train split, everything chosen on folds of it; the dev split (other speakers) is only scored.
`--fit-shipped DIR` first fits the probes that come with the package, on freely licensed data only.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from describers.features import BLOCKS, shared_features
from describers.fit import DEFAULT_ENCODER, fit_probe, fit_text, of_clips
from describers.material import NOTHING, Change, Material, joined, read_material
from describers.named import shipped
from describers.perturb import add_noise, at_random, telephone
from describers.probe import Probe, load_probe, save_probe
from describers.scoring import percent, score
from describers.vocabulary import canonical
from describers.voting import normalised
from speech_llm.errors import UserError
from speech_llm.files import read_jsonl, sha256_file, stable_hash, write_json


def _white_noise_5_db(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return add_noise(sound, 5.0, rng)


def _telephone(sound: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return telephone(sound)


# Copy numbers of the material: 0 the clip itself, 1 for fitting, 2 and 3 only scored.
CHANGES: tuple[Change, ...] = (at_random, _white_noise_5_db, _telephone)
CLEAN, FITTING, NOISE, TELEPHONE = range(4)


@dataclass(frozen=True)
class Task:
    """Fit `attribute` on the train split of some data sets, score it on the dev split of the same or others.

    `goal`: the accuracy that was set as a goal, `simple`: what statistics of MFCC and F0 reach (see the data's README).
    """

    attribute: str
    fit_on: tuple[str, ...]
    score_on: tuple[str, ...] = ()
    goal: float | None = None
    simple: float | None = None

    @property
    def name(self) -> str:
        crossed = f" -> {'+'.join(self.score_on)}" if self.score_on else ""
        return f"{self.attribute}, {'+'.join(self.fit_on)}{crossed}"


FOUR = ("librispeech_gender", "ravdess", "emodb", "alphanumeric")
TASKS = (
    Task("gender", FOUR, goal=0.98, simple=0.97),
    Task("gender", ("librispeech_gender",), simple=0.97),
    Task("emotion", ("ravdess",), goal=0.62, simple=0.42),
    Task("emotion", ("emodb",), goal=0.95, simple=0.95),
    Task("event", ("esc10",), goal=0.92, simple=0.85),
    Task("keyword", ("fsdd",), goal=0.90, simple=0.46),
    Task("keyword", ("speech_commands",)),
    Task("age_group", ("speechocean762",), goal=0.88, simple=0.81),
    Task("native_language", ("alphanumeric",), simple=0.14),
    Task("num_speakers", ("ami_speakers",), simple=0.23),
)
ACROSS = (
    Task("gender", ("librispeech_gender",), ("ravdess",)),
    Task("gender", ("librispeech_gender",), ("emodb",)),
    Task("gender", ("librispeech_gender",), ("alphanumeric",)),
    Task("gender", ("librispeech_gender",), ("speechocean762",)),
    Task("emotion", ("emodb",), ("ravdess",)),
    Task("emotion", ("ravdess",), ("emodb",)),
    Task("keyword", ("fsdd",), ("speech_commands",)),
    Task("keyword", ("speech_commands",), ("fsdd",)),
)
NO_SPEECH = ("esc10",)
WITH_CHILDREN = ("speechocean762",)


@dataclass(frozen=True)
class Shipped:
    """A probe that comes with the package: what it is fitted on, and what nothing must be told of.

    `children_of`: data sets whose children count as background, as their voices hardly tell the attribute.
    """

    attribute: str
    fit_on: tuple[str, ...]
    precision: float
    licence: str
    children_of: tuple[str, ...] = ()
    background: tuple[str, ...] = ("noise_rir",)


SHIPPED = (
    Shipped(
        "gender",
        ("librispeech_gender", "alphanumeric"),
        0.98,
        "LibriSpeech and speechocean762 (children, as background): CC BY 4.0; alphanumeric: MIT; background noises: "
        "Apache-2.0, MIT, CC0",
        children_of=("speechocean762",),
    ),
    Shipped(
        "age_group",
        ("speechocean762",),
        0.9,  # the folds show 95 % at no confidence
        "speechocean762: CC BY 4.0; background noises: Apache-2.0, MIT, CC0",
    ),
)


class Corpus:
    """Features and manifest lines of every data set in a folder; encoded when first asked for."""

    def __init__(self, folder: Path, encoder: str, cache: Path | None, progress: bool = True) -> None:
        self.folder, self.encoder, self.cache, self.progress = folder, encoder, cache, progress
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}
        self._encoded: dict[str, Material] = {}

    def material(
        self,
        datasets: Sequence[str],
        attribute: str | None,
        split: str | None,
        copies: Sequence[int],
        only: set[str] | None = None,
        child: bool | None = None,
    ) -> Material | None:
        """Clips of some data sets with labels of an attribute (None: every clip, unlabelled), None when there are none.

        `only`: the labels that count. `child`: only clips of children, or only others.
        """
        parts: list[Material] = []
        for dataset in datasets:
            wanted: dict[str, str] = {}
            for identity, row in self._lines(dataset).items():
                label = "" if attribute is None else _label(row, attribute)
                if label is None or (split is not None and row["split"] != split):
                    continue
                if child is not None and child != (_label(row, "age_group") == "child"):
                    continue
                value = "" if attribute is None else canonical(attribute, label)
                if only is None or value in only:
                    wanted[identity] = value
            if not wanted:  # and nothing to encode
                continue
            material = self._dataset(dataset)
            chosen = [index for index, identity in enumerate(material.labels) if identity in wanted]
            part = material.keep(chosen, copies)
            part.labels = [wanted[material.labels[index]] for index in chosen]
            parts.append(part)
        return joined([part for part in parts if part.labels])

    def fitted(self, task: Task, precision: float) -> Probe:
        """The probe of a task, kept beside the features."""
        train = self.material(task.fit_on, task.attribute, "train", (CLEAN, FITTING))
        assert train is not None
        encoder = shared_features(self.encoder).identity()
        key = stable_hash([task.attribute, train.fingerprint(), encoder, precision, CACHE_VERSION])[:16]
        kept = None if self.cache is None else self.cache / f"{task.attribute}-{key}.safetensors"
        if kept is not None and kept.exists():
            return load_probe(kept)
        probe = fit_probe(task.attribute, train, encoder, precision)
        if kept is not None:
            save_probe(probe, kept)
        return probe

    def _lines(self, name: str) -> dict[str, dict[str, Any]]:
        """id -> line of a data set's listing."""
        if name not in self._rows:
            listing = self.folder / name / "metadata.jsonl"
            self._rows[name] = {str(row["id"]): row for _, row in read_jsonl(listing)}
        return self._rows[name]

    def _dataset(self, name: str) -> Material:
        if name not in self._encoded:
            listing = self.folder / name / "metadata.jsonl"
            key = stable_hash([sha256_file(listing), self.encoder, CACHE_VERSION])[:16]
            kept = None if self.cache is None else self.cache / f"{name}-{key}.npz"
            if kept is not None and kept.exists():
                material = _load(kept)
            else:
                print(f"{name}: encoding {len(self._lines(name)):,} clips", file=sys.stderr)
                material = self._encode(listing)
                if kept is not None:  # as it was kept, so that a second run finds the same
                    _save(material, kept)
                    material = _load(kept)
            self._encoded[name] = material
        return self._encoded[name]

    def _encode(self, listing: Path) -> Material:
        """Clips labelled by their id: those of the train split with a copy to fit on, the others with copies to score."""
        parts = []
        for split, copies in (("train", (FITTING,)), ("dev", (NOISE, TELEPHONE))):
            try:
                part = read_material(
                    [listing],
                    "id",
                    shared_features(self.encoder),
                    where={"split": split},
                    changes=[CHANGES[copy - 1] for copy in copies],
                    progress=self.progress,
                    out=Path(f"{listing.parent.name}.jsonl"),
                )
            except UserError:  # a data set need not have both
                continue
            part.copy = np.array([CLEAN, *copies])[part.copy]
            parts.append(part)
        material = joined(parts)
        if material is None:
            raise UserError(f"{listing}: no line has 'split' train or dev and a sound")
        return material


def _label(row: dict[str, Any], attribute: str) -> Any:
    """The line's label; an age makes an age group where that is not given."""
    if attribute == "age_group" and row.get("age_group") is None and row.get("age") is not None:
        return "child" if row["age"] < 16 else "adult"
    return row.get(attribute)


# Changes whenever features or what is fitted on them would.
CACHE_VERSION = 2


def judged(probe: Probe, material: Material) -> dict[str, Any]:
    """`scoring.score` of everything guessed and of what is told, for a material of one copy a clip."""
    material.copy[:] = 0
    vectors = material.vectors(probe.about["blocks"])
    known = probe.novelty(vectors) <= float(probe.about["novelty_limit"])
    logits = probe.log_probabilities(vectors)
    count = len(probe.labels)
    guessed = normalised(of_clips(material, logits))[:, :count]
    heard = np.bincount(material.owner, known * material.seconds, len(material.labels)) > 0
    partly = normalised(of_clips(material, logits, np.where(known | ~heard[material.owner], 1.0, 0.0)))[
        :, :count
    ]
    threshold = probe.about["threshold"]
    sure = partly.max(axis=1)
    told = heard & (sure >= (2.0 if threshold is None else threshold))
    names = [probe.labels[index] for index in guessed.argmax(axis=1)]
    spoken = [
        probe.labels[index] if is_told else None
        for index, is_told in zip(partly.argmax(axis=1), told, strict=True)
    ]
    return {
        "everything": score(material.labels, names, guessed.max(axis=1).tolist()),
        "told": score(material.labels, spoken, [float(p) if t else None for p, t in zip(sure, told, strict=True)]),
        "strange": float(1 - heard.mean()),
    }  # fmt: skip


def fit_shipped(corpus: Corpus, spec: Shipped, progress: bool) -> Probe:
    """A shipped probe, of the train splits."""
    copies = (CLEAN, FITTING)
    train = corpus.material(spec.fit_on, spec.attribute, "train", copies)
    nothing = [
        corpus.material(spec.background, None, "train", copies),
        corpus.material(spec.children_of, None, "train", copies, child=True),
    ]
    background = joined([part for part in nothing if part is not None])
    if train is None or background is None:
        raise UserError(f"{spec.attribute}: {', '.join(spec.fit_on + spec.background)} are needed to fit it")
    background.labels = [NOTHING] * len(background.labels)
    material = joined([train, background])
    assert material is not None
    encoder = shared_features(corpus.encoder).identity()
    return fit_probe(spec.attribute, material, encoder, spec.precision, spec.licence, progress)


def run(corpus: Corpus, precision: float, progress: bool, out: Path | None = None) -> dict[str, Any]:
    """The shipped probes, then all tasks; data sets that are not there are left out.

    `out`: written after every task, so that a run that is stopped leaves what it found.
    """
    there = {path.parent.name for path in corpus.folder.glob("*/metadata.jsonl")}
    results: dict[str, Any] = {"tasks": [], "across": [], "shipped": []}
    for attribute, path in shipped().items():
        probe = load_probe(path)
        for dataset in sorted(there):
            if dataset in NO_SPEECH:  # every clip: no split of it has been fitted on
                results["shipped"] += _shipped_rows(corpus, probe, dataset, None, None)
                continue
            results["shipped"] += _shipped_rows(corpus, probe, dataset, attribute, None)
            if attribute != "age_group" and dataset in WITH_CHILDREN:
                for child in (False, True):
                    results["shipped"] += _shipped_rows(corpus, probe, dataset, attribute, child)
    if out is not None:
        write_json(out, results)
    probes: dict[tuple[str, tuple[str, ...]], Probe] = {}
    bar = tqdm([*TASKS, *ACROSS], unit="task", disable=not progress, dynamic_ncols=True)
    for task in bar:
        if not {*task.fit_on, *task.score_on} <= there:
            continue
        bar.set_description(task.name)
        key = (task.attribute, task.fit_on)
        if key not in probes:
            probes[key] = corpus.fitted(task, precision)
        probe = probes[key]
        row: dict[str, Any] = {"task": task.name, "goal": task.goal, "simple": task.simple}
        row |= {name: probe.about[name] for name in ("blocks", "inverse_penalty", "threshold")}
        row["folds"] = probe.about["folds"]
        row["train_clips"] = probe.about["data"]["clips"]
        only = set(probe.labels) if task.score_on else None
        # Across corpora every clip is scored; worse conditions were made of the dev splits only.
        scored: list[tuple[str, str | None, int]] = [
            ("clean", None if task.score_on else "dev", CLEAN),
            ("noise 5 dB", "dev", NOISE),
            ("8 kHz", "dev", TELEPHONE),
        ]
        if task.score_on:
            scored.append(("clean dev", "dev", CLEAN))
        for name, split, copy in scored:
            material = corpus.material(task.score_on or task.fit_on, task.attribute, split, (copy,), only)
            if material is not None:
                row[name] = judged(probe, material)
        results["across" if task.score_on else "tasks"].append(row)
        if out is not None:
            write_json(out, results)
    return results


def _shipped_rows(
    corpus: Corpus, probe: Probe, dataset: str, attribute: str | None, child: bool | None
) -> list[dict[str, Any]]:
    """How right a shipped probe is on one data set, no row where it has no such clips. `attribute`: None without speech."""
    dev = corpus.material((dataset,), attribute, None if attribute is None else "dev", (CLEAN,), child=child)
    if dev is None:
        return []
    name = dataset if child is None else f"{dataset}, {'children' if child else 'adults'}"
    return [
        {
            "attribute": probe.attribute,
            "dataset": name,
            "speech": attribute is not None,
            "clean": judged(probe, dev),
        }
    ]


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | n | chance | majority | simple | goal | accuracy (95 %) | folds | told | precision of told | ECE | 5 dB noise | 8 kHz |",
        "|---|" + "---|" * 12,
    ]
    lines += [_line(row) for row in results["tasks"]]
    lines += [
        "",
        "| fitted on -> scored on | n | chance | majority | accuracy (95 %) | told | precision of told | n dev | dev | "
        "5 dB noise | 8 kHz |",
        "|---|" + "---|" * 10,
    ]
    for row in results["across"]:
        every, told = row["clean"]["everything"], row["clean"]["told"]
        cells = [
            row["task"],
            str(every["n"]),
            _p(every["chance"]),
            _p(every["majority"]),
            f"**{_p(every['accuracy'])}** ({_interval(every['accuracy_95'])})",
            _p(told["coverage"]),
            _p(told["precision"]),
            str(row["clean dev"]["everything"]["n"]),
            *(_p(row[name]["everything"]["accuracy"]) for name in ("clean dev", "noise 5 dB", "8 kHz")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| shipped probe | data set | n | all guessed: right (95 %) | told | of those right (95 %) | too strange |",
    ]
    lines.append("|---|" + "---|" * 6)
    for row in results["shipped"]:
        every, told = row["clean"]["everything"], row["clean"]["told"]
        unlabelled = not row["speech"]
        lines.append(
            f"| {row['attribute']} | {row['dataset']} | {every['n']} | "
            f"{'no speech' if unlabelled else _with_interval(every, 'accuracy')} | {_p(told['coverage'])} | "
            f"{'' if unlabelled else _with_interval(told, 'precision')} | {_p(row['clean']['strange'])} |"
        )
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    every, told = row["clean"]["everything"], row["clean"]["told"]
    cells = [
        row["task"],
        str(every["n"]),
        _p(every["chance"]),
        _p(every["majority"]),
        _p(row["simple"]),
        _p(row["goal"]),
        f"**{_p(every['accuracy'])}** ({_interval(every['accuracy_95'])})",
        _p(row["folds"]["everything_told"]["accuracy"]),
        _p(told["coverage"]),
        f"{_p(told['precision'])} ({_interval(told['precision_95'])})" if told["told"] else "-",
        _p(every["ece"]),
        *(_p(row[name]["everything"]["accuracy"]) for name in ("noise 5 dB", "8 kHz")),
    ]
    return f"| {' | '.join(cells)} |"


def _p(share: float | None) -> str:
    return "-" if share is None else percent(share).removesuffix(" %")


def _with_interval(scores: dict[str, Any], name: str) -> str:
    share = scores[name]
    return "-" if share is None else f"{_p(share)} ({_interval(scores[f'{name}_95'])})"


def _interval(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _save(material: Material, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # float16 halves the file; the features' own noise is far larger than its rounding.
    blocks = {f"block {name}": block.astype(np.float16) for name, block in material.blocks.items()}
    about = json.dumps([material.labels, material.groups, material.hashes, material.grouped_by])
    arrays = {"owner": material.owner, "copy": material.copy, "seconds": material.seconds}
    aside = path.with_name(f".{path.stem}.part.npz")
    np.savez(aside, about=np.array(about), **arrays, **blocks)  # type: ignore[arg-type]
    aside.replace(path)


def _load(path: Path) -> Material:
    try:
        with np.load(path, allow_pickle=False) as kept:
            labels, groups, hashes, grouped_by = json.loads(str(kept["about"]))
            blocks = {name: kept[f"block {name}"].astype(np.float32) for name in BLOCKS}
            arrays = (kept["owner"], kept["copy"], kept["seconds"])
            return Material(labels, groups, hashes, grouped_by, *arrays, blocks)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a feature cache of this version ({error}); delete it") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--cache", type=Path, help="folder that keeps the features")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, metavar="REF")
    parser.add_argument("--precision", type=float, default=0.9)
    parser.add_argument(
        "--fit-shipped", type=Path, metavar="DIR", help="fit the package's probes into this folder"
    )
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    try:
        corpus = Corpus(options.data_dir, options.encoder, options.cache, not options.quiet)
        for spec in SHIPPED if options.fit_shipped is not None else ():
            probe = fit_shipped(corpus, spec, not options.quiet)
            save_probe(probe, options.fit_shipped / f"{spec.attribute}.safetensors")
            print(fit_text(probe), file=sys.stderr)
        results = run(corpus, options.precision, not options.quiet, options.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(tables(results))


if __name__ == "__main__":
    main()
