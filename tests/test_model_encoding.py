"""The frozen encoder: its own numbers, at the tapped layers, for each clip as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import ENCODERS, tiny_encoder, tiny_model

from speech_llm.errors import UserError
from speech_llm.model.encoding import encode

RATE = 16_000


def clips(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(s * RATE))).astype(np.float32) for s in seconds]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_tapped_layers_are_the_encoders_own_hidden_states(encoder: str) -> None:
    model, processor = tiny_model(encoder=encoder)
    features, counts = processor.mel_features(clips(0.5))
    got, _ = model.encode_audio(features, counts, padded=True)
    with torch.no_grad():
        if encoder == "whisper":
            full = processor.feature_extractor(
                clips(0.5)[0], sampling_rate=RATE, return_tensors="pt"
            ).input_features
            states = model.encoder(full, output_hidden_states=True).hidden_states
        else:
            output = model.encoder(features, output_hidden_states=True)
            states = (*output.hidden_states[:-1], output.last_hidden_state)
    count = int(counts[0])
    assert got.shape == (1, count, 3, 24)
    for tap in (1, 2, 3):
        torch.testing.assert_close(got[0, :, tap - 1], states[tap][0, :count], atol=1e-5, rtol=1e-5)


def test_padded_mel_frames_equal_the_feature_extractors() -> None:
    _, processor = tiny_model()
    for seconds in (0.1, 0.53, 3.001):
        sound = clips(seconds)[0]
        ours, _ = processor.mel_features([sound, *clips(4)])
        whole = processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
        torch.testing.assert_close(ours[0], whole[0, :, : ours.shape[-1]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_clips_features_do_not_depend_on_its_batch_mates(encoder: str, padded: bool) -> None:
    model, processor = tiny_model(encoder=encoder)
    sounds = clips(0.3, 0.71, 0.3, 0.1)
    together, counts = model.encode_audio(*processor.mel_features(sounds), padded=padded)
    assert together.shape == (4, int(counts.max()), 3, 24)
    for i, sound in enumerate(sounds):
        alone, count = model.encode_audio(*processor.mel_features([sound]), padded=padded)
        assert int(count[0]) == int(counts[i]) == processor.frames(len(sound)) == alone.shape[1]
        torch.testing.assert_close(together[i, : int(count[0])], alone[0], atol=1e-5, rtol=1e-5)
        assert not together[i, int(count[0]) :].any()


def test_own_length_and_padded_encodings_have_the_same_shape_and_differ() -> None:
    model, processor = tiny_model()
    features, counts = processor.mel_features(clips(0.5, 1.0))
    own, _ = model.encode_audio(features, counts, padded=False)
    padded, _ = model.encode_audio(features, counts, padded=True)
    assert own.shape == padded.shape == (2, 50, 3, 24)
    assert not torch.allclose(own, padded, atol=1e-4)
    default, _ = model.encode_audio(features, counts)
    assert torch.equal(default, own)


def test_own_length_encoding_leaves_the_encoder_as_it_was() -> None:
    model, processor = tiny_model()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model.encode_audio(*processor.mel_features(clips(0.5)), padded=False)
    assert model.encoder.config.max_source_positions == 1500
    assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())
    assert not model.encoder._forward_hooks
    assert not any(layer._forward_hooks for layer in model.encoder.layers)


def test_a_full_length_clip_is_the_same_in_both_encodings() -> None:
    model, processor = tiny_model()
    features, counts = processor.mel_features(clips(30.0))
    assert counts.tolist() == [1500]
    own, _ = model.encode_audio(features, counts, padded=False)
    padded, _ = model.encode_audio(features, counts, padded=True)
    torch.testing.assert_close(own, padded, atol=1e-5, rtol=1e-5)


def test_chosen_taps_are_those_of_all_taps() -> None:
    everything, processor = tiny_model()
    chosen, _ = tiny_model(taps=[3, 1])
    assert chosen.config.taps == [1, 3]
    inputs = processor.mel_features(clips(0.4))
    torch.testing.assert_close(
        chosen.encode_audio(*inputs)[0], everything.encode_audio(*inputs)[0][:, :, [0, 2]]
    )


def test_a_tap_that_the_encoder_does_not_have_is_named() -> None:
    with pytest.raises(UserError, match="encoder layer 9, but tiny-whisper has layers 1 to 3"):
        tiny_model(taps=[2, 9])


def test_a_clip_longer_than_the_encoder_hears_is_refused_with_both_lengths() -> None:
    model, processor = tiny_model()
    with pytest.raises(UserError, match=r"31\.0 s long, but the encoder hears at most 30 s"):
        processor.mel_features(clips(31.0))
    with pytest.raises(UserError, match="1501 encoder frames, but the encoder hears at most 1500"):
        encode(model.encoder, torch.zeros(1, 80, 3002), torch.tensor([1501]), [1])


def test_longest_clip_can_be_set_for_encoders_without_a_limit_of_their_own() -> None:
    _, processor = tiny_model(encoder="wav2vec2", max_audio_s=0.5)
    processor.mel_features(clips(0.5))
    with pytest.raises(UserError, match=r"0\.6 s long, but the encoder hears at most 0\.5 s"):
        processor.mel_features(clips(0.6))


def test_the_encoder_never_trains_nor_drops() -> None:
    model, processor = tiny_model(encoder="wav2vec2")
    inputs = processor.mel_features(clips(0.4))
    quiet, _ = model.eval().encode_audio(*inputs)
    loud, _ = model.train().encode_audio(*inputs)
    assert not model.encoder.training
    assert not loud.requires_grad
    assert torch.equal(quiet, loud)


def test_an_encoder_whose_layers_cannot_be_tapped_is_refused_in_a_sentence() -> None:
    from tiny_models import tiny_llm

    from speech_llm.model import SpeechLLMForConditionalGeneration

    with pytest.raises(UserError, match="is a llama model, whose layers cannot be tapped; use a Whisper"):
        SpeechLLMForConditionalGeneration.build(tiny_llm(), tiny_llm().model, encoder_reference="some-llm")


def test_an_llm_that_does_not_continue_text_is_refused_in_a_sentence() -> None:
    from tiny_models import tiny_llm

    from speech_llm.model import SpeechLLMForConditionalGeneration

    with pytest.raises(UserError, match="some-llm is a llama model that does not continue text"):
        SpeechLLMForConditionalGeneration.build(tiny_llm().model, tiny_encoder(), llm_reference="some-llm")
