"""The recipe: one YAML file that says everything about a run, checked strictly.

A recipe is a point in five dimensions (`targets`, `mixture`, `loss`, `trainable`, `style`) plus `model`, `data`,
`describe`, `optimizer` and `eval`. An unknown key is an error that names the nearest known one; only values that are
implemented are accepted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PrivateAttr, StringConstraints, ValidationError, model_validator

from speech_llm.errors import UserError, nearest
from speech_llm.recipe_data import CacheSection, DataSection, check_stream
from speech_llm.recipe_describe import DescribeSection
from speech_llm.recipe_errors import sentence
from speech_llm.recipe_eval import EvalSection
from speech_llm.recipe_file import Source, read_recipe_file
from speech_llm.recipe_learning import (
    CrossEntropy,
    LossSection,
    OptimizerSection,
    Style,
    TrainableSection,
    check_learning,
)
from speech_llm.recipe_mixture import MixtureSection
from speech_llm.recipe_model import ModelSection
from speech_llm.recipe_section import NotNegative, Section, contradiction
from speech_llm.recipe_targets import OF_LABELS, TargetsSection


class Phase(Section):
    """What one phase does otherwise than the rest of the recipe: the same sections, only the keys that differ."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="names the phase, its folder and its tasks"
    )
    data: dict[str, Any] | None = Field(default=None, description="where its clips come from")
    describe: dict[str, Any] | None = Field(default=None, description="from sound to text")
    targets: dict[str, Any] | None = Field(default=None, description="who writes its answers")
    mixture: dict[str, Any] | None = Field(default=None, description="what is mixed in")
    loss: dict[str, Any] | None = Field(default=None, description="how an answer is learned")
    trainable: dict[str, Any] | None = Field(default=None, description="which parameters move")
    style: Style | None = Field(default=None, description="where completions come from")
    optimizer: dict[str, Any] | None = Field(default=None, description="how it is optimised")
    eval: dict[str, Any] | None = Field(default=None, description="its tasks, tested after every phase")


