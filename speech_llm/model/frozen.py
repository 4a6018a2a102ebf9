"""The frozen parts of a speech LLM: found by reference, or ready; checked against what a checkpoint was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from speech_llm.errors import UserError
from speech_llm.model.configuration import fingerprint


def portable_config(config: Any) -> dict[str, Any]:
    """A part's config without the place on this machine that it was read from."""
    settings = config.to_dict()
    settings.pop("_name_or_path", None)
    return settings


def checkpoint_folder(reference: str | os.PathLike[str]) -> Path:
    path = Path(reference)
    if path.is_dir():
        return path
    from speech_llm.assets import resolve

    return Path(resolve(str(reference)))


def ready_llm(llm: str | PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    if isinstance(llm, str):
        from speech_llm.assets import load_llm

        return load_llm(llm, dtype=dtype)[0], llm
    return llm, llm.config.name_or_path or ""


def ready_encoder(encoder: str | nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str]:
    if isinstance(encoder, str):
        from speech_llm.assets import load_encoder

        return load_encoder(encoder, dtype=dtype)[0], encoder
    config: Any = encoder.config
    return encoder, config.name_or_path or ""


def check_llm(llm: PreTrainedModel, reference: str) -> None:
    """Raise a `UserError` unless this is a causal LLM that reads embeddings."""
    decoder_only = not getattr(llm.config, "is_encoder_decoder", False)
    if not decoder_only or llm.get_output_embeddings() is None:
        raise UserError(
            f"{reference} is a {llm.config.model_type} model that does not continue text; use a decoder-only LLM (Llama, Qwen, Gemma, Phi, ...)"
        )


def check_same(folder: Path, part: str, trained_with: str, saved: Any, given: str, found: Any) -> None:
    """A checkpoint of another LLM or encoder is a `UserError` that names both."""
    wanted, have = fingerprint(saved), fingerprint(found)
    if wanted != have:
        raise UserError(
            f"{folder}: this checkpoint was trained with the {part} {_name(trained_with, wanted)}, "
            f"but {_name(given, have)} was given; give the {part} that it was trained with"
        )


def _name(reference: str, shape: dict[str, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in shape.items() if value is not None)
    return f"{reference or 'without a name'} ({described})"
