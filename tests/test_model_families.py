"""Every family of encoder and LLM with every connector: forward, backward, generate, save, load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ENCODERS, LLM_CONFIGS, tiny_encoder, tiny_llm, tiny_model

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
