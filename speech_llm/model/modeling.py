"""The speech LLM: a frozen audio encoder, a trained connector and a text LLM that reads its vectors as words.

    input_features --encode_audio--> features --audio_vectors--> vectors --embed--> inputs_embeds --llm--> logits

In: token ids with placeholders where sounds are, and the sounds (or their cached encoder features). Out: logits, at all
positions or only where asked. The placeholder id lies outside the LLM's vocabulary, so the LLM's tables are never touched
and a conversation without audio goes through the LLM exactly as it would without this class.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from speech_llm.errors import UserError
from speech_llm.files import explain_os_error
from speech_llm.model.configuration import SpeechLLMConfig
from speech_llm.model.connectors import calibrate, make_connector
from speech_llm.model.encoding import check_encoder, encode
from speech_llm.model.frozen import (
    check_llm,
    check_same,
    checkpoint_folder,
    portable_config,
    ready_encoder,
    ready_llm,
)
from speech_llm.model.masks import additive, attention_window, logits_only_at
from speech_llm.model.trainable import PARTS, AdapterGate, add_lora, part_of, set_lora_scale

WEIGHTS_NAME = "model.safetensors"


class SpeechLLMForConditionalGeneration(PreTrainedModel):
    """An LLM that hears. Make one with `build` (fresh connector) or `from_pretrained` (trained)."""

    config_class = SpeechLLMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SpeechLLMConfig, encoder: nn.Module, llm: PreTrainedModel) -> None:
        super().__init__(config)
        check_encoder(encoder, config.encoder or "the encoder")
        check_llm(llm, config.llm or "the LLM")
        self.encoder = encoder.requires_grad_(False).eval()
        self.llm = llm.requires_grad_(False)
        self.connector: Any = make_connector(config)
        calibrate(self.connector, self.llm.get_input_embeddings(), int(config.get_text_config().vocab_size))
        self.gate = AdapterGate(on=not config.gate_adapters)
        # After the connector, so that a seed gives the same connector with and without adapters.
        if config.lora is not None:
            add_lora(self.llm, config.lora, self.gate, config.llm or "the LLM")
        if config.encoder_lora is not None:
            # Only sound goes through the encoder, so there is nothing to gate.
            add_lora(
                self.encoder,
                config.encoder_lora,
                AdapterGate(),
                config.encoder or "the encoder",
                "encoder_lora",
            )
        self._no_split_modules = list(getattr(llm, "_no_split_modules", None) or [])
        # No post_init: it would initialise the ready parts anew.
        self.all_tied_weights_keys: dict[str, str] = {}

    # ---------------------------------------------------------------- making, saving, loading

    @classmethod
    def build(
        cls,
        llm: str | PreTrainedModel,
        encoder: str | nn.Module,
        *,
        llm_reference: str | None = None,
        encoder_reference: str | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> SpeechLLMForConditionalGeneration:
        """A model with a fresh connector, from references or ready modules.

        `settings`: the arguments of `SpeechLLMConfig` (connector, taps, use_transcript, lora, ...). `dtype` is that of the frozen
        parts when they are loaded here; what is trained is float32. A ready module's reference defaults to the place it
        was loaded from.
        """
        llm_module, llm_name = ready_llm(llm, dtype)
        encoder_module, encoder_name = ready_encoder(encoder, dtype)
        config = SpeechLLMConfig(
            llm=llm_reference or llm_name,
            encoder=encoder_reference or encoder_name,
            llm_config=portable_config(llm_module.config),
            encoder_config=portable_config(encoder_module.config),
            **settings,
        )
        return cls(config, encoder_module, llm_module)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *_: Any,
        use_llm: str | PreTrainedModel | None = None,
        use_encoder: str | nn.Module | None = None,
        config: SpeechLLMConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        **_hub: Any,
    ) -> SpeechLLMForConditionalGeneration:
        """Load what was trained from a folder or hub id, and the frozen parts from the references it names.

        `dtype`: of the frozen parts (default float32). `device_map`: the one device to put the model on ("auto": a GPU if any).
        `use_llm`, `use_encoder`: other references or ready modules to use instead. Raises `UserError` when a frozen part is not the
        one that the checkpoint was trained with, or the folder is not a checkpoint.
        """
        path = checkpoint_folder(folder)
        if config is None:
            if not (path / "config.json").exists():
                raise UserError(f"{path}: there is no config.json, so this is not a saved speech LLM")
            config = SpeechLLMConfig.from_pretrained(path)
        if isinstance(dtype, str):
            dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        llm_module, llm_name = ready_llm(
            use_llm if use_llm is not None else config.llm, dtype or torch.float32
        )
        check_same(path, "LLM", config.llm, config.llm_config, llm_name, llm_module.config)
        encoder_module, encoder_name = ready_encoder(
            use_encoder if use_encoder is not None else config.encoder, dtype or torch.float32
        )
        check_same(
            path, "encoder", config.encoder, config.encoder_config, encoder_name, encoder_module.config
        )
        model = cls(config, encoder_module, llm_module)
        weights = path / WEIGHTS_NAME
        try:
            state = safetensors.torch.load_file(weights)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no {WEIGHTS_NAME}; the checkpoint is incomplete") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{weights}: cannot be read ({error}); the checkpoint is damaged") from None
        try:
            model.load_trained(state)
        except ValueError as error:
            raise UserError(f"{weights}: {error}") from None
        if device_map is not None:
            model.to(
                "cuda"
                if device_map == "auto" and torch.cuda.is_available()
                else "cpu"
                if device_map == "auto"
                else device_map
            )
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write `config.json` (with references to the frozen parts) and the trained tensors as safetensors."""
        folder = Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(folder)
            aside = folder / f".{WEIGHTS_NAME}.part"
            state = {
                name: value.detach().cpu().contiguous() for name, value in self.trained_state_dict().items()
            }
            safetensors.torch.save_file(state, aside, metadata={"format": "pt"})
            os.replace(aside, folder / WEIGHTS_NAME)
        except OSError as error:
            raise explain_os_error(error, folder) from error
        except safetensors.SafetensorError as error:
            raise UserError(
                f"{folder}: the weights could not be written ({error}); is the disk full?"
            ) from error

    def trained_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: connector, adapters, and any other parameter that is being trained."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if self._is_trained(name, parameter)
        }

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Load what `trained_state_dict` gave. Anything loaded counts as trained from then on.

        Raises `ValueError` when a tensor is missing, unknown or of another shape.
        """
        parameters = dict(self.named_parameters())
        missing = [name for name in self.trained_state_dict() if name not in state]
        unknown = [name for name in state if name not in parameters]
        if missing or unknown:
            raise ValueError(
                f"the tensors do not fit the model: {len(missing)} missing{_first(missing)}, {len(unknown)} unknown{_first(unknown)}"
            )
        for name, value in state.items():
            if parameters[name].shape != value.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; the model's is {tuple(parameters[name].shape)}"
                )
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
                parameters[name].requires_grad_(True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimiser should move."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def count_parameters(self) -> dict[str, int]:
        """How many parameters each part has, and how many are trained."""
        own = list(self.named_parameters())
        counts = dict.fromkeys(PARTS, 0)
        for name, parameter in own:
            counts[part_of(name)] += parameter.numel()
        return {**counts, "trained": sum(p.numel() for _, p in own if p.requires_grad)}

    @staticmethod
    def _is_trained(name: str, parameter: nn.Parameter) -> bool:
        return parameter.requires_grad or name.startswith("connector.") or "lora_" in name

    # ---------------------------------------------------------------- from sound to embeddings

    def encode_audio(
        self, input_features: Tensor, frame_counts: Tensor, padded: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tapped encoder layers `(n, frames, taps, width)` and frame counts `(n,)` of clips.

        `input_features`: log-mel frames (n, bins, mel frames) or samples (n, samples), as `processor.mel_features` makes them.
        `padded`: whether the encoder hears the clip padded to its native length, or the clip alone (default: the config's).
        """
        if padded is None:
            padded = self.config.encoding == "padded"
        parameter = next(self.encoder.parameters())
        trained = any(p.requires_grad for p in self.encoder.parameters())
        inputs = input_features.to(parameter.device)
        with contextlib.nullcontext() if trained else torch.no_grad():
            features = encode(self.encoder, inputs, frame_counts, self.config.taps, padded)
        return features, frame_counts.to(features.device)

    def audio_vectors(self, features: Tensor, frame_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `(total, llm_width)` of all clips one after the other, and how many each clip has `(n,)`."""
        vectors, counts = self.connector(features, frame_counts.to(features.device))
        keep = torch.arange(vectors.shape[1], device=vectors.device)[None] < counts[:, None]
        return vectors[keep], counts

    def embed(self, input_ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Embeddings (b, l, llm_width): the LLM's own, with `vectors` at the placeholders in order.

        Raises `ValueError` naming both numbers when there are more or fewer placeholders than vectors.
        """
        holes = input_ids == self.config.audio_token_id
        places, given = int(holes.sum()), 0 if vectors is None else len(vectors)
        if places != given:
            raise ValueError(
                f"the tokens hold {places} audio placeholders, but there are {given} audio vectors; "
                "render the conversation with the frame counts of these clips"
            )
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(holes, 0))
        if vectors is None or not given:
            return embeds
        return embeds.masked_scatter(holes[:, :, None], vectors.to(embeds.dtype))

    # ---------------------------------------------------------------- adapters

    @property
    def text_path_is_base(self) -> bool:
        """Whether conversations without audio are answered by the base LLM, whatever is trained."""
        return self.llm_is_base and (self.config.lora is None or self.config.gate_adapters)

    @property
    def llm_is_base(self) -> bool:
        """Whether the LLM without its adapters is the one that it was built on: its own weights are not trained."""
        return not any(p.requires_grad for name, p in self.llm.named_parameters() if "lora_" not in name)

    def adapters_for(self, has_audio: bool | Tensor) -> contextlib.AbstractContextManager[None]:
        """For calls of `model.llm`: adapters as they are for rows with (True) or without audio, or row by row (rows,).

        Outside of it, `model.llm` answers as for rows without audio. Ungated adapters act always.
        """
        return self.gate.set(has_audio if self.config.gate_adapters else True)

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        """For calls of `model.llm` as the base LLM (the teacher), gated or not."""
        return self.gate.set(False)

    def set_lora_scale(self, factor: float) -> None:
        """Scale the adapters' part by `factor` (1 as trained, 0 the base LLM); for evaluation."""
        if self.config.lora is None:
            raise UserError("this model has no LoRA adapters to scale")
        set_lora_scale(self.llm, factor)

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        input_features: Tensor | None = None,
        features: Tensor | None = None,
        frame_counts: Tensor | None = None,
        answer_mask: Tensor | None = None,
        labels: Tensor | None = None,
        has_audio: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (b, l, vocabulary), or (n, vocabulary) at the n positions that `answer_mask` selects.

        Give `input_ids` with placeholders and the sounds as `features` (from `encode_audio`, cached or not) or `input_features`,
        each with `frame_counts`; or ready `inputs_embeds`. `attention_mask` is (b, past + l), 1 where a token is, or
        (b, 1, l, past + l), bool (True: may look) or additive. `answer_mask` (b, l) bool: positions to get logits for; no
        others are computed. `labels` (b, l), -100 where nothing is learned, gives the mean cross-entropy and logits at the
        positions that predict. `has_audio` (b,) bool: rows whose adapters act; needed only with gated adapters when the
        ids do not show it (`inputs_embeds`, or a key/value cache).
        """
        if input_features is not None:
            if frame_counts is None:
                raise ValueError("input_features need frame_counts")
            features, frame_counts = self.encode_audio(input_features, frame_counts)
        rows = self._rows_with_audio(input_ids, past_key_values) if has_audio is None else has_audio
        if features is not None and inputs_embeds is None:
            if frame_counts is None or input_ids is None:
                raise ValueError("features need frame_counts and input_ids")
            inputs_embeds = self.embed(input_ids, self.audio_vectors(features, frame_counts)[0])
        elif (
            inputs_embeds is None
            and input_ids is not None
            and bool((input_ids == self.config.audio_token_id).any())
        ):
            inputs_embeds = self.embed(input_ids)  # raises, with both numbers
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        if labels is not None and answer_mask is None:
            answer_mask = torch.zeros_like(labels, dtype=torch.bool)
            answer_mask[:, :-1] = labels[:, 1:] != -100
        if position_ids is None:
            position_ids = _positions(attention_mask, tokens.shape[1])
        dtype = self.llm.get_input_embeddings().weight.dtype
        with self.adapters_for(rows), logits_only_at(self.llm, answer_mask):
            output = self.llm(
                input_ids=input_ids if inputs_embeds is None else None,
                inputs_embeds=inputs_embeds,
                attention_mask=self._additive(attention_mask, dtype),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        logits = output.logits if answer_mask is None else output.logits.squeeze(0)
        loss = None
        if labels is not None:
            assert answer_mask is not None
            wanted = functional.pad(labels[:, 1:], (0, 1), value=-100)[answer_mask]
            loss = functional.cross_entropy(logits.float(), wanted)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        features: Tensor | None = None,
        frame_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids of the answers (b, new tokens); `kwargs` as in `GenerationMixin.generate`. Pad `input_ids` on the left."""
        if input_features is not None and frame_counts is not None:
            features, frame_counts = self.encode_audio(input_features, frame_counts)
        vectors = None
        if features is not None and frame_counts is not None:
            vectors, _ = self.audio_vectors(features, frame_counts)
        has_audio = (input_ids == self.config.audio_token_id).any(dim=1)
        embeds = self.embed(input_ids, vectors)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self.adapters_for(has_audio):
            return self.llm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def _rows_with_audio(self, input_ids: Tensor | None, past_key_values: Any) -> bool | Tensor:
        """Which rows have audio, from their ids; a `ValueError` where that cannot be known and matters."""
        gated = self.config.lora is not None and self.config.gate_adapters
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if gated and (input_ids is None or past):
            raise ValueError(
                "has_audio must be given: the adapters are gated, and these inputs do not show which rows have audio"
            )
        if not gated or input_ids is None:
            return True
        rows = (input_ids == self.config.audio_token_id).any(dim=1)
        return rows if bool(rows.any()) else False

    def _additive(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A four-dimensional bool mask as numbers to add, which every attention implementation understands."""
        if mask is None or mask.dim() != 4:
            return mask
        window = attention_window(self.config.get_text_config())
        if window is not None and mask.shape[-1] > window:
            raise ValueError(
                f"a mask over {mask.shape[-1]} keys cannot be given to an LLM whose layers see only the last {window}"
            )
        return additive(mask, dtype) if mask.dtype == torch.bool else mask

    # ---------------------------------------------------------------- transformers conventions

    def train(self, mode: bool = True) -> SpeechLLMForConditionalGeneration:
        """Training mode for connector, LLM and adapters; the encoder's own layers never drop or mask anything."""
        super().train(mode)
        self.encoder.eval()
        for name, module in self.encoder.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the LLM's layers in the backward pass instead of keeping their activations."""
        settings = {
            "use_reentrant": False,
            "context_fn": self.gate.checkpoint_contexts,
            **(gradient_checkpointing_kwargs or {}),
        }
        if hasattr(self.llm, "activation_checkpointing_enable"):
            self.llm.activation_checkpointing_enable(settings, **kwargs)
        else:
            self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        raise UserError(
            "the LLM's tables are never resized: the audio placeholder lies outside its vocabulary"
        )


def _positions(mask: Tensor | None, length: int) -> Tensor | None:
    """Each row's own positions, from a two-dimensional mask with padding in it; None where the LLM's default is right."""
    if mask is None or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return ((mask != 0).cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