class Recipe(Section):
    """One run. `path` is the file it came from; paths inside it are relative to that file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="names the run; the default folder is runs/<name>"
    )
    seed: NotNegative = Field(default=0, description="the same seed gives the same run")
    model: ModelSection = Field(default_factory=ModelSection, description="encoder, connector, LLM")
    data: DataSection = Field(description="where the clips come from")
    cache: CacheSection = Field(default_factory=CacheSection, description="encoder features kept on disk")
    describe: DescribeSection = Field(default_factory=DescribeSection, description="from sound to text")
    targets: TargetsSection = Field(description="who writes the answers")
    mixture: MixtureSection = Field(
        default_factory=MixtureSection, description="what is mixed in; {} = audio only"
    )
    loss: Annotated[LossSection, Field(discriminator="type")] = Field(
        default_factory=CrossEntropy, description="how an answer is learned"
    )
    trainable: TrainableSection = Field(default_factory=TrainableSection, description="which parameters move")
    style: Style = Field(
        default="sft",
        description="where completions come from: sft = the targets, pretrain = plain text and transcripts, "
        "preference = pairs of a right and a wrong answer, rollout = the model itself, rewarded",
    )
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="how it is optimised")
    eval: EvalSection = Field(description="what is tested")
    phases: list[Phase] = Field(
        default_factory=list,
        description="trained one after another, each as the rest of the recipe says but for the keys that it gives; "
        "every phase's tasks are tested after every phase; [] = one training",
    )

    _path: Path = PrivateAttr(default_factory=Path)
    _phase_recipes: list[Recipe] = PrivateAttr(default_factory=list)
    _phase_name: str | None = PrivateAttr(default=None)
    # A trained model that this training goes on from: the phase before it.
    _start_from: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def phase_recipes(self) -> list[Recipe]:
        """A whole recipe for each of `phases`."""
        return self._phase_recipes

    @property
    def phase_name(self) -> str | None:
        """What the phase that this recipe is of is called; None of a recipe of its own."""
        return self._phase_name

    @property
    def start_from(self) -> Path | None:
        """The trained model that training goes on from: that of the phase before."""
        return self._start_from

    @start_from.setter
    def start_from(self, folder: Path) -> None:
        self._start_from = folder

    @model_validator(mode="before")
    @classmethod
    def _default_loss(cls, values: Any) -> Any:
        loss = values.get("loss") if isinstance(values, dict) else None
        if isinstance(loss, dict) and "type" not in loss:
            return {**values, "loss": {"type": "ce", **loss}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        attributes = self.attributes()
        for key, names in (
            ("eval.attributes", self.eval.attributes),
            ("eval.json_probe.attributes", self.eval.json_probe.attributes),
        ):
            for name in names:
                if attributes and name not in attributes:
                    raise contradiction(
                        (key, "describe.labels"),
                        f"{key} has {name!r}, which describe.labels does not give (it gives: {', '.join(attributes)})."
                        + nearest(name, attributes),
                    )
        if (
            self.model.use_transcript
            and "transcript" not in self.describe.use
            and "transcript" not in attributes
        ):
            raise contradiction(
                ("model.use_transcript", "describe.use"),
                "model.use_transcript is true, but describe.use has no 'transcript'; add it or set model.use_transcript to false",
            )
        self._targets_consistent(attributes)
        if self.mixture.sources and self.trainable.lora is None and not self.trainable.llm:
            raise contradiction(
                ("mixture.sources", "trainable.lora"),
                "mixture.sources mixes rows without sound in, but trainable.lora is null: the LLM is frozen, so nothing "
                "that is trained sees these rows (and nothing is forgotten); set mixture to {} or give trainable.lora",
            )
        if self.mixture.sources and self.trainable.lora is not None and self.model.gate_adapters:
            raise contradiction(
                ("mixture.sources", "model.gate_adapters"),
                "mixture.sources mixes rows without sound in, but model.gate_adapters is true: the adapters act only where "
                "there is sound, so these rows teach nothing; set model.gate_adapters to false or mixture to {}",
            )
        if not self.eval.json_probe.attributes:
            self.eval.json_probe.attributes = list(self.eval.attributes)
        check_learning(self)
        check_stream(self)
        return self

    def _targets_consistent(self, attributes: list[str]) -> None:
        strategy, teacher = self.targets.strategy, self.targets.teacher
        if strategy in OF_LABELS and "labels" not in self.describe.use:
            raise contradiction(
                ("targets.strategy", "describe.use"),
                f"targets.strategy is {strategy!r}, which starts from people's labels, but describe.use has no 'labels'; "
                "add it or take the strategy self",
            )
        if self.targets.tasks is not None and strategy not in OF_LABELS:
            raise contradiction(
                ("targets.tasks", "targets.strategy"),
                f"targets.tasks is {self.targets.tasks!r}, whose answers are labels by construction, but targets.strategy is "
                f"{strategy!r}, which asks for none; take one of {', '.join(OF_LABELS)}",
            )
        if self.targets.tasks is not None and self.data.synthesize is None:
            raise contradiction(
                ("targets.tasks", "data.synthesize"),
                f"targets.tasks is {self.targets.tasks!r}, which knows how each clip was made, but data.synthesize is null, so "
                "they are recordings; leave targets.tasks out",
            )
        if strategy == "continuation" and "transcript" not in (*self.describe.use, *attributes):
            raise contradiction(
                ("targets.strategy", "describe.use"),
                "targets.strategy is 'continuation', which goes on with what is said, but describe.use has no 'transcript'; add it",
            )
        if strategy == "teacher" and teacher is not None and teacher.model == self.model.llm:
            raise contradiction(
                ("targets.teacher.model", "model.llm"),
                f"targets.teacher.model and model.llm are both {self.model.llm!r}, so the base LLM would be its own teacher; "
                "name another LLM, or take the strategy self",
            )

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

    def row_paths(self, source: dict[str, Any]) -> dict[str, Path]:
        """Files and folders that one item of `data.rows` names, by key; a hub dataset's name is none."""
        named = {key: self.resolve_path(source[key]) for key in ROW_PATH_KEYS if source.get(key)}
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
        probe = values["eval"]["json_probe"]
        if probe["attributes"] == values["eval"]["attributes"]:
            probe["attributes"] = []  # which says the same, and of every phase its own
        values["phases"] = [self._phase_values(phase) for phase in self.phases]
        for item in values["data"]["rows"]:
            item.update({key: str(path.resolve()) for key, path in self.row_paths(item).items()})
        for item in values["mixture"]["sources"]:
            item.update({key: str(path.resolve()) for key, path in self.mixture_paths(item).items()})
        head = f"# {command}\n" if command else ""
        return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)

    def _phase_values(self, phase: Phase) -> dict[str, Any]:
        """The keys that a phase gives, paths made absolute."""
        values = phase.model_dump(mode="json", exclude_none=True)
        for section, key in PATH_KEYS:
            given = (values.get(section) or {}).get(key)
            if isinstance(given, list):
                values[section][key] = [str(self.resolve_path(item).resolve()) for item in given]
            elif given is not None:
                values[section][key] = str(self.resolve_path(given).resolve())
        for item in (values.get("data") or {}).get("rows") or []:
            item.update({key: str(path.resolve()) for key, path in self.row_paths(item).items()})
        for item in (values.get("mixture") or {}).get("sources") or []:
            item.update({key: str(path.resolve()) for key, path in self.mixture_paths(item).items()})
        return values


