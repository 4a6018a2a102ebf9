"""What a speech LLM is made of: references to its frozen parts, the connector's settings, the adapters' settings.

In: keyword arguments or a `config.json`. Out: `SpeechLLMConfig`. It never touches the network: the frozen parts are
named by reference, and their own configs are kept inside, so that shapes and placeholder counts are known without them.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from speech_llm.errors import UserError, nearest

# Every connector setting with its default; the second table says which of them a connector type reads.
CONNECTOR_DEFAULTS: dict[str, Any] = {
    "type": "qformer",
    "queries": 8,  # qformer: vectors per clip
    "layers": 2,  # qformer: blocks of self-attention, cross-attention and feed-forward
    "heads": 4,  # qformer: attention heads
    "stack": 8,  # stack: encoder frames per vector
    "width": None,  # qformer: block width (default: the encoder's); stack: hidden width (default: the LLM's)
    "ffn": None,  # qformer: feed-forward width (default: twice the block width)
    "dropout": 0.0,
    "normalize": True,  # bring each tapped layer to zero mean and unit variance per frame before use
}
CONNECTOR_KEYS: dict[str, tuple[str, ...]] = {
    "qformer": ("type", "queries", "layers", "heads", "width", "ffn", "dropout", "normalize"),
    "stack": ("type", "stack", "width", "dropout", "normalize"),
}
LORA_DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": None, "dropout": 0.0, "target_modules": None}
ENCODINGS = ("own_length", "padded")


def complete_connector(settings: dict[str, Any] | None) -> dict[str, Any]:
    """Connector settings with defaults filled in; those of the other type are left out.

    Raises `UserError` for an unknown type or setting, or a value that cannot be.
    """
    settings = dict(settings or {})
    for key in settings:
        if key not in CONNECTOR_DEFAULTS:
            raise UserError(f"connector has no setting {key!r}.{nearest(key, list(CONNECTOR_DEFAULTS))}")
    kind = settings.get("type", CONNECTOR_DEFAULTS["type"])
    if kind not in CONNECTOR_KEYS:
        raise UserError(f"connector.type is {kind!r}; choose one of {', '.join(CONNECTOR_KEYS)}")
    full = {key: settings.get(key, CONNECTOR_DEFAULTS[key]) for key in CONNECTOR_KEYS[kind]}
    for key in ("queries", "layers", "heads", "stack"):
        if key in full and (not isinstance(full[key], int) or full[key] < 1):
            raise UserError(f"connector.{key} is {full[key]!r}; it must be a whole number of at least 1")
    return full


def complete_lora(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """LoRA settings with defaults filled in (alpha: twice the rank); None stays None."""
    if settings is None:
        return None
    for key in settings:
        if key not in LORA_DEFAULTS:
            raise UserError(f"lora has no setting {key!r}.{nearest(key, list(LORA_DEFAULTS))}")
    full = {**LORA_DEFAULTS, **settings}
    if not isinstance(full["rank"], int) or full["rank"] < 1:
        raise UserError(f"lora.rank is {full['rank']!r}; it must be a whole number of at least 1")
    if full["alpha"] is None:
        full["alpha"] = 2 * full["rank"]
    return full


def vectors_per_clip(connector: dict[str, Any], frame_count: int) -> int:
    """How many vectors the connector makes of a clip of `frame_count` encoder frames."""
    if connector["type"] == "qformer":
        return int(connector["queries"])
    return -(-int(frame_count) // int(connector["stack"]))


def fingerprint(config: PretrainedConfig) -> dict[str, Any]:
    """What must agree for trained tensors to fit a frozen part: kind, width, depth and vocabulary."""
    text = config.get_text_config()
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocab_size": getattr(text, "vocab_size", None),
    }


def _nested(config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig | None:
    if isinstance(config, dict):
        settings = dict(config)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config


class SpeechLLMConfig(PretrainedConfig):
    r"""Configuration of a `SpeechLLMForConditionalGeneration`.

    Args:
        encoder (`str`): reference of the frozen audio encoder (`pypi:PACKAGE==VERSION`, hub id or local folder).
        llm (`str`): reference of the text LLM.
        encoder_config (`PretrainedConfig` or `dict`, *optional*): the encoder's own config.
        llm_config (`PretrainedConfig` or `dict`, *optional*): the LLM's own config.
        connector (`dict`, *optional*): see `CONNECTOR_DEFAULTS`.
        taps (`list[int]`, *optional*): encoder layers whose outputs the connector reads, counted from 1.
            Defaults to every layer for `qformer` and the last for `stack`.
        use_transcript (`bool`, *optional*, defaults to `False`): the transcript's tokens follow the audio vectors.
        encoding (`str`, *optional*, defaults to `"own_length"`): what the encoder was fed in training, `"padded"` (to its
            native 30 s, as it was pretrained) or `"own_length"` (the clip alone, cheaper).
        lora (`dict`, *optional*): adapters in the LLM, see `LORA_DEFAULTS`.
        encoder_lora (`dict`, *optional*): adapters in the encoder, likewise; they always act.
        gate_adapters (`bool`, *optional*, defaults to `True`): adapters act only on conversations with audio.
        audio_token_id (`int`, *optional*): the placeholder; the first id outside the LLM's vocabulary.
        max_audio_s (`float`, *optional*, defaults to 30.0): longest clip that the encoder hears at once.
    """

    model_type = "speech_llm"

    def __init__(
        self,
        encoder: str = "",
        llm: str = "",
        encoder_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        connector: dict[str, Any] | None = None,
        taps: list[int] | None = None,
        use_transcript: bool = False,
        encoding: str = "own_length",
        lora: dict[str, Any] | None = None,
        encoder_lora: dict[str, Any] | None = None,
        gate_adapters: bool = True,
        audio_token_id: int | None = None,
        max_audio_s: float = 30.0,
        **kwargs: Any,
    ) -> None:
        self.encoder, self.llm = encoder, llm
        self.encoder_config, self.llm_config = _nested(encoder_config), _nested(llm_config)
        self.connector = complete_connector(connector)
        self.lora, self.encoder_lora = complete_lora(lora), complete_lora(encoder_lora)
        self.use_transcript, self.gate_adapters = use_transcript, gate_adapters
        if encoding not in ENCODINGS:
            raise UserError(f"encoding is {encoding!r}; choose one of {', '.join(ENCODINGS)}")
        self.encoding = encoding
        self.taps = self._check_taps(taps)
        if audio_token_id is None and self.llm_config is not None:
            audio_token_id = int(self.llm_config.get_text_config().vocab_size)
        self.audio_token_id = audio_token_id
        self.max_audio_s = max_audio_s
        super().__init__(**kwargs)

    def _check_taps(self, taps: list[int] | None) -> list[int] | None:
        if self.encoder_config is None:
            return taps
        layers = int(self.encoder_config.num_hidden_layers)
        if not taps:
            return [layers] if self.connector["type"] == "stack" else list(range(1, layers + 1))
        wrong = [tap for tap in taps if not 1 <= tap <= layers]
        if wrong:
            raise UserError(
                f"taps names encoder layer {wrong[0]}, but {self.encoder or 'the encoder'} has layers 1 to {layers}"
            )
        return sorted(set(taps))

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The LLM's text config (the one with a vocabulary)."""
        return self if self.llm_config is None else self.llm_config.get_text_config()

    @property
    def encoder_width(self) -> int:
        return int(self.encoder_config.hidden_size)  # type: ignore[union-attr]

    @property
    def llm_width(self) -> int:
        return int(self.get_text_config().hidden_size)
