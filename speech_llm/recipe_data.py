"""Sections of a recipe about rows that are read while training, and about encoder features kept on disk."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from speech_llm.recipe_section import Section, Share, Text, contradiction


class CacheSection(Section):
    max_gb: float | None = Field(
        default=None,
        gt=0,
        description="the most that the encoder features of all runs may take on disk, GB: what other runs have not used for longest "
        "makes room, then clips are encoded anew at each use; null = no bound",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="number format of the cached encoder features"
    )


RowColumn = Literal["id", "messages", "text", "context", "audio", "system", "user", "assistant"]


class RowsSource(Section):
    """A place of rows that are ready to be trained on."""

    path: Text | None = Field(
        default=None,
        description="shards of rows: a .jsonl, .parquet, .arrow or .tar (WebDataset) file, a folder of them, or a pattern with *",
    )
    dataset: Text | None = Field(
        default=None, description="a hub dataset, or a folder in the hub's form, that is streamed"
    )
    subset: Text | None = Field(default=None, description="configuration of the dataset")
    split: Text = Field(default="train", description="split of the dataset")
    columns: dict[RowColumn, Text] = Field(
        default_factory=dict,
        description="what is in which column, for rows that are not Examples: {audio: audio, user: question, assistant: answer}",
    )
    share: Share | None = Field(
        default=None,
        description="of a dataset: its share of each step's rows; null = datasets take half of a step together (all, where there are "
        "no other rows)",
    )

    @model_validator(mode="after")
    def _one_place(self) -> RowsSource:
        if (self.path is None) == (self.dataset is None):
            raise contradiction(
                ("path", "dataset"),
                "an item of data.rows names one place: give path (files, read by number) or dataset (streamed)",
            )
        if self.path is not None and self.share is not None:
            raise contradiction(
                ("share",),
                "share is for a dataset that is streamed; rows of a path are gone through once an epoch",
            )
        return self


def check_stream(recipe: Any) -> None:
    """Raise a `contradiction` when a recipe that renders rows as it trains asks for what needs all rows beforehand."""
    data, loss, optimizer = recipe.data, recipe.loss, recipe.optimizer
    if data.rows and not data.stream:
        raise contradiction(
            ("data.rows", "data.stream"),
            "data.rows names rows that are read while training, but data.stream is false; set data.stream to true",
        )
    if not data.stream:
        return
    for wrong, key, why, instead in (
        (
            recipe.style not in ("sft", "pretrain"),
            "style",
            f"style {recipe.style} scores all rows before the first step",
            "take sft or pretrain",
        ),
        (
            getattr(loss, "mask", "none") != "none",
            "loss.mask",
            "the base LLM would have to score all rows before the first step",
            "set it to none",
        ),
        (
            loss.type == "kl" and loss.top_k is not None,
            "loss.top_k",
            "the base LLM would have to score all rows before the first step",
            "set it to null, which asks it at each step",
        ),
        (
            optimizer.soft_word_epochs > 0,
            "optimizer.soft_word_epochs",
            "soft words are tuned on all rows before the first step",
            "set it to 0",
        ),
        (
            optimizer.accumulate > 1,
            "optimizer.accumulate",
            "a step is data.step_rows rows, in as many batches as they need",
            "set it to 1 and data.step_rows higher",
        ),
    ):
        if wrong:
            raise contradiction(
                ("data.stream", key),
                f"data.stream is true, so rows are rendered when their step comes, and {key} does not go with it: {why}; {instead}",
            )
