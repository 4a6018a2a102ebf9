"""Sections of a recipe about its clips, about rows that are read while training, and about encoder features kept on disk."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from speech_llm.recipe_section import NotNegative, Positive, Section, Share, Text, contradiction


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


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if not isinstance(value, (str, int, float, bool)):
        raise PydanticCustomError(
            "plain", "expected a text, a number, true or false", {"expected": "a plain value"}
        )
    return value


# A column's value, or several of which any will do.
Wanted = Annotated[
    Any,
    BeforeValidator(lambda value: [_plain(v) for v in value] if isinstance(value, list) else _plain(value)),
]


class Synthesize(Section):
    corpus: Literal["quickstart"] = Field(default="quickstart", description="which corpus to synthesise")
    train_clips: Positive = Field(default=1240, description="clips to learn from")
    test_clips: Positive = Field(default=240, description="clips of other voices and sentences to test on")
    natural_clips: NotNegative = Field(default=60, description="clips of natural voices to test on; 0 = none")


class DataSection(Section):
    synthesize: Synthesize | None = Field(default=None, description="make the clips here (then no manifests)")
    manifests: Annotated[list[Text], BeforeValidator(_one_or_more)] | None = Field(
        default=None, description="JSONL manifests of recordings with labels (then no synthesize)"
    )
    train: dict[str, Wanted] | None = Field(
        default=None, description="columns and values of a training line: {split: train}"
    )
    test: dict[str, Wanted] | None = Field(
        default=None, description="columns and values of a test line: {split: dev}"
    )
    require: Annotated[list[Text], BeforeValidator(_one_or_more)] = Field(
        default_factory=list, description="a line that lacks one of these columns is left out and counted"
    )
    limit: Positive | None = Field(
        default=None, description="at most so many clips per split, for a first look"
    )
    max_duration_s: float = Field(
        default=30.0, gt=0, le=30, description="longer clips are left out and counted, seconds"
    )
    stream: bool = Field(
        default=False,
        description="render rows when their step comes: training begins at once and memory stays flat however many they are",
    )
    rows: list[RowsSource] = Field(
        default_factory=list,
        description="rows that are trained on as they are, beside the targets' and the mixture's; needs stream",
    )
    step_rows: Positive = Field(default=64, description="rows of an optimiser step, with stream")

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.synthesize is not None and self.manifests is not None:
            raise contradiction(
                ("data.manifests", "data.synthesize"),
                "data.synthesize and data.manifests are both given; keep one "
                "(on the command line: --set data.synthesize=null)",
            )
        if self.synthesize is None and not self.manifests:
            raise contradiction(
                ("data.synthesize", "data.manifests"),
                "neither data.synthesize nor data.manifests is given; name manifests "
                "(--set data.manifests=[my/metadata.jsonl]) or synthesise a corpus",
            )
        if self.manifests and (not self.train or not self.test):
            missing = "train" if not self.train else "test"
            raise contradiction(
                ("data.manifests",),
                f"data.manifests needs data.train and data.test to tell the splits apart, and data.{missing} is missing; "
                "for example train: {split: train} and test: {split: dev}",
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
            recipe.style == "rollout",
            "style",
            "what judges an answer must know every value that an attribute takes in all rows",
            "take sft, pretrain or preference",
        ),
        (
            getattr(loss, "mask", "none") != "none",
            "loss.mask",
            "which tokens are hard, and so what a step weighs, the base LLM would have to say of all rows before the first step",
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
