"""The section `describe` of a recipe: from sound to text."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from speech_llm.errors import UserError
from speech_llm.recipe_model import EMBEDDED_WHISPER
from speech_llm.recipe_section import Section, Share, Text

# The describers that need no reference; `describers.run.DESCRIBERS`, which is slow to import, says the same.
MEASURED = (
    "duration", "transcript", "labels", "pitch", "volume", "speed", "pauses", "noise", "reverberation",
)  # fmt: skip


class DescribeSection(Section):
    use: list[Text] = Field(
        default=["duration", "transcript", "labels"],
        description="describers, in order; the later wins: duration, transcript, labels, pitch, volume, speed, pauses, noise, "
        "reverberation, gender, age_group, language, "
        "ATTRIBUTE=FILE of fit-describer, ATTRIBUTE=MODEL of audio classification",
    )
    label_maps: dict[str, dict[str, str | None]] = Field(
        default_factory=dict,
        description="attribute -> what the labels of its classifier mean; null for nothing",
    )
    labels: dict[str, Text] = Field(
        default_factory=dict, description="manifest column -> attribute, for 'labels'"
    )
    asr: Text = Field(default=EMBEDDED_WHISPER, description="Whisper model that writes the transcripts")
    form: Literal["sentence", "desta", "key_value"] = Field(
        default="sentence", description="how a description is worded"
    )
    include: list[Text] | None = Field(
        default=None,
        description="attributes that a description tells, in this order (and what a prompt asks for); null = all",
    )
    order: Literal["given", "random"] = Field(
        default="given", description="order of the attributes; random = another one for each clip and prompt"
    )
    dropout: Share = Field(
        default=0.0,
        description="probability of leaving an attribute out of a description, never one that the prompt asks for",
    )
    wording: dict[str, Text] = Field(
        default_factory=dict,
        description='other words for parts of a sentence: {emotion: "and sounds {value}"}; see describers/wording.py',
    )

    def telling(self, dropout: bool = True) -> dict[str, Any]:
        """How descriptions are told, as arguments of `describers.compose.compose`; without dropout for a test."""
        return {
            "use": self.include,
            "drop": self.dropout if dropout else 0.0,
            "shuffle": self.order == "random",
            "wording": self.wording,
        }

    @field_validator("wording")
    @classmethod
    def _can_be_used(cls, wording: dict[str, str]) -> dict[str, str]:
        from describers.wording import check_wording

        try:
            check_wording(wording)
        except UserError as error:
            raise PydanticCustomError("wording", "{sentence}", {"sentence": str(error)}) from None
        return wording

    @field_validator("use")
    @classmethod
    def _known(cls, items: list[str]) -> list[str]:
        from describers.named import check_name

        try:
            for item in items:
                check_name(item, MEASURED)
        except UserError as error:
            raise PydanticCustomError("describer", "{sentence}", {"sentence": str(error)}) from None
        return items
