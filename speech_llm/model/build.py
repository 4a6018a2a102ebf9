"""A fresh model and its processor from a recipe's `model` and `trainable` sections."""

from __future__ import annotations

from typing import Any

import torch

from speech_llm.model.modeling import SpeechLLMForConditionalGeneration
from speech_llm.model.processing import SpeechLLMProcessor


def build_model(
    model: Any, trainable: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Load the frozen parts that the sections name and put a fresh connector (and adapters) between them.

    `model` has llm, encoder, connector, taps, use_transcript, encode, gate_adapters; `trainable` has connector, lora,
    encoder_lora and llm; both may be mappings or objects. `dtype`: of the frozen parts; what is trained stays float32, as
    small updates would be lost in bf16.
    """
    from speech_llm.assets import load_encoder, load_llm

    section, trained = _mapping(model), _mapping(trainable)
    whole_llm = bool(trained.get("llm", False))
    llm, tokenizer = load_llm(section["llm"], dtype=torch.float32 if whole_llm else dtype)
    encoder, feature_extractor = load_encoder(section["encoder"], dtype=dtype)
    built = SpeechLLMForConditionalGeneration.build(
        llm,
        encoder,
        llm_reference=section["llm"],
        encoder_reference=section["encoder"],
        connector=section.get("connector"),
        taps=section.get("taps"),
        use_transcript=section.get("use_transcript", False),
        encoding=section.get("encode", "own_length"),
        gate_adapters=section.get("gate_adapters", True),
        lora=trained.get("lora"),
        encoder_lora=trained.get("encoder_lora"),
    )
    if whole_llm:
        built.llm.requires_grad_(True)
    built.connector.requires_grad_(bool(trained.get("connector", True)))
    return built, SpeechLLMProcessor(tokenizer, feature_extractor, built.config)


def _mapping(section: Any) -> dict[str, Any]:
    if section is None or isinstance(section, dict):
        return dict(section or {})
    return section.model_dump() if hasattr(section, "model_dump") else dict(vars(section))
