"""What probes stand on: one vector a sound, from a frozen audio encoder and from simple statistics of the sound itself.

Sounds in (float32 mono at 16 kHz, at most 30 s), vectors out. A vector is made of named blocks, and a probe says which it
uses: `layers` (mean and spread of every encoder layer over the frames with sound), `first` (of the first layer only: an
encoder that writes words down forgets the voice from layer to layer), `thirds` (means of every layer over the first,
second and last third: what happens in which order), `spectrum` (log-mel and cepstral statistics), `pitch`
(of the voice). Level is taken out first, so that it cannot become a shortcut, and a constant offset with it.

Each sound is encoded once in a process, however many probes ask: `shared_features` gives every probe of an encoder the
same object, which remembers the last sounds.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from describers.pitch import VOICED, contour
from speech_llm.audio import SAMPLE_RATE_HZ, audio_hash
from speech_llm.model.encoding import check_encoder, encode, frames_of_samples, max_frames, reads_mel

BLOCKS = ("first", "layers", "thirds", "spectrum", "pitch")
# The level (RMS of the frames with sound, dB re full scale) that every sound is brought to.
_LEVEL_DBFS = -23.0
_FRAME = SAMPLE_RATE_HZ // 50
# A frame this far below the loudest one is a pause: the speech intelligibility index counts 30 dB as the range of speech
# (ANSI S3.5); 5 dB more are a choice of ours.
_PAUSE_DB = 35.0
# Whisper hears padding, so only sounds padded to the same length share a batch; that length is the sound's own, rounded up.
_QUANTUM_S = 0.5
_SHORTEST_S = 0.1
_BATCH_S = 32.0
# Sounds whose vectors are remembered: more than the 192 clips that a describe run works on at a time.
_REMEMBERED = 512


class EncoderFeatures:
    """Vectors of sounds by one encoder. `reference`: see `speech_llm.assets.load_encoder`; loaded when first needed."""

    def __init__(self, reference: str, device: str | None = None) -> None:
        self.reference = reference
        self._device = device
        self._loaded: tuple[Any, Any] | None = None
        self._remembered: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()

    def vectors(self, sounds: Sequence[np.ndarray], blocks: Sequence[str]) -> np.ndarray:
        """(sounds, features) float32: the blocks side by side."""
        every = self.every_block(sounds)
        return np.stack([np.concatenate([found[name] for name in blocks]) for found in every])

    def every_block(self, sounds: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Every block of each sound, block -> (features of the block,) float32."""
        keys = [audio_hash(sound) for sound in sounds]
        found = {key: self._remembered[key] for key in keys if key in self._remembered}
        missing = {key: sound for key, sound in zip(keys, sounds, strict=True) if key not in found}
        found.update(zip(missing, self._compute(list(missing.values())), strict=True))
        for key in keys:
            self._remembered[key] = found[key]
            self._remembered.move_to_end(key)
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return [found[key] for key in keys]

    def identity(self) -> dict[str, Any]:
        """What tells this encoder from others: `{"reference", "model_type", "parameters", "mean_weight", "layers"}`."""
        encoder, _ = self._load()
        sizes = [(p.numel(), float(p.detach().double().abs().sum())) for p in encoder.parameters()]
        count = sum(size for size, _ in sizes)
        return {
            "reference": self.reference,
            "model_type": encoder.config.model_type,
            "parameters": count,
            "mean_weight": sum(total for _, total in sizes) / count,
            "layers": _layers(encoder),
        }

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from speech_llm.assets import load_encoder

            encoder, extractor = load_encoder(self.reference)
            check_encoder(encoder, self.reference)
            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = encoder.to(device), extractor
        return self._loaded

    def _compute(self, sounds: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        encoder, _ = self._load()
        least = round(_SHORTEST_S * SAMPLE_RATE_HZ)
        sounds = [levelled(np.pad(sound, (0, max(0, least - len(sound))))) for sound in sounds]
        quantum = round(_QUANTUM_S * SAMPLE_RATE_HZ) if reads_mel(encoder.config) else 1
        groups: dict[int, list[int]] = {}
        for index, sound in enumerate(sounds):
            groups.setdefault(-(-len(sound) // quantum) * quantum, []).append(index)
        out: list[dict[str, np.ndarray]] = [{} for _ in sounds]
        for length, members in sorted(groups.items()):
            size = max(1, int(_BATCH_S * SAMPLE_RATE_HZ / length))
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for index, layers in zip(
                    batch, self._encode([sounds[i] for i in batch], length), strict=True
                ):
                    out[index] = _blocks(sounds[index], layers)
        return out

    @torch.inference_mode()
    def _encode(self, sounds: list[np.ndarray], length: int) -> list[np.ndarray]:
        """The layers (frames, layers, width) of each sound, padded to `length` samples and cut to its own frames."""
        encoder, extractor = self._load()
        padded = [np.pad(sound, (0, length - len(sound))) for sound in sounds]
        # Whisper's extractor would pad to 30 s and wav2vec2's has nothing to pad: all are equally long here.
        settings = {"padding": "do_not_pad", "truncation": False} if reads_mel(encoder.config) else {}
        made = extractor(padded, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", **settings)
        inputs = made[extractor.model_input_names[0]].to(next(encoder.parameters()).device)
        frames = frames_of_samples(encoder.config, length)
        frames = min(frames, max_frames(encoder.config) or frames)
        taps = range(1, _layers(encoder) + 1)
        layers = encode(encoder, inputs, torch.full((len(sounds),), frames), list(taps)).float().cpu().numpy()
        own = [min(frames, frames_of_samples(encoder.config, len(sound))) for sound in sounds]
        return [rows[:count] for rows, count in zip(layers, own, strict=True)]


@functools.lru_cache(maxsize=4)
def shared_features(reference: str) -> EncoderFeatures:
    """The one `EncoderFeatures` of this encoder in this process."""
    return EncoderFeatures(reference)


def levelled(samples: np.ndarray) -> np.ndarray:
    """The sound without its mean, brought to a common level; digital silence stays what it is."""
    samples = samples - samples.mean()
    power = frame_power(samples)
    loud = power[with_sound(power)].mean()
    return np.asarray(samples * np.sqrt(10 ** (_LEVEL_DBFS / 10) / loud) if loud > 0 else samples, np.float32)


def frame_power(samples: np.ndarray) -> np.ndarray:
    """Mean square of each frame of 20 ms, the last one filled with zeros."""
    frames = np.pad(samples, (0, -len(samples) % _FRAME)).reshape(-1, _FRAME)
    return np.asarray(np.square(frames, dtype=np.float64).mean(axis=1))


def with_sound(power: np.ndarray) -> np.ndarray:
    """Which frames are no pauses; always at least one."""
    return np.asarray(power >= power.max() * 10 ** (-_PAUSE_DB / 10))


def _layers(encoder: Any) -> int:
    return len(encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layers)


def _blocks(sound: np.ndarray, layers: np.ndarray) -> dict[str, np.ndarray]:
    active = with_sound(frame_power(sound))
    places = np.flatnonzero(active)
    # Encoders differ by a frame or so in how many they make of a sound.
    heard = np.minimum((places * len(layers)) // len(active), len(layers) - 1)
    kept = layers[np.unique(heard)]
    first, last = int(heard[0]), int(heard[-1]) + 1
    cuts = np.linspace(first, last, 4).round().astype(int)
    # Of a sound of one or two frames some thirds are the same frame.
    starts = np.minimum(cuts[:-1], last - 1)
    thirds = [
        layers[start : max(end, start + 1)].mean(axis=0) for start, end in zip(starts, cuts[1:], strict=True)
    ]
    means, spreads = kept.mean(axis=0), kept.std(axis=0)
    return {
        "first": np.concatenate([means[0], spreads[0]]).astype(np.float32),
        "layers": np.concatenate([means.ravel(), spreads.ravel()]).astype(np.float32),
        "thirds": np.stack(thirds).ravel().astype(np.float32),
        "spectrum": _spectrum(sound, active),
        "pitch": _pitch(sound, active),
    }


@functools.lru_cache(maxsize=1)
def _mel_bank() -> tuple[np.ndarray, np.ndarray]:
    """(mel bins, FFT bins) filters of 40 bands up to 8 kHz, and the cosine transform (cepstra, mel bins)."""
    from librosa.filters import mel
    from scipy.fft import dct

    bank = mel(sr=SAMPLE_RATE_HZ, n_fft=2 * _FRAME, n_mels=40)
    return bank, dct(np.eye(40), axis=0, norm="ortho")[:20]


def _spectrum(sound: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Log-mel means and spreads, and how cepstra vary and change, over the frames with sound; 40 + 40 + 20 + 20 numbers.

    A band more than 60 dB below the loudest one is as good as empty: how empty, only the codec knows.
    """
    bank, cosines = _mel_bank()
    frames = _frames(sound, 2 * _FRAME, len(active)) * np.hanning(2 * _FRAME)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1))) @ bank.T
    mel = np.log10(np.maximum(power, power.max() * 1e-6 + 1e-12))
    mel -= mel.max()
    cepstra = mel @ cosines.T
    steps = np.abs(np.diff(cepstra, axis=0, prepend=cepstra[:1]))
    heard = mel[active]
    parts = [heard.mean(axis=0), heard.std(axis=0), cepstra[active].std(axis=0), steps[active].mean(axis=0)]
    return np.concatenate(parts).astype(np.float32)


def _pitch(sound: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Of the fundamental frequency in octaves re 100 Hz: median, 10 %, 90 % quantiles, spread, mean step from frame to frame;
    then how many frames are voiced for each one with sound, and how surely they are. F0 as in `describers.pitch`.
    """
    hz, confidence = contour(sound)
    voiced = confidence >= VOICED
    if voiced.sum() < 3:
        return np.array([0.8, 0.8, 0.8, 0.0, 0.0, 0.0, confidence.mean()], np.float32)
    octaves = np.log2(hz / 100)
    steps = np.abs(np.diff(octaves))[voiced[1:] & voiced[:-1]]
    low, middle, high = np.quantile(octaves[voiced], [0.1, 0.5, 0.9])
    share = voiced.mean() / active.mean()
    found = [middle, low, high, octaves[voiced].std(), steps.mean() if len(steps) else 0.0]
    return np.array([*found, share, confidence[voiced].mean()], np.float32)


def _frames(sound: np.ndarray, size: int, count: int) -> np.ndarray:
    """(count, size): a frame around each frame of 20 ms."""
    before = (size - _FRAME) // 2
    padded = np.pad(sound, (before, size + _FRAME))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::_FRAME][:count]
