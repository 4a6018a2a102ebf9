"""Any audio-classification model of transformers as a describer, by hub id or local folder.

Clips in, one attribute out. The model's own labels become values of the attribute through a label map; labels that mean
the same ("ang", "anger") count together. The model says how sure it is; nobody has calibrated that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from describers.records import Attribute, Clip
from describers.vocabulary import canonical
from describers.voting import judge
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.errors import UserError

# More likely than all other values together: the least that "knows" can mean without a calibration.
THRESHOLD = 0.5
# wav2vec2-like models have no frame for shorter sounds.
_SHORTEST_S = 0.1


class ClassifierDescriber:
    """One attribute from `AutoModelForAudioClassification`.

    `reference`: hub id or local folder. `label_map`: the model's label -> value, None for a label that says nothing about
    the attribute (when it wins, the attribute is left out); labels that are absent stay themselves, in the vocabulary's
    spelling. `threshold`: least probability at which a value is told (default 0.5). The model is loaded when first needed.
    """

    def __init__(
        self,
        reference: str,
        attribute: str,
        label_map: Mapping[str, str | None] | None = None,
        threshold: float | None = None,
        batch_size: int = 16,
        device: str | None = None,
    ) -> None:
        self.reference, self.attribute = reference, attribute
        self.label_map = dict(label_map or {})
        self.threshold = THRESHOLD if threshold is None else threshold
        self.batch_size = batch_size
        self.attributes: tuple[str, ...] = (attribute,)
        # Everything that a result depends on is in the name, which tells resumed runs apart.
        mapped = f" {sorted(self.label_map.items())}" if self.label_map else ""
        self.name = f"{attribute}={reference} from {self.threshold:g}{mapped}"
        self.models: tuple[str, ...] = (reference,)
        self._device = device
        self._loaded: tuple[Any, Any, list[str | None], np.ndarray] | None = None

    def describe(self, clips: Sequence[Clip]) -> list[dict[str, Attribute]]:
        found: list[dict[str, Attribute]] = []
        for probabilities in judge(clips, self._listen):
            found.append({})
            if probabilities is None:
                continue
            best = int(probabilities.argmax())
            value, sure = self._load()[2][best], float(probabilities[best])
            if value is not None and sure >= self.threshold:
                how = f"classifier {self.reference}"
                found[-1][self.attribute] = Attribute(value, confidence=sure, how=how)
        return found

    def _listen(self, sounds: list[np.ndarray]) -> list[np.ndarray | None]:
        """Log-probabilities of the values; sounds share a batch where that cannot change their result."""
        model, extractor, _, to_value = self._load()
        least = round(_SHORTEST_S * SAMPLE_RATE_HZ)
        sounds = [np.pad(sound, (0, max(0, least - len(sound)))) for sound in sounds]
        out: list[np.ndarray | None] = [None] * len(sounds)
        for batch in _batches([len(sound) for sound in sounds], self.batch_size, _may_pad(extractor)):
            inputs = extractor(
                [sounds[index] for index in batch],
                sampling_rate=SAMPLE_RATE_HZ,
                return_tensors="pt",
                **({"padding": True} if _reads_samples(extractor) else {}),
            )
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits.float().cpu()
            if model.config.problem_type == "multi_label_classification":
                likely = logits.sigmoid()
                likely = likely / likely.sum(-1, keepdim=True).clamp(min=1.0)
            else:
                likely = logits.softmax(-1)
            log_values = np.log(np.maximum(likely.numpy() @ to_value, 1e-9))
            for index, row in zip(batch, log_values, strict=True):
                out[index] = row
        return out

    def _load(self) -> tuple[Any, Any, list[str | None], np.ndarray]:
        """The model, its feature extractor, the values, and which of them each label counts for (labels, values)."""
        if self._loaded is None:
            model, extractor = load_classifier(self.reference)
            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            values, to_value = self._values(
                [model.config.id2label[i] for i in range(model.config.num_labels)]
            )
            self._loaded = model.to(device), extractor, values, to_value
        return self._loaded

    def _values(self, labels: list[str]) -> tuple[list[str | None], np.ndarray]:
        unknown = sorted(set(self.label_map) - set(labels))
        if unknown:
            raise UserError(
                f"{self.reference} has no label {unknown[0]!r}; its labels are {', '.join(map(str, labels[:40]))}"
            )
        meant: list[str | None] = [
            self.label_map[label] if label in self.label_map else canonical(self.attribute, label)
            for label in labels
        ]
        nameless = [label for label, value in zip(labels, meant, strict=True) if _is_number(label, value)]
        if nameless:
            raise UserError(
                f"{self.reference}: its labels have no names ({', '.join(nameless[:4])}); say what they mean with a label "
                f'map, a JSON file such as {{"{nameless[0]}": "angry"}}: --map {self.attribute}=FILE.json'
            )
        values = list(dict.fromkeys(meant))
        to_value = np.zeros((len(labels), len(values)), np.float32)
        to_value[np.arange(len(labels)), [values.index(value) for value in meant]] = 1
        return values, to_value


def load_classifier(reference: str) -> tuple[Any, Any]:
    """An audio-classification model in evaluation mode and its feature extractor. Raises `UserError`."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification

    from speech_llm.assets import resolve

    folder = str(resolve(reference))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not any("Classification" in name for name in config.architectures or []):
            raise ValueError(f"it is {', '.join(config.architectures or ['a model without a head'])}")
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForAudioClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{reference}: cannot be used as an audio-classification model ({reason}); of another encoder make a "
            "describer with `speech-llm fit-describer ATTRIBUTE MANIFEST --encoder REF --out FILE`"
        ) from error
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise UserError(
            f"{reference}: it hears sound at {extractor.sampling_rate} Hz, and clips are held at {SAMPLE_RATE_HZ} Hz"
        )
    return model.eval(), extractor


def _reads_samples(extractor: Any) -> bool:
    return "input_values" in extractor.model_input_names and hasattr(extractor, "do_normalize") and not (
        hasattr(extractor, "num_mel_bins")
    )  # fmt: skip


def _may_pad(extractor: Any) -> bool:
    """Whether clips of unlike length can share a batch: mel models pad each to their own native length by themselves, and
    of those that read samples only the ones trained with an attention mask do not hear the padding."""
    return not _reads_samples(extractor) or bool(getattr(extractor, "return_attention_mask", False))


def _batches(lengths: list[int], size: int, pad: bool) -> list[list[int]]:
    """Indices, shortest first, in batches; without padding only equal lengths meet."""
    out: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = not out or len(out[-1]) == size
        if full or not (pad or lengths[out[-1][0]] == lengths[index]):
            out.append([])
        out[-1].append(index)
    return out


def _is_number(label: str, value: str | None) -> bool:
    return value is not None and value == label and str(label).upper().startswith("LABEL_")
