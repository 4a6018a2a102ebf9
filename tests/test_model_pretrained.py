"""The model on the embedded SmolLM2 and Whisper: references, real templates, real sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from speech_llm import assets
from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, build_model

pytestmark = pytest.mark.assets

QUESTION = [
    {
        "role": "user",
        "content": [
            {"type": "audio", "path": "a", "transcript": "Good morning."},
            {"type": "text", "text": "Who?"},
        ],
    }
]


@pytest.fixture(scope="module")
def built(
    smollm2_dir: Path, whisper_dir: Path
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    torch.manual_seed(0)
    section = {
        "llm": assets.SMOLLM2,
        "encoder": assets.WHISPER_TINY_EN,
        "connector": {"type": "qformer"},
        "use_transcript": True,
    }
    return build_model(section, {"lora": {"rank": 4}})


def sound(seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(int(16_000 * seconds))).astype(np.float32)


def test_text_logits_and_tokens_are_those_of_the_base_llm(built, smollm2_dir: Path) -> None:
    model, processor = built
    base, tokenizer = assets.load_llm(assets.SMOLLM2)
    turns = [{"role": "user", "content": "Is the sky blue?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert processor.render(turns, add_generation_prompt=True).input_ids == ids
    with torch.no_grad():
        ours, theirs = model(input_ids=torch.tensor([ids])).logits, base(input_ids=torch.tensor([ids])).logits
    assert torch.equal(ours, theirs)
    assert model.config.audio_token_id == base.config.vocab_size == 49_152


def test_a_spoken_question_is_the_base_llms_tokens_around_the_placeholders(built) -> None:
    _, processor = built
    rendered = processor.render([*QUESTION, {"role": "assistant", "content": "A man."}], frame_counts=[50])
    plain = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": '"Good morning."\nWho?'}, {"role": "assistant", "content": "A man."}],
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert [i for i in rendered.input_ids if i != processor.audio_token_id] == plain
    (start, end), (first, last) = rendered.answer_spans[0], rendered.audio_spans[0]
    assert processor.tokenizer.decode(rendered.input_ids[start:end]) == "A man.<|im_end|>"
    assert last - first == 8
    assert processor.tokenizer.decode(rendered.input_ids[:first]).endswith("<|im_start|>user\n")


def test_a_checkpoint_finds_its_frozen_parts_by_reference(built, tmp_path: Path) -> None:
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert str(assets.cache_dir()) not in json.dumps(saved)
    assert (saved["llm"], saved["encoder"]) == (assets.SMOLLM2, assets.WHISPER_TINY_EN)
    assert (tmp_path / "model.safetensors").stat().st_size < 30e6
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    reread = SpeechLLMProcessor.from_pretrained(tmp_path)
    batch, again = processor([QUESTION], sounds=[sound()]), reread([QUESTION], sounds=[sound()])
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**batch).logits, loaded(**again).logits)


def test_fresh_vectors_are_of_the_size_of_words(built) -> None:
    model, processor = built
    features, counts = model.encode_audio(*processor.mel_features([sound(2.5)]))
    assert features.shape == (1, 125, 4, 384)
    vectors, _ = model.audio_vectors(features, counts)
    words = model.get_input_embeddings().weight.detach().norm(dim=-1).median()
    assert vectors.shape == (8, 576)
    assert 0.6 < float(vectors.detach().norm(dim=-1).mean() / words) < 1.6
