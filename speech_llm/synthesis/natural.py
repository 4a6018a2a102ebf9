"""Natural voices for a harder test: Piper's joe and Kokoro's five, speaking English from eSpeak NG's phonemes.

In: a sentence, a voice, a pace. Out: samples. Both are small neural networks run by ONNX Runtime (the `demo` extra).
Kokoro's voices here were made for Japanese; given English phonemes they speak it with a light accent, so these clips
carry no accent label.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from speech_llm import assets
from speech_llm.errors import UserError
from speech_llm.synthesis import espeak


@dataclass(frozen=True)
class Voice:
    """`rate`: what the voice's own pace is multiplied by for slow, normal and fast speech."""

    name: str
    gender: str
    rate: dict[str, float]


_KOKORO_RATE = {"slow": 0.75, "normal": 1.05, "fast": 1.4}
VOICES = (
    Voice("joe", "male", {"slow": 0.65, "normal": 0.95, "fast": 1.4}),
    Voice("jf_alpha", "female", _KOKORO_RATE),
    Voice("jm_kumo", "male", _KOKORO_RATE),
    Voice("jf_gongitsune", "female", _KOKORO_RATE),
    Voice("jf_nezumi", "female", _KOKORO_RATE),
    Voice("jf_tebukuro", "female", _KOKORO_RATE),
)

_KOKORO_HZ = 24_000
# eSpeak's IPA in Kokoro's alphabet, which writes diphthongs and affricates as one letter; longest first.
_KOKORO_SPELLING = (
    ("tʃ", "ʧ"),
    ("dʒ", "ʤ"),
    ("eɪ", "A"),
    ("aɪ", "I"),
    ("aʊ", "W"),
    ("oʊ", "O"),
    ("ɔɪ", "Y"),
    ("ɜːɹ", "ɜɹ"),
    ("ɜː", "ɜɹ"),
    ("ɚ", "əɹ"),
    ("əl", "ᵊl"),
    ("ɐ", "ə"),
    ("r", "ɹ"),
    ("ː", ""),
)  # fmt: skip


def available() -> bool:
    """Whether the `demo` extra is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def synthesize(text: str, voice: Voice, speed: str) -> tuple[np.ndarray, int]:
    """Mono float32 samples of shape (n,) and their rate in Hz; `speed` is slow, normal or fast.

    Raises `UserError` when the voice's files or ONNX Runtime cannot be had.
    """
    ipa = espeak.phonemes(text, "en-us")
    rate = voice.rate[speed]
    if voice.name == "joe":
        return _piper(ipa, rate)
    return _kokoro(ipa, voice.name, rate), _KOKORO_HZ


def _piper(ipa: str, rate: float) -> tuple[np.ndarray, int]:
    session, config = _piper_voice()
    table: dict[str, list[int]] = config["phoneme_id_map"]
    # Every phoneme is followed by the blank "_", between the marks of beginning and end (VITS, 2106.06103).
    ids = [*table["^"], *table["_"]]
    for symbol in [*ipa, "."]:
        if symbol in table:
            ids += [*table[symbol], *table["_"]]
    ids += table["$"]
    inference = config["inference"]
    scales = [inference["noise_scale"], inference["length_scale"] / rate, inference["noise_w"]]
    (samples,) = session.run(
        None,
        {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": np.array(scales, np.float32),
        },
    )
    return np.asarray(samples, np.float32).reshape(-1), int(config["audio"]["sample_rate"])


def _kokoro(ipa: str, voice: str, rate: float) -> np.ndarray:
    session, vocabulary, styles = _kokoro_voices()
    for theirs, ours in _KOKORO_SPELLING:
        ipa = ipa.replace(theirs, ours)
    ids = [vocabulary[symbol] for symbol in f"{ipa}." if symbol in vocabulary]
    style = styles[voice][len(ids)]  # one style per length of the text
    (samples,) = session.run(
        None,
        {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style.astype(np.float32),
            "speed": np.array([rate], np.float32),
        },
    )
    return np.asarray(samples, np.float32).reshape(-1)


def _session(path: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "the natural voices need ONNX Runtime: install it with `pip install onnxruntime`"
        ) from None
    onnxruntime.set_seed(0)  # both draw the fine timing of a sentence at random
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Two clips side by side on two cores are made faster than one after the other with two threads each.
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def start_over() -> None:
    """Forget the loaded voices, and with them where their random draws had got to."""
    _piper_voice.cache_clear()
    _kokoro_voices.cache_clear()


@functools.lru_cache(maxsize=1)
def _piper_voice() -> tuple[Any, dict[str, Any]]:
    folder = assets.resolve(assets.PIPER_JOE)
    model = folder / "en_US-joe-medium.onnx"
    return _session(str(model)), json.loads(model.with_suffix(".onnx.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def _kokoro_voices() -> tuple[Any, dict[str, int], dict[str, np.ndarray]]:
    folder = assets.resolve(assets.KOKORO)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with np.load(folder / "voices_ja.npz", allow_pickle=False) as voices:
        styles = {name: voices[name] for name in voices.files}
    return _session(str(folder / "model.onnx")), vocabulary, styles
