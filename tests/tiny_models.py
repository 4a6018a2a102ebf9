"""Tiny random encoders, LLMs and a tokenizer, made in memory: for tests of what must hold whatever the weights are."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor

VOCABULARY = 300
LLM_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi": PhiConfig,
    "phi3": Phi3Config,
}
ENCODERS = ("whisper", "wav2vec2", "wav2vec2-layernorm", "hubert", "wavlm")

# As SmolLM2's: a system turn is put in front when the conversation has none.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llm(kind: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LLM of one of the supported families, two layers, width 32."""
    torch.manual_seed(seed)
    config = LLM_CONFIGS[kind](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        }
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_encoder(kind: str = "whisper", seed: int = 0) -> nn.Module:
    """A random audio encoder: three layers, width 24."""
    torch.manual_seed(seed)
    if kind == "whisper":
        return WhisperEncoder(
            WhisperConfig(
                d_model=24,
                encoder_layers=3,
                encoder_attention_heads=2,
                encoder_ffn_dim=32,
                num_mel_bins=80,
                max_source_positions=1500,
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=32,
            )
        ).eval()
    config_class, model_class = {
        "hubert": (HubertConfig, HubertModel),
        "wavlm": (WavLMConfig, WavLMModel),
    }.get(kind, (Wav2Vec2Config, Wav2Vec2Model))
    return model_class(
        config_class(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer" if kind == "wav2vec2-layernorm" else "group",
            do_stable_layer_norm=kind == "wav2vec2-layernorm",
        )
    ).eval()


def tiny_feature_extractor(kind: str = "whisper") -> Any:
    return WhisperFeatureExtractor() if kind == "whisper" else Wav2Vec2FeatureExtractor(do_normalize=True)


def tiny_tokenizer(
    template: str = CHAT_TEMPLATE, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose ids stay under `VOCABULARY`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        unk_token=special[0],
    )
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    return fast


def tiny_model(
    llm: str = "llama", encoder: str = "whisper", seed: int = 0, **settings: Any
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """A speech LLM of tiny random parts and its processor."""
    settings.setdefault("connector", {"type": "qformer", "queries": 3, "layers": 2, "heads": 2})
    parts = tiny_llm(llm, seed), tiny_encoder(encoder, seed)
    torch.manual_seed(seed + 1)
    model = SpeechLLMForConditionalGeneration.build(
        *parts, llm_reference=f"tiny-{llm}", encoder_reference=f"tiny-{encoder}", **settings
    ).eval()
    return model, SpeechLLMProcessor(tiny_tokenizer(), tiny_feature_extractor(encoder), model.config)
