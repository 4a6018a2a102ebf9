"""Describers by name: what comes with the package, and how to get the others.

In: an item of `--use` (or of a recipe's `describe.use`): `gender` (a probe that comes with the package), `language` (a model that is
fetched), `emotion=my/emotion.safetensors` (a probe that `fit-describer` wrote), `emotion=OWNER/NAME` or `emotion=some/folder` (an
audio-classification model of transformers; for `language` also a multilingual Whisper). Out: the describer, or a sentence that says how to get one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from describers.records import Describer
from describers.vocabulary import SYNONYMS
from speech_llm.assets import WHISPER_BASE, describe_asset, is_cached
from speech_llm.errors import UserError, nearest
from speech_llm.files import read_json

PROBES = Path(__file__).parent / "probes"
LabelMap = Mapping[str, "str | None"]
# Attributes that a probe or a classifier can tell; the rest of the vocabulary is measured or transcribed.
LEARNED = (
    "gender",
    "age_group",
    "emotion",
    "accent",
    "native_language",
    "language",
    "num_speakers",
    "event",
    "keyword",
)

# Told by a model that is fetched when it is first needed.
MODELS = {"language": WHISPER_BASE}


def shipped() -> dict[str, Path]:
    """attribute -> the probe file that comes with the package."""
    return {path.stem: path for path in sorted(PROBES.glob("*.safetensors"))}


def attribute_describer(
    item: str, label_map: LabelMap | None = None, others: Sequence[str] = ()
) -> Describer:
    """The describer that an item of `--use` names. `others`: names that are known besides, for the message.

    Raises `UserError`: no such file or model, a probe of another attribute, a name that means nothing.
    """
    check_name(item, others)
    from describers.classifier import ClassifierDescriber  # torch: only once a describer is really made
    from describers.probe import ProbeDescriber

    attribute, _, reference = (part.strip() for part in item.partition("="))
    reference = reference or MODELS.get(attribute, "")
    if not reference:
        return ProbeDescriber(shipped()[attribute])
    if Path(reference).suffix == ".safetensors" or Path(reference).is_file():
        probe = ProbeDescriber(reference)
        if probe.attributes != (attribute,):
            raise UserError(f"{reference}: this probe tells {probe.attributes[0]!r}, not {attribute!r}")
        return probe
    if attribute == "language" and _transcribes(reference):
        from describers.language import LanguageDescriber

        return LanguageDescriber(reference)
    return ClassifierDescriber(reference, attribute, label_map)


def check_name(item: str, others: Sequence[str] = ()) -> None:
    """Raise `UserError` for an item that names no describer, nothing being loaded. `others`: names that are known besides."""
    attribute, equals, reference = (part.strip() for part in item.partition("="))
    if equals:
        if not attribute or not reference:
            raise UserError(
                f"{item!r}: expected ATTRIBUTE=FILE or ATTRIBUTE=MODEL, for example gender=my/gender.safetensors"
            )
        return
    own = [*shipped(), *MODELS]
    if attribute in others or attribute in own:
        return
    if attribute in LEARNED or attribute in SYNONYMS:
        raise UserError(f"no describer of {attribute!r} comes with the package. {how_to_get(attribute)}")
    known = [*others, *own]
    raise UserError(
        f"unknown describer {attribute!r}; there are {', '.join(known)}, and ATTRIBUTE=FILE or ATTRIBUTE=MODEL."
        + nearest(attribute, known)
    )


def _transcribes(reference: str) -> bool:
    """Whether a model is a Whisper that writes text (and so begins with the language), rather than a classifier."""
    from speech_llm.assets import resolve

    config = read_json(resolve(reference) / "config.json")
    return config.get("model_type") == "whisper" and "Classification" not in str(config.get("architectures"))


def how_to_get(attribute: str) -> str:
    """What to do about an attribute that no describer in the package tells."""
    return (
        f"Fit one on labelled recordings (`speech-llm fit-describer {attribute} MANIFEST --out {attribute}.safetensors`, then "
        f"--use {attribute}={attribute}.safetensors), name any audio-classification model of transformers by hub id or folder "
        f"(--use {attribute}=OWNER/NAME), or take it from a column of the manifest (--use labels)"
    )


def overview() -> list[dict[str, Any]]:
    """For `doctor`: each attribute that is learned, and the probe or model that tells it or how to get one."""
    from describers.probe import load_probe

    probes = shipped()
    rows: list[dict[str, Any]] = []
    for attribute in dict.fromkeys([*probes, *MODELS, *LEARNED]):
        row: dict[str, Any] = {
            "attribute": attribute,
            "available": attribute in probes or attribute in MODELS,
        }
        if attribute in probes:
            about = load_probe(probes[attribute]).about
            row |= {name: about[name] for name in ("labels", "precision", "threshold", "licence")}
            row["encoder"] = about["encoder"]["reference"]
            on_folds = about["folds"]["at_threshold"]
            row |= {"coverage": on_folds["coverage"], "precision_on_folds": on_folds["precision"]}
            row["clips"] = about["data"]["clips"] - about["folds"]["background"]["clips"]
        elif attribute in MODELS:
            info = describe_asset(MODELS[attribute])
            row |= {"model": info.name, "licence": info.licence, "cached": is_cached(MODELS[attribute])}
            row["download_mb"] = round((info.download_bytes or 0) / 1e6)
        else:
            row["how_to_get"] = how_to_get(attribute)
        rows.append(row)
    return rows
