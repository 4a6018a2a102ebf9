"""A llama.cpp model file (GGUF) becomes a folder in transformers' form: plain weights, tokenizer, generation settings.

In: one `.gguf`. Out: `config.json`, `model.safetensors`, `tokenizer.json`, `chat_template.jinja`, `generation_config.json`.
The quantised blocks are expanded to float32, which holds `scale * integer + minimum` of float16 scales without loss;
the result computes what llama.cpp's own dequantisation would and needs no quantisation library afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Changes when the written folder changes, so that a folder from an older version is never reused.
VERSION = 1


def convert(gguf_file: Path, out_dir: Path) -> None:
    """Write the transformers folder of `gguf_file` into the existing folder `out_dir`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _restore_pre_tokenizer(tokenizer, gguf_file)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loader leaves its dequantiser attached, and saving would go through it; the weights are plain by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(str(out_dir), max_shard_size="5GB")
    tokenizer.save_pretrained(str(out_dir))


def _restore_pre_tokenizer(tokenizer: Any, gguf_file: Path) -> None:
    """SmolLM splits numbers into single digits; the file says so only by name (`tokenizer.ggml.pre = smollm`)."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(gguf_file)).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
