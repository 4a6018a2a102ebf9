"""Frozen audio encoders: which layers they have, how many frames a clip becomes, and what the layers say.

In: the encoder's input (log-mel frames for Whisper, samples for wav2vec2, HuBERT, WavLM). Out: the tapped layers'
outputs `(n, frames, taps, width)`. The encoder runs by its own `forward`; hooks listen at its layers.

A clip's features never depend on the clips beside it: Whisper cannot mask padding and a group-normed wav2vec2 must not
be padded, so clips of unlike length run one after the other unless they are padded to the encoder's native length.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from speech_llm.errors import UserError

# Hooks sit on the shared layers, so two threads must not listen at once.
_LISTENING = threading.Lock()


def reads_mel(config: PretrainedConfig) -> bool:
    """Whether the encoder reads log-mel frames (Whisper) rather than samples (wav2vec2 and its kin)."""
    return config.model_type == "whisper"


def check_encoder(encoder: nn.Module, reference: str = "the encoder") -> None:
    """Raise a `UserError` unless this is an encoder whose layers can be tapped."""
    config: Any = encoder.config
    whisper = reads_mel(config) and hasattr(encoder, "layers") and hasattr(encoder, "embed_positions")
    wave = hasattr(config, "conv_kernel") and hasattr(getattr(encoder, "encoder", None), "layers")
    if not (whisper or wave):
        raise UserError(
            f"{reference} is a {config.model_type} model, whose layers cannot be tapped; "
            "use a Whisper, wav2vec2, HuBERT or WavLM encoder"
        )


def frames_of_samples(config: PretrainedConfig, samples: int, hop: int = 160) -> int:
    """Encoder frames that a clip of `samples` samples has (at least 1); `hop`: samples per log-mel frame."""
    if reads_mel(config):
        return max(1, -(-samples // (2 * hop)))
    frames = samples
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
    return max(1, frames)


def inputs_of_frames(config: PretrainedConfig, frames: int) -> int:
    """Length of encoder input (log-mel frames or samples) that gives exactly so many encoder frames."""
    if reads_mel(config):
        return 2 * frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


def max_frames(config: PretrainedConfig) -> int | None:
    """Most encoder frames at once; None where the encoder has no limit."""
    return int(config.max_source_positions) if reads_mel(config) else None


def encode(
    encoder: nn.Module, inputs: Tensor, frame_counts: Tensor, taps: Sequence[int], padded: bool = False
) -> Tensor:
    """Tapped layers (n, longest clip, taps, width); zeros beyond a clip's frame count.

    `inputs`: (n, mel bins, mel frames) or (n, samples). `taps` counts layers from 1; the last layer includes the encoder's
    final norm. `padded`: Whisper hears 30 s of which the clip is the beginning, as it was pretrained; else the clip alone.
    """
    config: Any = encoder.config
    counts = frame_counts.tolist()
    limit = max_frames(config)
    if limit is not None and max(counts) > limit:
        raise UserError(
            f"a clip has {max(counts)} encoder frames, but the encoder hears at most {limit}; split it first"
        )
    out: Tensor | None = None
    for frames in sorted(set(counts)):
        rows = torch.tensor([i for i, count in enumerate(counts) if count == frames], device=inputs.device)
        if padded and limit is not None:
            # Rows of unlike length share this one run: each is padded to the same native length.
            rows = torch.arange(len(counts), device=inputs.device)
            tapped = _run(encoder, _to_native_length(inputs, 2 * limit), taps)[:, : max(counts)]
        else:
            clip = inputs[rows][..., : inputs_of_frames(config, frames)]
            tapped = _run(_sliced(encoder, frames) if limit is not None else encoder, clip, taps)
        if out is None:
            out = tapped.new_zeros(len(counts), max(counts), *tapped.shape[2:])
        out[rows, : tapped.shape[1]] = tapped
        if len(rows) == len(counts):
            break
    assert out is not None
    keep = torch.arange(out.shape[1], device=out.device)[None] < frame_counts.to(out.device)[:, None]
    return out * keep[:, :, None, None]


def _run(encoder: nn.Module, inputs: Tensor, taps: Sequence[int]) -> Tensor:
    """One run of the encoder's own forward, listening at its layers."""
    stack: Any = encoder if hasattr(encoder, "layers") else encoder.encoder
    heard: dict[int, Tensor] = {}

    def listen(tap: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            heard[tap] = output if isinstance(output, Tensor) else output[0]

        return hook

    last = len(stack.layers)
    with _LISTENING:
        handles = [stack.layers[tap - 1].register_forward_hook(listen(tap)) for tap in taps if tap != last]
        if last in taps:
            handles.append(stack.register_forward_hook(listen(last)))
        try:
            encoder(inputs.to(next(encoder.parameters()).dtype))
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack([heard[tap] for tap in taps], dim=2)


def _sliced(encoder: nn.Module, frames: int) -> nn.Module:
    """The same Whisper encoder with a shorter position table, which is what makes it accept a shorter input.

    A shallow copy that shares every layer: the encoder itself is not changed, not even for the time of the call.
    """
    view: Any = copy.copy(encoder)
    view._modules = dict(encoder._modules)
    view._forward_hooks = copy.copy(encoder._forward_hooks)
    view.config = copy.copy(encoder.config)
    view.config.max_source_positions = frames
    view.max_source_positions = frames
    table: Any = encoder.embed_positions
    view.embed_positions = nn.Embedding.from_pretrained(table.weight[:frames], freeze=True)
    return view


def _to_native_length(mel: Tensor, length: int) -> Tensor:
    """Log-mel frames followed by silence, as Whisper's feature extractor writes it after this clip."""
    if mel.shape[-1] >= length:
        return mel[..., :length]
    silence = silence_level(mel)
    padding = silence[:, None, None].expand(-1, mel.shape[1], length - mel.shape[-1])
    return torch.cat([mel, padding.to(mel.dtype)], dim=-1)


def silence_level(mel: Tensor) -> Tensor:
    """(n,) the value of digital silence in each clip's log-mel frames (n, bins, frames).

    The extractor clips log10 power to within 8 of the clip's maximum, then maps x to (x + 4) / 4; power is floored at 1e-10.
    """
    return (mel.float().amax(dim=(1, 2)) - 2.0).clamp(min=-1.5)


def pad_last(pieces: Sequence[Tensor], length: int, values: Sequence[float]) -> Tensor:
    """Stack tensors (..., l_i) after padding each to `length` with its own value."""
    return torch.stack(
        [
            functional.pad(piece, (0, length - piece.shape[-1]), value=value)
            for piece, value in zip(pieces, values, strict=True)
        ]
    )
