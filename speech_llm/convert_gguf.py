"""A llama.cpp model file (GGUF) becomes a folder in transformers' form: plain weights, tokenizer, generation settings.

In: one `.gguf` of the llama architecture with a byte-level BPE vocabulary. Out: `config.json`, `model.safetensors`,
`generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
The quantised blocks are expanded to float32, which holds `scale * integer + minimum` of float16 scales without loss:
the folder computes what the file says, and needs no quantisation library afterwards. transformers reads such files
too, but parses the 98,000 strings of the vocabulary four times on the way, which takes a minute on a slow machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speech_llm.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

# Changes when the written folder changes, so that a folder from an older version is never reused.
VERSION = 1

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
# gguf's TokenType.CONTROL: tokens such as <|im_end|> that text never spells.
_CONTROL = 3


def convert(gguf_file: Path, out_dir: Path) -> None:
    """Write the transformers folder of `gguf_file` into the existing folder `out_dir`. Raises `UserError`."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(str(gguf_file))
    kind, vocabulary = _value(reader, "general.architecture"), _value(reader, "tokenizer.ggml.model")
    if (kind, vocabulary) != ("llama", "gpt2"):
        raise UserError(
            f"{gguf_file}: a {kind} model with a {vocabulary} vocabulary; only llama with gpt2 is read"
        )
    ids = {
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id"),
    }
    tensors = read_tensors(reader)
    _config(reader, ids, tied="lm_head.weight" not in tensors).save_pretrained(out_dir)
    GenerationConfig(**ids).save_pretrained(out_dir)
    _tokenizer(reader).save_pretrained(str(out_dir))
    weights = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})


def read_tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor as float32 under its name in transformers' `LlamaForCausalLM`."""
    from gguf import dequantize

    heads = _value(reader, "llama.attention.head_count")
    key_heads = _value(reader, "llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        *layer, kind, suffix = tensor.name.split(".")
        if kind not in _TENSORS or suffix != "weight":
            continue  # e.g. precomputed rotary frequencies, which the configuration tells as well
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if kind in ("attn_q", "attn_k"):
            array = _unpermute(array, heads if kind == "attn_q" else key_heads)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{_TENSORS[kind]}.weight"] = array
    return tensors


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from llama.cpp's rotary order (pairs beside each other) to halves."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _config(reader: GGUFReader, ids: dict[str, int], tied: bool) -> Any:
    from transformers import LlamaConfig

    heads = _value(reader, "llama.attention.head_count")
    width = _value(reader, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=width,
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        head_dim=width // heads,
        max_position_embeddings=_value(reader, "llama.context_length"),
        # Stored as a 32-bit number; the decimal that it stands for is what the model was trained with.
        rms_norm_eps=float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **ids,
    )


def _tokenizer(reader: GGUFReader) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bytes_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # The file tells only by name how text is cut before the merges: SmolLM takes numbers apart into digits.
    digits = (
        [pre_tokenizers.Digits(individual_digits=True)]
        if _value(reader, "tokenizer.ggml.pre") == "smollm"
        else []
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    named = {
        f"{role}_token": tokens[_value(reader, f"tokenizer.ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_value(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=_value(reader, "llama.context_length"),
        **named,
    )


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.fields.get(key)
    if field is None:
        raise UserError(f"the GGUF file lacks the setting {key}")
    return field.contents()
