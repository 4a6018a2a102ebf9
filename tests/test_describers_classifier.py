"""Any audio-classification model of transformers as a describer: its labels mapped, its doubts kept, its mistakes told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import tiny_encoder, tiny_feature_extractor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from describers.classifier import ClassifierDescriber
from describers.named import attribute_describer
from describers.records import Clip
from describers.run import describe_inputs
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.cli import main
from speech_llm.errors import UserError

LABELS = ("ang", "hap", "neu", "sad")


def save_classifier(
    folder: Path, labels: tuple[str, ...] = LABELS, layer_norm: bool = False, favours: int = 0
) -> Path:
    """A random wav2vec2 classifier of tiny size that favours one label."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        feat_extract_norm="layer" if layer_norm else "group",
        do_stable_layer_norm=layer_norm,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = Wav2Vec2ForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(3)
        model.classifier.bias[favours] += 2
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=layer_norm).save_pretrained(folder)
    return folder


def clips(*seconds: float) -> list[Clip]:
    rng = np.random.default_rng(0)
    sounds = [
        (0.1 * rng.standard_normal(round(length * SAMPLE_RATE_HZ))).astype(np.float32) for length in seconds
    ]
    return [Clip(f"{n}", Path(f"{n}"), len(sound) / SAMPLE_RATE_HZ, sound) for n, sound in enumerate(sounds)]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_folder_becomes_a_describer_whose_results_depend_on_no_batch_mate(
    tmp_path: Path, layer_norm: bool
) -> None:
    folder = save_classifier(tmp_path / "model", layer_norm=layer_norm)
    several = clips(0.5, 1.3, 0.05, 0.5, 2.1)
    together = ClassifierDescriber(str(folder), "emotion", threshold=0.0).describe(several)
    alone = [
        ClassifierDescriber(str(folder), "emotion", threshold=0.0, batch_size=1).describe([clip])[0]
        for clip in several
    ]
    for one, other in zip(together, alone, strict=True):
        assert one["emotion"].value == other["emotion"].value == "angry"  # the vocabulary's word for "ang"
        assert one["emotion"].confidence == pytest.approx(other["emotion"].confidence, abs=1e-5)
    assert "classifier" in together[0]["emotion"].how


def test_what_the_model_says_is_what_is_told(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model")
    clip = clips(0.8)[0]
    model = Wav2Vec2ForSequenceClassification.from_pretrained(folder).eval()
    inputs = tiny_feature_extractor("wav2vec2")(
        clip.samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(inputs.input_values).logits.softmax(-1)[0]
    found = ClassifierDescriber(str(folder), "emotion", threshold=0.0).describe([clip])[0]["emotion"]
    assert found.confidence == pytest.approx(float(expected.max()), abs=1e-5)


def test_the_label_map_merges_renames_and_leaves_out(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path / "model"))
    several = clips(0.5, 0.9)
    plain = ClassifierDescriber(folder, "emotion", threshold=0.0).describe(several)
    merged = ClassifierDescriber(
        folder, "valence", {"ang": "negative", "sad": "negative", "hap": "positive", "neu": None}, 0.0
    ).describe(several)
    assert [found["valence"].value for found in merged] == ["negative"] * 2
    for one, other in zip(merged, plain, strict=True):  # two labels together are likelier than one
        assert (one["valence"].confidence or 0) > (other["emotion"].confidence or 0)
    silent = ClassifierDescriber(folder, "valence", dict.fromkeys(LABELS), 0.0).describe(several)
    assert silent == [{}, {}]
    with pytest.raises(UserError, match="no label 'anger'; its labels are ang, hap, neu, sad"):
        ClassifierDescriber(folder, "emotion", {"anger": "angry"}).describe(several)


def test_below_its_threshold_and_in_silence_it_says_nothing(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path / "model"))
    speech = clips(0.5)
    sure = ClassifierDescriber(folder, "emotion", threshold=0.0).describe(speech)[0]["emotion"].confidence
    assert sure is not None
    assert ClassifierDescriber(folder, "emotion", threshold=sure - 0.01).describe(speech)[0]
    assert ClassifierDescriber(folder, "emotion", threshold=sure + 0.01).describe(speech) == [{}]
    silence = Clip("silence", Path("silence"), 1.0, np.zeros(SAMPLE_RATE_HZ, np.float32))
    assert ClassifierDescriber(folder, "emotion", threshold=0.0).describe([silence]) == [{}]


def test_a_spectrogram_model_is_a_describer_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_length=128,
        num_mel_bins=32,
        id2label={0: "Dog", 1: "Rain"},
        label2id={"Dog": 0, "Rain": 1},
    )
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=128, num_mel_bins=32).save_pretrained(tmp_path)
    told = ClassifierDescriber(str(tmp_path), "event", threshold=0.0).describe(clips(0.5, 1.0))
    assert {found["event"].value for found in told} <= {"dog bark", "rain"}


def test_from_the_command_line_with_a_label_map_and_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_classifier(tmp_path / "model", tuple(f"LABEL_{n}" for n in range(4)))
    for clip in clips(0.5, 0.7):
        soundfile.write(tmp_path / f"{clip.id}.wav", clip.samples, SAMPLE_RATE_HZ)
    (tmp_path / "m.jsonl").write_text(
        '{"audio": "0.wav", "felt": "anger"}\n{"audio": "1.wav", "felt": "sad"}\n'
    )
    command = ["describe", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "d.jsonl"), "-q"]
    command += ["--use", f"emotion={folder}", "--check", "felt=emotion"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "label map" in error
    assert '{"LABEL_0": "angry"}' in error
    (tmp_path / "map.json").write_text(json.dumps({f"LABEL_{n}": word for n, word in enumerate(LABELS)}))
    with pytest.raises(SystemExit) as ended:
        main([*command, "--map", f"emotion={tmp_path / 'map.json'}"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "emotion against 2 labels" in said
    report = json.loads((tmp_path / "d.report.json").read_text())
    assert report["checks"]["emotion"]["n"] == 2
    assert report["checks"]["emotion"]["coverage"] == report["coverage"].get("emotion", 0) / 2


def test_an_encoder_without_a_head_or_an_absent_model_is_a_sentence(tmp_path: Path) -> None:
    tiny_encoder("wav2vec2").save_pretrained(tmp_path / "encoder")  # type: ignore[operator]
    tiny_feature_extractor("wav2vec2").save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="fit-describer"):
        ClassifierDescriber(str(tmp_path / "encoder"), "emotion").describe(clips(0.5))
    with pytest.raises(UserError, match="no such folder"):
        ClassifierDescriber("./absent/model", "emotion").describe(clips(0.5))


def test_results_of_another_threshold_or_map_are_not_continued(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path / "model"))
    names = {
        ClassifierDescriber(folder, "emotion").name,
        ClassifierDescriber(folder, "emotion", threshold=0.9).name,
        ClassifierDescriber(folder, "emotion", {"ang": "cross"}).name,
    }
    assert len(names) == 3
    named = attribute_describer(f"emotion={folder}")
    assert isinstance(named, ClassifierDescriber)
    soundfile.write(tmp_path / "a.wav", clips(0.5)[0].samples, SAMPLE_RATE_HZ)
    run = {"progress": False, "use": ["duration"]}
    describe_inputs(tmp_path / "a.wav", tmp_path / "d.jsonl", describers=[named], **run)  # type: ignore[arg-type]
    surer = ClassifierDescriber(folder, "emotion", threshold=0.9)
    again = describe_inputs(tmp_path / "a.wav", tmp_path / "d.jsonl", describers=[surer], **run)  # type: ignore[arg-type]
    assert again.restarted
