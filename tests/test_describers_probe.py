"""Probes: fitted by the real command on speakers apart, honest about what they know, silent about what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny_models import tiny_encoder, tiny_feature_extractor

from describers.features import EncoderFeatures, levelled
from describers.fit import disjoint_folds, fit_probe
from describers.material import Material, read_material
from describers.probe import TENSORS, Probe, ProbeDescriber, load_probe, save_probe
from describers.records import Clip
from describers.run import describe_inputs
from describers.speech_activity import Activity
from speech_llm.audio import SAMPLE_RATE_HZ
from speech_llm.cli import main
from speech_llm.errors import UserError

SPEAKERS = 8
CLIPS = 3  # of each speaker and label


def tone(hz: float, seconds: float, seed: int, level: float = 0.2) -> np.ndarray:
    """A buzz of five harmonics with some noise; every seed is another voice."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    hz *= rng.uniform(0.95, 1.05)
    parts = [rng.uniform(0.3, 1) * np.sin(2 * np.pi * hz * k * time_s) / k for k in range(1, 6)]
    sound = sum(parts) + 0.05 * rng.standard_normal(len(time_s))
    return (level * sound / np.abs(sound).max()).astype(np.float32)


def clip_of(samples: np.ndarray, name: str = "clip") -> Clip:
    return Clip(name, Path(name), len(samples) / SAMPLE_RATE_HZ, samples)


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


