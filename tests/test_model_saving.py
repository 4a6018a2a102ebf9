"""A checkpoint: what was trained, references to the rest, and refusal of anything that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_model import LORA, sounds, spoken, stir_adapters
from tiny_models import tiny_encoder, tiny_feature_extractor, tiny_llm, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from speech_llm.errors import UserError
from speech_llm.model import (
    SpeechLLMConfig,
    SpeechLLMForConditionalGeneration,
    SpeechLLMProcessor,
    build_model,
)


def parts() -> dict[str, Any]:
    return {"use_llm": tiny_llm(), "use_encoder": tiny_encoder()}


def trained_model(**settings: Any) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    model, processor = tiny_model(**settings)
    stir_adapters(model)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, processor


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("connector", ["qformer", "stack"])
def test_a_reloaded_model_equals_the_saved_one(
    connector: str, lora: dict[str, int] | None, tmp_path: Path
) -> None:
    model, _ = trained_model(
        lora=lora, connector={"type": connector, "queries": 3, "heads": 2, "stack": 4}, taps=[2, 3]
    )
    ids = spoken(2, model.connector.num_vectors(8))
    clips = sounds(8, 8, taps=2)
    model.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, **parts())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids, **clips).logits, model(input_ids=ids, **clips).logits)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert not loaded.training


def test_only_trained_tensors_are_saved(tmp_path: Path) -> None:
    model, _ = trained_model(lora=LORA)
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("connector.") or "lora_" in name for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_trained_llm_is_saved_whole_and_stays_trained(tmp_path: Path) -> None:
    model, _ = trained_model()
    model.llm.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.add_(0.01)
    assert not model.text_path_is_base
    model.save_pretrained(tmp_path / "a")
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "a", **parts())
    assert not loaded.text_path_is_base
    loaded.save_pretrained(tmp_path / "b")
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "b", **parts())
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=spoken(), **sounds(5)).logits, model(input_ids=spoken(), **sounds(5)).logits
        )


def test_auto_classes_load_a_checkpoint_without_remote_code(tmp_path: Path) -> None:
    model, processor = trained_model(use_transcript=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SpeechLLMConfig)
    assert config.llm == "tiny-llama"
    assert config.encoder == "tiny-whisper"
    assert config.taps == [1, 2, 3]
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path, **parts())
        assert isinstance(loaded, SpeechLLMForConditionalGeneration)
        assert torch.equal(
            loaded(input_ids=spoken(), **sounds(5)).logits, model(input_ids=spoken(), **sounds(5)).logits
        )
    reread = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(reread, SpeechLLMProcessor)
    turns = [
        {
            "role": "user",
            "content": [{"type": "audio", "path": "a", "transcript": "hi"}, {"type": "text", "text": "Who?"}],
        }
    ]
    assert reread.render(turns, frame_counts=[9]) == processor.render(turns, frame_counts=[9])


def test_a_saved_processor_stands_alone(tmp_path: Path) -> None:
    _, processor = tiny_model()
    processor.save_pretrained(tmp_path)
    reread = SpeechLLMProcessor.from_pretrained(tmp_path)
    assert reread.frames(16_000) == processor.frames(16_000) == 50
    assert reread.config.to_dict() == processor.config.to_dict()


def test_a_checkpoint_of_another_llm_or_encoder_is_refused_naming_both(tmp_path: Path) -> None:
    model, _ = trained_model()
    model.save_pretrained(tmp_path)
    other = tiny_llm("qwen2", hidden_size=64)
    other.config._name_or_path = "other/llm"
    with pytest.raises(
        UserError, match=r"trained with the LLM tiny-llama \(.*llama.*32.*other/llm \(.*qwen2.*64"
    ):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, use_llm=other, use_encoder=tiny_encoder())
    with pytest.raises(UserError, match=r"trained with the encoder tiny-whisper \(.*whisper.*wav2vec2"):
        SpeechLLMForConditionalGeneration.from_pretrained(
            tmp_path, use_llm=tiny_llm(), use_encoder=tiny_encoder("wav2vec2")
        )


def test_a_damaged_or_foreign_folder_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json, so this is not a saved speech LLM"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, **parts())
    model, _ = trained_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read .* damaged"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, **parts())
    state = safetensors.torch.load(whole)
    state["connector.extra"] = state.pop("connector.proj.bias")
    safetensors.torch.save_file(state, weights)
    with pytest.raises(
        UserError, match=r"1 missing \(first: connector.proj.bias\), 1 unknown \(first: connector.extra\)"
    ):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, **parts())
    weights.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; the checkpoint is incomplete"):
        SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, **parts())


def test_trained_state_moves_between_models() -> None:
    first, _ = trained_model(lora=LORA)
    second, _ = tiny_model(lora=LORA)
    second.load_trained({name: value.clone() for name, value in first.trained_state_dict().items()})
    assert torch.equal(
        first(input_ids=spoken(), **sounds(5)).logits, second(input_ids=spoken(), **sounds(5)).logits
    )
    with pytest.raises(ValueError, match=r"connector\.proj\.weight has shape"):
        second.load_trained({**first.trained_state_dict(), "connector.proj.weight": torch.zeros(2, 2)})


def test_the_seed_decides_the_connector_with_and_without_adapters() -> None:
    plain, _ = tiny_model(seed=3)
    adapted, _ = tiny_model(seed=3, lora=LORA)
    for name, parameter in plain.connector.named_parameters():
        assert torch.equal(parameter, dict(adapted.connector.named_parameters())[name])


def test_a_recipes_sections_make_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("speech_llm.assets")
    import speech_llm.assets

    def llm(reference: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        return tiny_llm().to(dtype), tiny_tokenizer()

    def encoder(reference: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        return tiny_encoder().to(dtype), tiny_feature_extractor()

    monkeypatch.setattr(speech_llm.assets, "load_llm", llm)
    monkeypatch.setattr(speech_llm.assets, "load_encoder", encoder)
    section = {
        "llm": "some/llm",
        "encoder": "some/encoder",
        "connector": {"type": "stack", "stack": 5, "width": None},
        "taps": None,
        "use_transcript": True,
        "encode": "padded",
        "gate_adapters": False,
    }
    model, processor = build_model(section, {"connector": False, "lora": {"rank": 2}}, dtype=torch.bfloat16)
    assert model.config.connector["stack"] == 5
    assert (model.config.llm, model.config.encoder, model.config.encoding) == (
        "some/llm",
        "some/encoder",
        "padded",
    )
    assert processor.config.use_transcript
    assert not model.config.gate_adapters
    assert model.llm.dtype == torch.bfloat16
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
