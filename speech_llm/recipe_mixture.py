"""The section of a recipe that says what is mixed in against forgetting: `mixture`, a list of sources of text rows.

In: keys of a recipe. Out: checked sections, one class for each type of source, with its paper.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from speech_llm.recipe_section import NotNegative, Positive, Section, Share, Text, contradiction


def _share(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise PydanticCustomError(
            "share", "a share of the audio Examples, over 0 and at most 1 (0.05 is 5 %)"
        )
    return float(value)


Ratio = Annotated[float, BeforeValidator(_share)]
Column = Literal["messages", "system", "user", "assistant"]


class _TextRows(Section):
    """Rows of text that are there already: a file of ours, a hub dataset, or what the package brings."""

    rows: Text | None = Field(
        default=None, description="JSONL file of rows, relative to the recipe file; null = the package's own"
    )
    dataset: Text | None = Field(
        default=None, description="hub dataset (OWNER/NAME) or a folder in its form, read as a stream"
    )
    subset: Text | None = Field(default=None, description="which configuration of the dataset")
    split: Text = Field(default="train", description="which split of the dataset")
    columns: dict[Column, Text] = Field(
        default_factory=dict,
        description="what a row's columns hold: {messages: COLUMN}, or {user: COLUMN, assistant: COLUMN}; "
        "{} = as they are called",
    )
    repeat: bool = Field(
        default=False, description="go through the rows again where there are too few, instead of refusing"
    )

    @model_validator(mode="after")
    def _one_place(self) -> _TextRows:
        if self.rows is not None and self.dataset is not None:
            raise contradiction(
                ("mixture.sources",),
                "rows and dataset are both given for one source of the mixture; keep one",
            )
        if self.columns and "messages" not in self.columns and not {"user", "assistant"} <= set(self.columns):
            raise contradiction(
                ("mixture.sources",),
                "columns of a source of the mixture must name messages, or both user and assistant",
            )
        return self


class Replay(_TextRows):
    """Experience replay (LAMOL's --real_sample, 2505.17496): real text rows."""

    type: Literal["replay"] = Field(description="real text rows")
    ratio: Ratio = Field(default=0.05, description="share, relative to the audio Examples")


class Safety(_TextRows):
    """Safety replay (2309.07875): refusals, and look-alikes that are answered, so that not everything is refused."""

    type: Literal["safety"] = Field(description="harmful requests refused, harmless look-alikes answered")
    ratio: Ratio = Field(default=0.03, description="share, relative to the audio Examples")
    look_alikes: Share = Field(default=0.5, description="share of harmless look-alikes among these rows")


class _WrittenRows(Section):
    """Rows that the base LLM writes before training."""

    ratio: Ratio = Field(default=0.05, description="share, relative to the audio Examples")
    temperature: float = Field(default=1.0, gt=0, description="sampling temperature of the user's turn")
    max_new_tokens: Positive = Field(default=96, description="longest turn of the user, tokens")
    max_answer_tokens: Positive = Field(
        default=384, description="longest answer, tokens; one that does not end by then is dropped"
    )
    batch_tokens: Positive = Field(default=16384, description="tokens generated side by side")


class PseudoReplay(_WrittenRows):
    """LAMOL's pseudo replay (1909.03329): whole conversations sampled from where they begin."""

    type: Literal["pseudo_replay"] = Field(
        description="conversations sampled by the LLM before it is trained"
    )
    top_k: NotNegative = Field(default=20, description="sample among the k likeliest tokens; 0 = all")
    starts: list[Text] = Field(
        default_factory=list,
        description="texts that a user's turn begins with, as many rows from each (LAMOL's task tokens); "
        "[] = from `begin` alone",
    )
    begin: Literal["chat", "bos"] = Field(
        default="chat",
        description="where a conversation begins: after what the chat template puts before a user's turn, or at the "
        "beginning-of-sequence token, for LLMs that have learned whole conversations",
    )


class Magpie(_WrittenRows):
    """Magpie (2406.08464): the user's turn sampled after the chat template's opening, then answered greedily."""

    type: Literal["magpie"] = Field(description="a user's turn sampled from the chat template, then answered")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus of the sampling")


class SelfSynthesized(_WrittenRows):
    """Self-synthesized rehearsal (2403.01244): requests written after two demonstrations, then answered."""

    type: Literal["self_synthesized"] = Field(description="requests written after two demonstrations")
    top_p: float = Field(default=0.95, gt=0, le=1, description="nucleus of the sampling")
    demonstrations: Text | None = Field(
        default=None,
        description="JSONL file of rows to show, relative to the recipe file; null = the package's",
    )
    clusters: Positive = Field(
        default=20, description="groups of alike requests, from which rows are taken in turn"
    )
    oversample: float = Field(
        default=2.0,
        ge=1,
        description="rows written for each row kept: those nearest to a group's middle stay",
    )


class MixtureSection(Section):
    """What is mixed in against forgetting; nothing (audio only) unless `sources` names it."""

    sources: list[
        Annotated[Replay | Safety | PseudoReplay | Magpie | SelfSynthesized, Field(discriminator="type")]
    ] = Field(default_factory=list, description="rows mixed in: a list of {type: ..., ratio: ...}")
    count: Literal["rows", "tokens"] = Field(
        default="rows", description="what a ratio counts: Examples, or the tokens that are learned"
    )