def save_encoder(folder: Path, seed: int) -> Path:
    tiny_encoder("wav2vec2", seed).save_pretrained(folder)  # type: ignore[operator]
    tiny_feature_extractor("wav2vec2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low and high buzzes of eight speakers, and lines that cannot be used."""
    folder = tmp_path_factory.mktemp("corpus")
    rows: list[dict[str, Any] | str] = []
    for speaker in range(SPEAKERS):
        for label, hz in (("low", 110), ("high", 230)):
            for number in range(CLIPS):
                name = f"{speaker}-{label}-{number}.wav"
                seed = 100 * speaker + 10 * number + (label == "high")
                soundfile.write(folder / name, tone(hz, 0.5 + 0.1 * number, seed), SAMPLE_RATE_HZ)
                row = {"audio": name, "register": label, "speaker": f"s{speaker}", "split": "train"}
                rows.append(row if speaker < SPEAKERS - 1 else {**row, "split": "dev"})
    soundfile.write(folder / "silence.wav", np.zeros(8000), SAMPLE_RATE_HZ)
    (folder / "broken.wav").write_bytes(b"RIFF and nothing")
    bad = {"register": "low", "speaker": "s0", "split": "train"}
    rows += [{**bad, "audio": "silence.wav"}, {**bad, "audio": "broken.wav"}, {**bad, "audio": "absent.wav"}]
    rows += ["{cut", {"audio": "0-low-0.wav", "id": "unlabelled", "split": "train"}]
    path = folder / "metadata.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def probe_file(manifest: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes when it is run as a user runs it."""
    out = tmp_path_factory.mktemp("probes") / "register.safetensors"
    arguments = ["fit-describer", "register", str(manifest), "--out", str(out), "--where", "split=train"]
    arguments += ["--encoder", str(encoder_dir), "--licence", "CC0", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def gaussian_material(overlap: float, labels: int = 3, speakers: int = 12, each: int = 10) -> Material:
    """Vectors of classes that overlap more or less; no sound is needed to see what a fit makes of them."""
    rng = np.random.default_rng(0)
    truth = np.tile(np.arange(labels), speakers * each)
    centres = 2 * rng.standard_normal((labels, 6))
    vectors = (centres[truth] + overlap * rng.standard_normal((len(truth), 6))).astype(np.float32)
    return Material(
        labels=[f"label {index}" for index in truth],
        groups=[f"speaker {index // (labels * each)}" for index in range(len(truth))],
        hashes=[str(index) for index in range(len(truth))],
        grouped_by="speaker",
        owner=np.arange(len(truth)),
        copy=np.zeros(len(truth), int),
        seconds=np.ones(len(truth)),
        blocks={name: vectors[:, part] for name, part in
                {"first": slice(0, 1), "layers": slice(0, 3), "thirds": slice(3, 4), "spectrum": slice(4, 5), "pitch": slice(5, 6)}.items()},
    )  # fmt: skip


ENCODER = {"reference": "tiny", "model_type": "wav2vec2", "parameters": 1, "mean_weight": 0.1, "layers": 3}


def test_the_command_fits_prints_its_folds_and_sets_bad_lines_aside(
    manifest: Path, encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "register.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "fit-describer",
                "register",
                str(manifest),
                "--out",
                str(out),
                "--encoder",
                str(encoder_dir),
                "-q",
            ]
        )
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"{SPEAKERS * CLIPS * 2} clips" in said
    assert f"{SPEAKERS} speakers" in said
    for reason in ("silence", "not a sound file", "no such file", "not a JSON object", "no label"):
        assert reason in said
    assert "is \\ told" in said
    assert "majority 50.0 %" in said
    about = load_probe(out).about
    assert about["data"]["set_aside"]["silence"] == 1
    assert about["folds"]["everything_told"]["accuracy"] > 0.9


def test_a_probe_tells_speakers_it_never_heard_and_the_check_counts_them(
    manifest: Path, probe_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines() if "dev" in line]
    dev = manifest.parent / "dev.jsonl"
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = describe_inputs(
        dev,
        tmp_path / "d.jsonl",
        use=["duration", f"register={probe_file}"],
        progress=False,
        checks={"register": "register"},
    )
    assert report.checks["register"]["n"] == 2 * CLIPS
    assert report.checks["register"]["accuracy"] == 1.0
    assert report.checks["register"]["confusion"] == {"high": {"high": CLIPS}, "low": {"low": CLIPS}}
    kept = json.loads((tmp_path / "d.report.json").read_text())
    assert kept["checks"]["register"]["precision"] == 1.0
    assert kept["coverage"]["register"] == 2 * CLIPS
    line = json.loads((tmp_path / "d.jsonl").read_text().splitlines()[0])
    assert 0.5 < line["confidence"]["register"] <= 1


def test_no_speaker_stands_on_both_sides_of_a_fold() -> None:
    material = gaussian_material(1.0)
    truth = np.array([int(label[-1]) for label in material.labels])
    folds = disjoint_folds(truth, material.groups)
    assert len(folds) == 5
    assert (np.sum(folds, axis=0) == 1).all()
    groups = np.array(material.groups)
    for held_out in folds:
        assert not set(groups[held_out]) & set(groups[~held_out])


def test_a_voice_is_not_mistaken_for_its_label() -> None:
    """Vectors that tell the speaker and nothing else: by clip they would be right, by speaker they are at chance."""
    rng = np.random.default_rng(1)
    material = gaussian_material(1.0, labels=2, speakers=12)
    material.groups = [f"speaker {index // 20}" for index in range(len(material.labels))]
    material.labels = ["even" if int(group.split()[1]) % 2 else "odd" for group in material.groups]
    voices = {group: rng.standard_normal(40) for group in dict.fromkeys(material.groups)}
    vectors = np.array(
        [voices[group] + 0.1 * rng.standard_normal(40) for group in material.groups], np.float32
    )
    material.blocks = {name: vectors[:, part::4] for part, name in enumerate(material.blocks)}
    by_speaker = fit_probe("parity", material, ENCODER).about["folds"]["everything_told"]["accuracy"]
    material.groups = [str(index) for index in range(len(material.labels))]
    by_clip = fit_probe("parity", material, ENCODER).about["folds"]["everything_told"]["accuracy"]
    assert by_clip > 0.95
    assert by_speaker < 0.8


@pytest.mark.parametrize("precision", [0.85, 0.95])
def test_what_is_told_on_the_folds_is_as_right_as_was_asked(precision: float) -> None:
    about = fit_probe("label", gaussian_material(2.2), ENCODER, precision).about
    everything, told = about["folds"]["everything_told"], about["folds"]["at_threshold"]
    assert everything["accuracy"] < precision  # so that silence is needed at all
    assert told["precision"] >= precision
    assert 0 < told["coverage"] < 1
    assert everything["ece"] < 0.08


def test_a_probe_of_noise_is_never_sure() -> None:
    material = gaussian_material(1.0)
    rng = np.random.default_rng(3)
    material.blocks = {
        name: rng.standard_normal(block.shape).astype(np.float32) for name, block in material.blocks.items()
    }
    about = fit_probe("nothing", material, ENCODER, precision=0.99).about
    assert about["threshold"] is None
    assert about["folds"]["at_threshold"]["told"] == 0


def test_silence_and_strange_sounds_get_no_attribute(probe_file: Path) -> None:
    describer = ProbeDescriber(probe_file)
    rng = np.random.default_rng(0)
    sounds = [
        tone(110, 1.0, 12345),
        np.zeros(16_000, np.float32),
        np.full(16_000, 0.3, np.float32),  # a constant offset is silence too
        (rng.standard_normal(16_000) * 1e-5).astype(np.float32),
        np.sign(np.sin(2 * np.pi * 3000 * np.arange(16_000) / SAMPLE_RATE_HZ)).astype(np.float32),
    ]
    told = describer.describe([clip_of(sound) for sound in sounds])
    assert told[0]["register"].value == "low"
    assert "probe" in told[0]["register"].how
    assert told[1:] == [{}] * 4


def test_gender_needs_somebody_who_speaks(probe_file: Path, tmp_path: Path) -> None:
    probe = load_probe(probe_file)
    renamed = Probe({**probe.about, "attribute": "gender"}, *(getattr(probe, name) for name in TENSORS))
    save_probe(renamed, tmp_path / "gender.safetensors")
    spoken, unspoken = clip_of(tone(110, 1.0, 12345)), clip_of(tone(110, 1.0, 12345))
    frames = np.zeros(32)
    spoken.measured["speech"] = Activity(((0.0, 1.0),), frames, frames)
    unspoken.measured["speech"] = Activity((), frames, frames)
    told = ProbeDescriber(tmp_path / "gender.safetensors", threshold=0.0).describe([spoken, unspoken])
    assert told[0]["gender"].value == "low"
    assert told[1] == {}
    assert "register" in ProbeDescriber(probe_file, threshold=0.0).describe([unspoken])[0]


def test_level_offset_and_batch_mates_change_nothing(probe_file: Path, encoder_dir: Path) -> None:
    sound = tone(110, 0.7, 5)
    features = EncoderFeatures(str(encoder_dir))
    alone = features.vectors([sound], ["layers", "thirds", "spectrum", "pitch"])[0]
    others = [tone(230, 0.3, 6), 0.01 * sound + 0.2, tone(110, 0.7, 7)]
    beside = features.vectors([*others, sound], ["layers", "thirds", "spectrum", "pitch"])
    np.testing.assert_array_equal(beside[3], alone)
    np.testing.assert_allclose(beside[1], alone, atol=2e-2)
    assert np.sqrt(np.mean(levelled(sound) ** 2)) == pytest.approx(10 ** (-23 / 20), rel=0.1)


def test_blocks_of_a_sound_are_the_first_of_its_layers_and_its_pitch(encoder_dir: Path) -> None:
    features = EncoderFeatures(str(encoder_dir))
    low, high = features.every_block([tone(110, 1.0, 4), tone(220, 1.0, 4)])
    layers = low["layers"].reshape(2, features.identity()["layers"], -1)  # means and spreads
    np.testing.assert_array_equal(low["first"], layers[:, 0].ravel())
    assert low["pitch"][0] == pytest.approx(np.log2(1.1), abs=0.1)
    assert high["pitch"][0] - low["pitch"][0] == pytest.approx(1, abs=0.02)
    [noise] = features.every_block([np.random.default_rng(0).normal(size=16_000).astype(np.float32)])
    assert noise["pitch"][5] < 0.2 < low["pitch"][5]  # the share that is voiced


def test_two_probes_of_one_encoder_encode_each_clip_once(
    probe_file: Path, encoder_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = EncoderFeatures(str(encoder_dir))
    encoded: list[int] = []
    encode = features._encode
    monkeypatch.setattr(
        features, "_encode", lambda sounds, length: encoded.extend(map(len, sounds)) or encode(sounds, length)
    )
    clips = [clip_of(tone(110, 0.5 + 0.1 * n, n), f"{n}") for n in range(4)]
    first = ProbeDescriber(probe_file, features=features).describe(clips)
    second = ProbeDescriber(probe_file, threshold=0.0, features=features).describe(clips)
    assert len(encoded) == 4
    assert [found["register"].value for found in first] == [found["register"].value for found in second]


def test_a_long_recording_is_judged_by_all_of_its_windows(probe_file: Path, tmp_path: Path) -> None:
    sound = np.concatenate([tone(110, 20, 1), np.zeros(20 * SAMPLE_RATE_HZ, np.float32), tone(110, 30, 2)])
    soundfile.write(tmp_path / "long.flac", sound, SAMPLE_RATE_HZ)
    held = clip_of(sound)
    streamed = Clip("long", tmp_path / "long.flac", 70.0)
    told = ProbeDescriber(probe_file, threshold=0.0).describe([held, streamed])
    assert told[0]["register"].value == "low"
    assert told[1]["register"].confidence == pytest.approx(told[0]["register"].confidence, abs=1e-3)


def test_a_probe_file_comes_back_as_it_was_written(probe_file: Path, tmp_path: Path) -> None:
    probe = load_probe(probe_file)
    save_probe(probe, tmp_path / "again.safetensors")
    again = load_probe(tmp_path / "again.safetensors")
    assert again.about == probe.about
    for name in TENSORS:
        np.testing.assert_array_equal(getattr(again, name), getattr(probe, name))
    assert (tmp_path / "again.safetensors").read_bytes() == probe_file.read_bytes()
    assert probe.about["licence"] == "CC0"
    assert probe.about["data"]["groups"] == SPEAKERS - 1
    assert probe.about["data"]["hash"]


def test_the_same_data_gives_the_same_probe(manifest: Path, encoder_dir: Path) -> None:
    features = EncoderFeatures(str(encoder_dir))
    one, two = (
        fit_probe("register", read_material([manifest], "register", features, progress=False), ENCODER)
        for _ in range(2)
    )
    assert one.about == two.about
    np.testing.assert_array_equal(one.weight, two.weight)


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "not safetensors", "absent"])
def test_a_damaged_probe_file_is_a_sentence(probe_file: Path, tmp_path: Path, damage: str) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "damaged.safetensors"
    if damage == "other":
        save_file({"weight": np.zeros(3, np.float32)}, str(path))
    elif damage != "absent":
        data = probe_file.read_bytes()
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2]}.get(damage, b"PK" * 100))
    with pytest.raises(UserError, match=r"damaged\.safetensors: "):
        ProbeDescriber(path)


