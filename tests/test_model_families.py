"""Every family of encoder and LLM with every connector: forward, backward, generate, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import ENCODERS, LLM_CONFIGS, tiny_encoder, tiny_llm, tiny_model, tiny_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from speech_llm.assets import load_encoder, load_llm
from speech_llm.errors import UserError
from speech_llm.model import SpeechLLMForConditionalGeneration


def check_everything(llm: str, encoder: str, connector: str, folder: Path) -> None:
    model, processor = tiny_model(
        llm=llm,
        encoder=encoder,
        connector={"type": connector, "queries": 3, "heads": 2, "stack": 4},
        lora={"rank": 2},
    )
    rng = np.random.default_rng(0)
    sounds = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (6_000, 9_000)]
    ask = [
        [{"role": "user", "content": [{"type": "audio", "path": "a"}, {"type": "text", "text": f"Hm{i}?"}]}]
        for i in range(2)
    ]
    batch = processor(ask, sounds=sounds)

    # Forward and backward: everything trained gets a finite gradient.
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == processor.audio_token_id, -100)
    model(**batch, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    # The base LLM's text logits, untouched.
    model.eval()
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_llm(llm)(input_ids=ids).logits)
        logits = model(**batch).logits

    answers = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answers.shape[0] == 2

    # Saved and loaded onto the same frozen parts: the same model.
    model.save_pretrained(folder)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(
        folder, use_llm=tiny_llm(llm), use_encoder=tiny_encoder(encoder)
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)


@pytest.mark.parametrize("connector", ["qformer", "stack"])
@pytest.mark.parametrize("llm", list(LLM_CONFIGS))
def test_every_llm_family_learns_answers_and_is_saved(llm: str, connector: str, tmp_path: Path) -> None:
    check_everything(llm, "whisper", connector, tmp_path)


@pytest.mark.parametrize("connector", ["qformer", "stack"])
@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "whisper"])
def test_every_encoder_family_is_heard_and_saved(encoder: str, connector: str, tmp_path: Path) -> None:
    check_everything("llama", encoder, connector, tmp_path)


def cut_holes(file: Path, layer: str) -> int:
    """Take a layer's weights out of a file; how many they were."""
    weights = safetensors.torch.load_file(file)
    kept = {name: value for name, value in weights.items() if layer not in name}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    assert len(kept) < len(weights)
    return len(weights) - len(kept)


def saved_llm(folder: Path) -> Path:
    tiny_llm().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_saved_llm_loads_and_one_that_lacks_something_is_a_sentence(tmp_path: Path) -> None:
    loaded, _ = load_llm(str(saved_llm(tmp_path / "whole")))
    assert all(
        torch.equal(p, dict(tiny_llm().named_parameters())[name]) for name, p in loaded.named_parameters()
    )
    cut = saved_llm(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be loaded as this kind of model"):
        load_llm(str(cut.parent))
    holes = saved_llm(tmp_path / "holes") / "model.safetensors"
    gone = cut_holes(holes, "layers.1.")
    with pytest.raises(UserError, match=f"{gone} of its weights are not in its files"):
        load_llm(str(holes.parent))
    bare = saved_llm(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llm(str(bare))


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_saved_encoder_loads_and_one_that_lacks_weights_is_a_sentence(family: str, tmp_path: Path) -> None:
    if family == "whisper":  # saved as the hub has it: with its decoder
        config = tiny_encoder("whisper").config  # type: ignore[operator]
        config.update({"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 400, "pad_token_id": 0})  # fmt: skip
        model: Any = WhisperForConditionalGeneration(config)
        WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tiny_tokenizer()).save_pretrained(tmp_path)  # fmt: skip
    else:
        model = tiny_encoder(family)
        Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, _ = load_encoder(str(tmp_path))
    whole = dict((model.model.encoder if family == "whisper" else model).named_parameters())
    assert all(torch.equal(value, whole[name]) for name, value in loaded.named_parameters())
    gone = cut_holes(tmp_path / "model.safetensors", "encoder.layers.1.")
    with pytest.raises(UserError, match=f"{gone} of its weights are not in its files"):
        load_encoder(str(tmp_path))


def test_models_of_another_kind_are_refused_in_a_sentence(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path / "bert")  # fmt: skip
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    tiny_encoder("wav2vec2").save_pretrained(tmp_path / "ear")  # type: ignore[operator]
    for reference in ("bert", "ear"):
        with pytest.raises(UserError):
            load_llm(str(tmp_path / reference))
    with pytest.raises(UserError):
        load_encoder(str(saved_llm(tmp_path / "llm")))
    with pytest.raises(UserError):
        load_encoder(str(tmp_path / "ear"))  # no feature extractor beside it
