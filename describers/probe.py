"""A probe: a small linear classifier on frozen encoder features, one file an attribute.

Clips in, one attribute out; left out when the probe is not sure enough (the threshold that gave the stated precision on
speaker-disjoint folds), when the clip is silent, and when it sounds like nothing that the probe was fitted on.

The file is safetensors: five small tensors, and under `probe` in its header one JSON object that says what they mean,
how good they were on the folds, what they were fitted on and under which licence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from describers.features import EncoderFeatures, shared_features
from describers.records import Attribute, Clip
from describers.voting import judge
from speech_llm.errors import UserError
from speech_llm.files import atomic_write, sha256_file

FORMAT = "speech-llm probe 1"
# Attributes of a speaker: not told of a sound in which nobody speaks, however much it is like some voice.
OF_A_VOICE = ("gender", "age_group")
TENSORS = ("mean", "scale", "weight", "bias", "basis")


@dataclass
class Probe:
    """What a probe file holds.

    `about`: the header's JSON (`attribute`, `labels`, `encoder`, `blocks`, `temperature`, `threshold` or None for "never
    sure", `novelty_limit`, `folds`, `data`, `licence`, ...). `mean`, `scale`: (features,) of the training clips. `weight`:
    (labels, features), `bias`: (labels,). `basis`: (directions, features), the whitened principal directions of the
    training clips, for `novelty`. All float32. A probe fitted with background has one more row of weight and bias than
    labels: how much a clip is like something that has no such attribute.
    """

    about: dict[str, Any]
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    basis: np.ndarray

    @property
    def attribute(self) -> str:
        return str(self.about["attribute"])

    @property
    def labels(self) -> list[str]:
        return list(self.about["labels"])

    def log_probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """(n, labels, then background if it knows any) calibrated log-probabilities of feature vectors (n, features)."""
        logits = ((vectors - self.mean) / self.scale) @ self.weight.T + self.bias
        return log_softmax(logits / float(self.about["temperature"]))

    def novelty(self, vectors: np.ndarray) -> np.ndarray:
        """(n,) root mean square of the whitened coordinates: about 1 for clips like those fitted on, more for others.

        It is the Mahalanobis distance within the directions kept, over the root of their number.
        """
        whitened = ((vectors - self.mean) / self.scale) @ self.basis.T
        return np.asarray(np.sqrt(np.mean(np.square(whitened), axis=1)))


class ProbeDescriber:
    """A describer made of one probe file. `path`: the file; its encoder is loaded when first needed.

    `threshold`: least confidence at which a value is told, instead of the one in the file. Raises `UserError` for a file
    that is no probe.
    """

    def __init__(
        self, path: str | Path, threshold: float | None = None, features: EncoderFeatures | None = None
    ) -> None:
        self.path = Path(path)
        self.probe = load_probe(self.path)
        self.threshold = self.probe.about["threshold"] if threshold is None else threshold
        self.attributes: tuple[str, ...] = (self.probe.attribute,)
        # Two files of one name are two describers: a resumed run must not mix them.
        self.name = f"{self.probe.attribute}={self.path.name} {sha256_file(self.path)[:12]}"
        if threshold is not None:
            self.name += f" from {threshold:g}"
        self._features = features

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        how = f"probe {self.path.name} on {self.probe.about['encoder']['reference']}"
        found: list[dict[str, Attribute]] = []
        judged = judge(clips, self._listen, of_speech=self.probe.attribute in OF_A_VOICE)
        for probabilities in judged:
            found.append({})
            if probabilities is None or self.threshold is None:
                continue
            # What is most like background has no label that is likely.
            best = int(probabilities[: len(self.probe.labels)].argmax())
            if probabilities[best] >= self.threshold:
                found[-1][self.probe.attribute] = Attribute(
                    self.probe.labels[best], confidence=float(probabilities[best]), how=how
                )
        return found

    def _listen(self, sounds: list[np.ndarray]) -> list[np.ndarray | None]:
        if self._features is None:
            features = shared_features(self.probe.about["encoder"]["reference"])
            check_encoder_is(features, self.probe, self.path)
            self._features = features
        vectors = self._features.vectors(sounds, self.probe.about["blocks"])
        strange = self.probe.novelty(vectors) > float(self.probe.about["novelty_limit"])
        likely = self.probe.log_probabilities(vectors)
        return [None if odd else row for odd, row in zip(strange, likely, strict=True)]


def save_probe(probe: Probe, path: str | Path) -> None:
    """Write a probe file, whole or not at all."""
    from safetensors.numpy import save

    tensors = {name: np.ascontiguousarray(getattr(probe, name), np.float32) for name in TENSORS}
    data = save(
        tensors, metadata={"probe": json.dumps({"format": FORMAT, **probe.about}, ensure_ascii=False)}
    )
    with atomic_write(path, "wb") as handle:
        handle.write(data)


def load_probe(path: str | Path) -> Probe:
    """Read a probe file. Raises `UserError` when there is none, or when it is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such probe file; make one with "
            "`speech-llm fit-describer ATTRIBUTE MANIFEST --out FILE.safetensors`"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = (file.metadata() or {}).get("probe")
            if header is None:
                raise UserError(
                    f"{path}: a safetensors file, but no probe; `speech-llm fit-describer` writes them"
                )
            about = json.loads(header)
            if about.get("format") != FORMAT:
                raise UserError(
                    f"{path}: its format is {about.get('format')!r}, and this version reads {FORMAT!r}; fit it again"
                )
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged or no probe file ({' '.join(str(error).split())[:160]}); fit it again or fetch it anew"
        ) from None
    del about["format"]
    probe = Probe(about, **tensors)
    rows, features = len(probe.bias), len(probe.mean)
    shapes = {"scale": (features,), "weight": (rows, features), "bias": (rows,)}
    wrong = [name for name, shape in shapes.items() if getattr(probe, name).shape != shape]
    if wrong or probe.basis.shape[1:] != (features,) or rows - len(probe.labels) not in (0, 1):
        raise UserError(f"{path}: damaged (its tensors do not fit together); fit it again or fetch it anew")
    return probe


def check_encoder_is(features: EncoderFeatures, probe: Probe, path: str | Path) -> None:
    """Raise `UserError` unless these are features of the encoder that the probe was fitted on."""
    wanted, have = probe.about["encoder"], features.identity()
    same = wanted["model_type"] == have["model_type"] and wanted["parameters"] == have["parameters"]
    if not same or not np.isclose(wanted["mean_weight"], have["mean_weight"], rtol=1e-4):
        raise UserError(
            f"{path}: this probe was fitted on another encoder ({_shape(wanted)}) than {have['reference']} is now "
            f"({_shape(have)}); fit it again with --encoder {have['reference']}"
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _shape(encoder: dict[str, Any]) -> str:
    return f"{encoder['model_type']}, {encoder['parameters']:,} parameters of mean size {encoder['mean_weight']:.6f}"
