"""A CTranslate2 Whisper model becomes a folder in transformers' form, bit for bit the same numbers.

In: a folder with `model.bin` (binary version 6), `config.json`, `tokenizer.json`. Out: `config.json`,
`model.safetensors`, `generation_config.json`, `preprocessor_config.json` and the tokenizer's files.
Layout of the file: CTranslate2's `model_spec.py` (`ModelSpec._serialize`) and `transformer_spec.py`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from speech_llm.errors import UserError

# Changes when the written folder changes, so that a folder from an older version is never reused.
VERSION = 1
_BINARY_VERSION = 6
_END = "<|endoftext|>"
# CTranslate2's data type ids; int8 and bfloat16 models would need their scales resp. a numpy type, and none is used here.
_DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_model_bin(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a `model.bin`, by its name; aliases (tied weights) are resolved. Raises `UserError`."""
    data = path.read_bytes()
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + code, data, offset)
        offset += struct.calcsize("<" + code)
        return int(value)

    def text() -> str:
        nonlocal offset
        length = number("H")  # counts the closing zero byte
        raw = data[offset : offset + length - 1]
        offset += length
        return raw.decode("utf-8")

    variables: dict[str, np.ndarray] = {}
    try:
        version = number("I")
        if version != _BINARY_VERSION:
            raise UserError(
                f"{path}: CTranslate2 binary version {version}; this reader knows {_BINARY_VERSION}"
            )
        spec = text()
        if spec != "WhisperSpec":
            raise UserError(f"{path}: a {spec} model; expected WhisperSpec")
        number("I")  # revision of the specification
        for _ in range(number("I")):
            name = text()
            shape = tuple(number("I") for _ in range(number("B")))
            dtype = _DTYPES.get(number("B"))
            size = number("I")
            if dtype is None:
                raise UserError(f"{path}: variable {name} has a data type that this reader does not know")
            variables[name] = np.frombuffer(data[offset : offset + size], dtype=dtype).reshape(shape)
            offset += size
        for _ in range(number("I")):
            alias = text()
            variables[alias] = variables[text()]
    except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged or cut off ({error})") from None
    if offset != len(data):
        raise UserError(f"{path}: {len(data) - offset} bytes more than its table of contents names")
    return variables


def state_dict(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays under the names of transformers' `WhisperForConditionalGeneration`, fused projections split."""
    tensors: dict[str, np.ndarray] = {}

    def rename(old: str, new: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias")):
            if f"{old}/{ours}" in variables:
                tensors[f"{new}.{theirs}"] = variables[f"{old}/{ours}"]

    def split(old: str, prefix: str, names: str) -> None:
        """Rows of a fused projection; Whisper's key projection has no bias, which CTranslate2 stores as zeros."""
        for kind in ("weight", "bias"):
            pieces = np.split(variables[f"{old}/{kind}"], len(names))
            for name, piece in zip(names, pieces, strict=True):
                if (name, kind) != ("k", "bias"):
                    tensors[f"{prefix}.{name}_proj.{kind}"] = piece
                elif piece.any():
                    raise UserError(f"{old}: a key projection with a bias; Whisper's has none")

    for side in ("encoder", "decoder"):
        for layer in range(_layers(variables, side)):
            old, new = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            rename(f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            split(f"{old}/self_attention/linear_0", f"{new}.self_attn", "qkv")
            rename(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            if side == "decoder":
                rename(f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
                split(f"{old}/attention/linear_0", f"{new}.encoder_attn", "q")
                split(f"{old}/attention/linear_1", f"{new}.encoder_attn", "kv")
                rename(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
            rename(f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            rename(f"{old}/ffn/linear_0", f"{new}.fc1")
            rename(f"{old}/ffn/linear_1", f"{new}.fc2")
        rename(f"{side}/layer_norm", f"model.{side}.layer_norm")
        tensors[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    for conv in ("conv1", "conv2"):
        rename(f"encoder/{conv}", f"model.encoder.{conv}")
    # `proj_out` is tied to this and therefore not stored.
    tensors["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    return tensors


def convert(source_dir: Path, out_dir: Path) -> None:
    """Write the transformers folder of the model in `source_dir` into the existing folder `out_dir`."""
    import torch
    from safetensors.torch import save_file
    from transformers import WhisperFeatureExtractor

    variables = read_model_bin(source_dir / "model.bin")
    tensors = state_dict(variables)
    settings = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
    tokenizer = _write_tokenizer(source_dir / "tokenizer.json", out_dir)
    ids = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids(_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(_END),
    }
    mel_bins = variables["encoder/conv1/weight"].shape[1]
    _write_model_config(variables, ids, mel_bins, out_dir)
    _write_generation_config(settings, ids, tokenizer, len(variables["decoder/embeddings/weight"]), out_dir)
    WhisperFeatureExtractor(feature_size=mel_bins).save_pretrained(out_dir)
    save_file(
        {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()},
        out_dir / "model.safetensors",
        metadata={"format": "pt"},
    )


def _layers(variables: dict[str, np.ndarray], side: str) -> int:
    return sum(name.endswith("/ffn/linear_0/bias") for name in variables if name.startswith(f"{side}/layer_"))


def _write_tokenizer(tokenizer_file: Path, out_dir: Path) -> Any:
    """The tokenizer from its own file, its added tokens declared special so that timestamps are told from them."""
    from transformers import WhisperTokenizer

    added = json.loads(tokenizer_file.read_text(encoding="utf-8"))["added_tokens"]
    special = [token["content"] for token in sorted(added, key=lambda token: int(token["id"]))]
    tokenizer = WhisperTokenizer.from_pretrained(
        str(tokenizer_file.parent),
        local_files_only=True,
        pad_token=_END,
        extra_special_tokens=[token for token in special if token != _END],
    )
    tokenizer.save_pretrained(str(out_dir))
    return tokenizer


def _write_model_config(
    variables: dict[str, np.ndarray], ids: dict[str, int], mel_bins: int, out_dir: Path
) -> None:
    from transformers import WhisperConfig

    vocab_size, width = variables["decoder/embeddings/weight"].shape
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_mel_bins=mel_bins,
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        scale_embedding=bool(variables["decoder/scale_embeddings"]),
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        **ids,
    )
    config.save_pretrained(out_dir)


def _write_generation_config(
    settings: dict[str, Any], ids: dict[str, int], tokenizer: Any, vocab_size: int, out_dir: Path
) -> None:
    from transformers import GenerationConfig

    # The English-only models have a vocabulary of 51,864, the multilingual ones one or two more.
    multilingual = vocab_size >= 51865
    spoken: dict[str, Any] = {}
    if multilingual:
        languages = {tokenizer.convert_ids_to_tokens(number): number for number in settings["lang_ids"]}
        tasks = {task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")}
        spoken = {"lang_to_id": languages, "task_to_id": tasks}
    GenerationConfig(
        **ids,
        max_length=448,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=multilingual,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **spoken,
    ).save_pretrained(out_dir)