def test_a_probe_on_another_encoder_is_a_sentence(probe_file: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other", seed=1)
    probe = load_probe(probe_file)
    about = {**probe.about, "encoder": {**probe.about["encoder"], "reference": str(other)}}
    moved = tmp_path / "moved.safetensors"
    save_probe(Probe(about, *(getattr(probe, name) for name in TENSORS)), moved)
    with pytest.raises(UserError, match="another encoder"):
        ProbeDescriber(moved).describe([clip_of(tone(110, 0.5, 1))])


def test_mistakes_are_sentences(
    manifest: Path, encoder_dir: Path, probe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit-describer", "register", str(manifest), "--out", str(tmp_path / "p.safetensors"), "-q"]
    fit += ["--encoder", str(encoder_dir)]
    assert "'mood'" in fail(capsys, *fit, "--column", "mood")
    assert "split=test" in fail(capsys, *fit, "--where", "split=test")
    assert "COLUMN=VALUE" in fail(capsys, *fit, "--where", "train")
    assert "at least two" in fail(capsys, *fit, "--where", "register=low")
    assert "precision" in fail(capsys, *fit, "--precision", "90")
    describe = ["describe", str(manifest), "--out", str(tmp_path / "d.jsonl"), "-q", "--use"]
    assert "not 'mood'" in fail(capsys, *describe, f"mood={probe_file}")
    assert "no such probe file" in fail(capsys, *describe, "mood=absent.safetensors")
    assert "fit-describer accent" in fail(capsys, *describe, "accent")
    assert "ATTRIBUTE=FILE" in fail(capsys, *describe, "register=")
    assert not (tmp_path / "p.safetensors").exists()
