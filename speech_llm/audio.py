"""Sound files in, samples out: the only code that opens sound files.

Everything is decoded in blocks, mixed down to mono and resampled on the way, so that an hour of sound costs no more
memory than the part that is asked for. In: a path (wav, flac, mp3, ogg, ... at any rate and number of channels).
Out: float32 mono samples at 16 kHz, nominally within [-1, 1]. What cannot be used raises `AudioError`, a sentence.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr  # type: ignore[import-untyped]

from speech_llm.errors import UserError

SAMPLE_RATE_HZ = 16_000
# Shorter than this there is neither a syllable nor a stable spectrum, and Whisper invents words.
MIN_DURATION_S = 0.1
SUFFIXES = (
    ".wav",
    ".flac",
    ".mp3",
    ".ogg",
    ".oga",
    ".opus",
    ".m4a",
    ".aac",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".wma",
    ".webm",
)
_BLOCK_S = 10.0
# Channels whose mean is so far below the louder one cancel each other.
_CANCELLED_DB = -20.0


class AudioError(UserError):
    """A sound file that cannot be used: `path` and the `reason`, one sentence."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


def load_audio(path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Decode a whole file to mono float32 samples of shape (n,) at `sample_rate_hz`.

    Channels are averaged. Raises `AudioError` for a file that is missing, empty, not sound, cut off in the middle of
    compressed data, shorter than 0.1 s, or that contains NaN or infinite samples.
    """
    samples = np.concatenate([np.zeros(0, np.float32), *stream_audio(path, sample_rate_hz)])
    if len(samples) < MIN_DURATION_S * sample_rate_hz:
        length_s = len(samples) / sample_rate_hz
        reason = "the file contains no sound" if length_s == 0 else f"only {length_s:.3f} s of sound"
        raise AudioError(path, f"{reason}; at least {MIN_DURATION_S} s is needed")
    return samples


def wav_bytes(path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """A file's sound as a 16-bit mono WAV file, for who takes no other kind. Raises `AudioError`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, load_audio(path, sample_rate_hz), sample_rate_hz, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def stream_audio(path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Iterator[np.ndarray]:
    """Yield a file's mono float32 samples in consecutive blocks of about 10 s, none of them empty.

    The blocks joined are exactly what `load_audio` returns; length is not checked here. Raises `AudioError`.
    """
    path = Path(path)
    _check_file(path)
    try:
        sound = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless formats want parameters
        yield from _fallback(path, sample_rate_hz, error)
        return
    with sound:
        resampler = _resampler(sound.samplerate, sample_rate_hz)
        block_frames = int(_BLOCK_S * sound.samplerate)
        channel: int | None = None
        decided = done = False
        while not done:
            try:
                block = sound.read(block_frames, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise AudioError(path, f"the sound is damaged or cut off ({_plain(error)})") from None
            done = len(block) < block_frames
            if not decided and block.any():
                channel, decided = _instead_of_mean(block), True
            mono = block.mean(axis=1) if channel is None else block[:, channel]
            if not np.isfinite(mono).all():
                raise AudioError(path, "it contains NaN or infinite samples")
            if resampler is not None:
                mono = resampler.resample_chunk(np.ascontiguousarray(mono), last=done)
            if len(mono):
                yield np.ascontiguousarray(mono, dtype=np.float32)


def _instead_of_mean(block: np.ndarray) -> int | None:
    """The channel to take where channels (frames, channels) cancel each other, None where their mean is their sound.

    A cable with its wires crossed, or a stereo widener, gives one channel the sign of the other.
    """
    power = np.square(block, dtype=np.float64).mean(axis=0)
    mean_power = float(np.square(block.mean(axis=1, dtype=np.float64)).mean())
    return int(power.argmax()) if mean_power < 10 ** (_CANCELLED_DB / 10) * power.max() else None


def duration_s(path: str | Path) -> float:
    """Length of a file in seconds, from its header where that tells it. Raises `AudioError`."""
    path = Path(path)
    _check_file(path)
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, TypeError):
        return sum(len(block) for block in stream_audio(path)) / SAMPLE_RATE_HZ
    if 0 < info.frames < 2**40:  # an unknown length is written as 0 or as the largest integer
        return info.frames / info.samplerate
    return sum(len(block) for block in stream_audio(path)) / SAMPLE_RATE_HZ


def audio_hash(samples: np.ndarray) -> str:
    """Hex SHA-256 of the samples themselves: the same sound under another name or format has the same hash."""
    return hashlib.sha256(np.ascontiguousarray(samples, dtype="<f4").tobytes()).hexdigest()


def rms_dbfs(samples: np.ndarray) -> float:
    """Root-mean-square level in dB relative to full scale; -inf for digital silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return 10 * float(np.log10(power)) if power > 0 else -np.inf


def _resampler(from_hz: int, to_hz: int) -> Any:
    return None if from_hz == to_hz else soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32")


def _check_file(path: Path) -> None:
    if not path.exists():
        raise AudioError(path, "no such file")
    if path.is_dir():
        raise AudioError(path, "a folder, not a sound file")
    try:
        if path.stat().st_size == 0:
            raise AudioError(path, "the file is empty (0 bytes)")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise AudioError(path, f"cannot be read ({error.strerror})") from None


def _fallback(path: Path, sample_rate_hz: int, first_error: Exception) -> Iterator[np.ndarray]:
    """Formats that soundfile does not know (m4a, wma, webm) go through librosa, which asks the system's decoders."""
    import librosa  # slow to import, rarely needed

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # librosa announces its own fallback
            samples, _ = librosa.load(str(path), sr=sample_rate_hz, mono=True, dtype=np.float32)
    except Exception:
        raise AudioError(
            path, f"not a sound file that can be decoded ({_plain(first_error)}); convert it to wav or flac"
        ) from None
    if not np.isfinite(samples).all():
        raise AudioError(path, "it contains NaN or infinite samples")
    step = int(_BLOCK_S * sample_rate_hz)
    for start in range(0, len(samples), step):
        yield samples[start : start + step]


def _plain(error: Exception) -> str:
    """soundfile's message without the path that it repeats."""
    text = str(getattr(error, "error_string", "") or error)
    return text.strip().rstrip(".")