# Keys that hold paths: relative to the recipe in the file, to where you stand in `--set` (where that exists).
PATH_KEYS = (("data", "manifests"), ("targets", "prompts"), ("eval", "prompts"))
MIXTURE_PATH_KEYS = ("rows", "demonstrations", "dataset")
ROW_PATH_KEYS = ("path", "dataset")
# The same of lists: section, list, keys of its items.
ITEM_PATH_KEYS = (("mixture", "sources", MIXTURE_PATH_KEYS), ("data", "rows", ROW_PATH_KEYS))


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
    for section, key, names in ITEM_PATH_KEYS:
        if any(given[:1] == (section,) and given[1:2] in ((), (key,)) for given, _ in source.overrides):
            part = data.get(section)
            for item in (part.get(key) if isinstance(part, dict) else None) or []:
                for name in names if isinstance(item, dict) else ():
                    # What is no folder here is the name of a hub dataset.
                    if name in item and (name != "dataset" or Path(str(item[name])).expanduser().is_dir()):
                        item[name] = _from_here(item[name], path)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(sentence(error, source, Recipe)) from None
    recipe._path = path
    recipe._phase_recipes = _phase_recipes(recipe, data, source)
    return recipe


def _phase_recipes(recipe: Recipe, data: dict[str, Any], source: Source) -> list[Recipe]:
    """The whole recipe of each phase: the file's keys with the phase's own over them."""
    out: list[Recipe] = []
    shared = {key: value for key, value in data.items() if key != "phases"}
    names = [phase.name for phase in recipe.phases]
    for number, phase in enumerate(recipe.phases):
        where = source.within(("phases", number))
        if names.index(phase.name) < number:
            raise UserError(f"{where.where(('name',))}: two phases are called {phase.name!r}")
        own = phase.model_dump(exclude_none=True)
        # A null in a phase's section is a value ("synthesize: null"), a null section is none.
        own |= {key: data["phases"][number][key] for key in own}
        values = {**merged(shared, own), "name": f"{recipe.name}-{phase.name}"}
        try:
            made = Recipe.model_validate(values)
        except ValidationError as error:
            raise UserError(sentence(error, where, Recipe)) from None
        made._path, made._phase_name = recipe._path, phase.name
        if out:
            check_goes_on(out[-1], made, where)
        out.append(made)
    return out


def merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `own` over them, section by section; one of another `type` replaces the whole section."""
    out = dict(values)
    for key, value in own.items():
        before = out.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            same = value.get("type", before.get("type")) == before.get("type")
            value = merged(before, value) if same else value
        out[key] = value
    return out


def _adapters(lora: Any) -> tuple[Any, ...]:
    """What makes adapters the same: their size, their place and their scale."""
    return lora.rank, lora.alpha or 2 * lora.rank, lora.target_modules


def check_goes_on(before: Recipe, after: Recipe, source: Source) -> None:
    """Raise `UserError` when a phase cannot go on from the model of the phase before it."""
    for key in ("lora", "encoder_lora", "llm"):
        had, has = getattr(before.trainable, key), getattr(after.trainable, key)
        same = has == had if key == "llm" or had is None or has is None else _adapters(has) == _adapters(had)
        if had and not same:
            raise UserError(
                f"{source.where(('trainable', key))}: phase {after.phase_name!r} goes on from phase {before.phase_name!r}, whose "
                f"trainable.{key} it must keep, as what was trained would be lost"
            )


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
