"""A recipe is checked strictly, and every mistake is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from describers.compose import FORMS
from describers.run import DEFAULT_ASR, DESCRIBERS
from speech_llm.errors import UserError
from speech_llm.recipe import PATH_KEYS, Recipe, load_recipe
from speech_llm.recipe_describe import MEASURED, DescribeSection
from speech_llm.recipe_errors import describe_keys
from speech_llm.recipe_learning import Lora
from speech_llm.recipe_model import EMBEDDED_WHISPER, QFormer, Stack

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TEXT = """\
# a comment
name: small
data:
  synthesize: {train_clips: 8, test_clips: 4}
describe:
  labels: {gender: gender}
targets:
  prompts: pool.yaml
  attempts: 2
optimizer:
  lr: 1e-3
eval:
  attributes: [gender]
  prompts: pool.yaml
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def error(path: Path, *overrides: str, text: str | None = None) -> str:
    """The sentence that loading the recipe gives."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid_and_has_its_prompt_pools(path: Path) -> None:
    overrides = ["data.manifests=[x.jsonl]"] if "manifests" in path.read_text() else []
    recipe = load_recipe(path, overrides)
    assert recipe.name == path.stem
    for pool in (recipe.targets.prompts, recipe.eval.prompts):
        assert recipe.resolve_path(pool).is_file()


def test_defaults_are_filled_in_and_numbers_read_as_people_write_them(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.optimizer.lr == 0.001  # PyYAML alone would read 1e-3 as a text
    assert recipe.model.connector.type == "qformer"
    assert recipe.eval.json_probe.attributes == ["gender"]
    assert recipe.resolve_path("pool.yaml") == recipe_file.parent / "pool.yaml"


def test_unknown_key_is_told_with_line_and_nearest_name(recipe_file: Path) -> None:
    said = error(recipe_file, text=TEXT.replace("optimizer:", "optimzer:"))
    assert said == f"{recipe_file}, line 10: unknown key 'optimzer'. Did you mean 'optimizer'?"
    said = error(recipe_file, text=TEXT.replace("attempts", "atempts"))
    assert said == f"{recipe_file}, line 9: unknown key 'atempts' in targets. Did you mean 'attempts'?"


def test_unknown_key_without_a_near_one_lists_those_known(recipe_file: Path) -> None:
    assert "Known: rank, alpha, dropout, target_modules." in error(recipe_file, "trainable.lora.zzz=1")


def test_wrong_values_are_told_with_line_key_and_what_is_expected(recipe_file: Path) -> None:
    where = f"{recipe_file}, line 9: targets.attempts is"
    assert (
        error(recipe_file, text=TEXT.replace("attempts: 2", "attempts: two"))
        == f"{where} 'two'; expected a whole number"
    )
    assert (
        error(recipe_file, text=TEXT.replace("attempts: 2", "attempts: 0"))
        == f"{where} 0; expected at least 1"
    )
    assert "expected a whole number" in error(recipe_file, text=TEXT.replace("attempts: 2", "attempts: true"))
    assert "line 11: optimizer.lr is 'fast'; expected a number" in error(
        recipe_file, text=TEXT.replace("1e-3", "fast")
    )
    assert "expected a section" in error(recipe_file, text=TEXT + "model: 3\n")
    assert "eval.attributes[1] is 3" in error(recipe_file, text=TEXT.replace("[gender]", "[gender, 3]"))


def test_missing_key_is_told_with_its_section(recipe_file: Path) -> None:
    said = error(recipe_file, text=TEXT.replace("  prompts: pool.yaml\n  attempts", "  attempts"))
    assert said.startswith(f"{recipe_file}, line 7: the key 'targets.prompts' is missing (prompt pool")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["targets.samples=4"], ["targets.samples is 4", "targets.strategy is 'self'"]),
        (
            ["targets.strategy=self_output", "targets.temperature=0.0"],
            ["targets.temperature is 0", "targets.samples would be the same answer"],
        ),
        (["targets.strategy=teacher"], ["targets.strategy is 'teacher'", "targets.teacher names no model"]),
        (
            ["targets.strategy=teacher", "targets.teacher={backend: transformers}"],
            ["targets.strategy is 'teacher'", "targets.teacher names no model"],
        ),
        (
            ["targets.strategy=teacher", "targets.teacher.model=x/y", "model.llm=x/y"],
            ["targets.teacher.model and model.llm are both 'x/y'"],
        ),
        (["targets.teacher.model=x/y"], ["targets.teacher.model is 'x/y'", "targets.strategy is 'self'"]),
        (
            ["targets.strategy=given", "targets.teacher={backend: vllm}"],
            ["targets.teacher is given", "targets.strategy is 'given'"],
        ),
        (
            ["targets.strategy=rewrite", "describe.use=[transcript]", "describe.labels={}", "eval.attributes=[]"],
            ["targets.strategy is 'rewrite'", "describe.use has no 'labels'"],
        ),
        (
            ["targets.strategy=continuation", "describe.use=[labels]", "model.use_transcript=false"],
            ["targets.strategy is 'continuation'", "describe.use has no 'transcript'"],
        ),
        (["targets.teacher.backend=openai"], ["backend is 'openai'", "targets.teacher.url is missing"]),
        (["targets.teacher.url=http://x"], ["targets.teacher.url is given", "backend is 'transformers'"]),
    ],
)  # fmt: skip
def test_targets_that_contradict_each_other_name_both_keys_and_why(
    recipe_file: Path, overrides: list[str], keys: list[str]
) -> None:
    said = error(recipe_file, *overrides)
    assert all(key in said for key in keys), said


def test_strategies_that_fit_together_are_accepted(recipe_file: Path) -> None:
    server = "targets.teacher={backend: openai, url: 'http://127.0.0.1:8000/v1'}"
    for overrides in (
        ["targets.strategy=self_output", "targets.samples=4"],
        ["targets.strategy=self_output", "targets.samples=1", "targets.temperature=0.0"],
        ["targets.strategy=minimum_change", "targets.teacher.model=x/y"],
        ["targets.strategy=teacher", "targets.teacher.model=x/y", server.replace("}", ", model: z}")],
        [server],
    ):
        again = load_recipe(recipe_file, overrides)
        assert again.targets.drawn_samples == (again.targets.samples or 1)


def test_values_that_are_not_implemented_list_those_that_are(recipe_file: Path) -> None:
    assert "unknown key 'replay' in mixture. Known: sources, count." in error(
        recipe_file, "mixture.replay=0.05"
    )
    assert "trainable.encoder is not implemented yet" in error(recipe_file, "trainable.encoder=true")


def test_connector_keys_belong_to_the_connector_s_type(recipe_file: Path) -> None:
    assert (
        load_recipe(recipe_file, ["model.connector={type: stack, stack: 4}"]).model.connector.type == "stack"
    )
    said = error(recipe_file, text=TEXT + "model:\n  connector:\n    type: stack\n    queries: 3\n")
    assert (
        said
        == f"{recipe_file}, line 18: unknown key 'queries' in model.connector. Known: type, stack, width, dropout, normalize."
    )
    assert "Did you mean 'qformer'?" in error(
        recipe_file, text=TEXT + "model: {connector: {type: qfromer}}\n"
    )


def test_set_overrides_the_file_and_makes_sections_that_were_null(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["seed=7", "trainable.lora.rank=4", "eval.attributes=[]", "optimizer.max_steps=2"]
    )
    assert (recipe.seed, recipe.optimizer.max_steps, recipe.eval.attributes) == (7, 2, [])
    assert recipe.trainable.lora is not None
    assert recipe.trainable.lora.rank == 4


def test_set_errors_name_the_argument(recipe_file: Path) -> None:
    assert (
        error(recipe_file, "optimizer.lr=abc")
        == "--set optimizer.lr=abc: optimizer.lr is 'abc'; expected a number"
    )
    assert error(recipe_file, "optimzer.lr=1").startswith(
        "--set optimzer.lr=1: unknown key 'optimzer'. Did you"
    )
    assert error(recipe_file, "lr").startswith("--set lr: expected KEY=VALUE")
    assert error(recipe_file, "name.x=1").startswith(
        "--set name.x=1: name is 'small', which has no keys inside"
    )
    assert "is not a YAML value" in error(recipe_file, "seed=[1")


def test_contradictions_name_both_keys(recipe_file: Path) -> None:
    both = error(recipe_file, "data.manifests=[m.jsonl]")
    assert "data.synthesize and data.manifests are both given" in both
    neither = error(recipe_file, text=TEXT.replace("synthesize: {train_clips: 8, test_clips: 4}", "limit: 5"))
    assert "neither data.synthesize nor data.manifests is given" in neither
    splits = error(recipe_file, "data.synthesize=null", "data.manifests=[m.jsonl]")
    assert "data.train" in splits
    assert "data.test" in splits
    untrained = error(recipe_file, "trainable.connector=false")
    assert "trainable.connector" in untrained
    assert "trainable.lora" in untrained
    words = error(recipe_file, "describe.use=[duration, labels]", text=TEXT)
    assert "model.use_transcript" in words
    assert "describe.use" in words
    said = error(recipe_file, text=TEXT.replace("attributes: [gender]", "attributes: [gendr]"))
    assert said.startswith(
        f"{recipe_file}, line 13: eval.attributes has 'gendr', which describe.labels does not give"
    )


def test_a_loss_has_the_keys_of_its_type(recipe_file: Path) -> None:
    loss = load_recipe(recipe_file, ["loss={mask: threshold}"]).loss
    assert (loss.type, loss.mask, loss.tau) == ("ce", "threshold", 2.5)  # type: ignore[union-attr]
    loss = load_recipe(recipe_file, ["loss={type: kl, kl: 0.5, ce: 0.5}"]).loss
    assert (loss.kl, loss.ce, loss.top_k) == (0.5, 0.5, 64)  # type: ignore[union-attr]
    assert "unknown key 'beta' in loss" in error(recipe_file, "loss.beta=0.1")
    assert "loss.type is 'dop'; expected one of ce, kl, dpo, grpo. Did you mean 'dpo'?" in error(
        recipe_file, "loss.type=dop"
    )
    assert load_recipe(recipe_file, ["loss.type=dpo", "style=preference"]).style == "preference"
    assert load_recipe(recipe_file, ["loss.type=grpo", "style=rollout"]).style == "rollout"


@pytest.mark.parametrize(
    ("overrides", "keys", "why"),
    [
        (["style=rollout"], ("loss.type", "style"), "samples itself"),
        (["loss.type=kl", "style=pretrain"], ("loss.type", "style"), "without a description"),
        (["loss.type=dpo"], ("loss.type", "style"), "it is learned by loss.type ce or kl"),
        (["loss.mask=share", "style=pretrain"], ("loss.mask", "style"), "neither description"),
        (["loss={type: kl, kl: 0.0}"], ("loss.kl", "loss.type"), "its weight, is 0"),
        (
            ["loss={type: grpo, answer_reward: 0.0, format_reward: 0.0}", "style=rollout"],
            ("loss.answer_reward", "loss.format_reward"),
            "no answer is better",
        ),
        (["trainable.llm=true"], ("trainable.llm", "model.gate_adapters"), "cannot switch off"),
        (["trainable.llm=true", "trainable.lora.rank=2"], ("trainable.llm", "trainable.lora"), "keep one"),
        (
            ["trainable.llm=true", "model.gate_adapters=false", "optimizer.soft_word_epochs=2"],
            ("optimizer.soft_word_epochs", "trainable.llm"),
            "frozen LLM",
        ),
        (
            ["loss.type=dpo", "style=preference", "optimizer.soft_word_epochs=2"],
            ("optimizer.soft_word_epochs", "style"),
            "tuned on answers",
        ),
        (["optimizer.part_lr.lora=1e-4"], ("optimizer.part_lr.lora", "trainable.lora"), "does not train"),
        (["eval.lora_scales=[0.5]"], ("eval.lora_scales", "trainable.lora"), "there are none"),
    ],
)
def test_learning_that_contradicts_itself_names_two_keys_and_why(
    recipe_file: Path, overrides: list[str], keys: tuple[str, str], why: str
) -> None:
    said = error(recipe_file, *overrides)
    assert all(key in said for key in keys)
    assert why in said


def test_broken_yaml_and_double_keys_are_told_with_their_line(recipe_file: Path) -> None:
    assert f"{recipe_file}, line 5: this is not YAML" in error(
        recipe_file, text=TEXT.replace("test_clips: 4}", "test_clips: 4")
    )
    assert error(recipe_file, text=TEXT + "name: again\n").endswith(
        "line 15: the key 'name' was already given on line 2"
    )
    assert "a recipe is YAML with keys" in error(recipe_file, text="")
    assert "a recipe is YAML with keys" in error(recipe_file, text="- a\n")
    assert "no such recipe (in " in error(recipe_file.with_name("smal.yaml"))


def test_paths_in_set_start_where_the_person_stands(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "m.jsonl").write_text("")
    (recipe_file.parent / "pool.yaml").write_text("")
    monkeypatch.chdir(here)
    splits = ["data.synthesize=null", "data.train={split: train}", "data.test={split: dev}"]
    recipe = load_recipe(recipe_file, [*splits, "data.manifests=[m.jsonl]", "targets.prompts=pool.yaml"])
    assert recipe.data.manifests == [str(here / "m.jsonl")]
    assert recipe.resolve_path(recipe.targets.prompts) == recipe_file.parent / "pool.yaml"
    one = load_recipe(recipe_file, [*splits, "data.manifests=m.jsonl"])
    assert one.data.manifests == [str(here / "m.jsonl")]


def test_resolved_recipe_means_the_same_anywhere(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["seed=3"])
    moved = tmp_path / "run" / "recipe.yaml"
    moved.parent.mkdir()
    moved.write_text(recipe.to_yaml("speech-llm run small.yaml"))
    assert moved.read_text().startswith("# speech-llm run small.yaml\n")
    again = load_recipe(moved)
    assert again.seed == 3
    assert again.resolve_path(again.targets.prompts) == recipe_file.parent / "pool.yaml"
    assert {k: v for k, v in again.model_dump().items() if k not in ("targets", "eval")} == {
        k: v for k, v in recipe.model_dump().items() if k not in ("targets", "eval")
    }


def test_every_key_is_described() -> None:
    keys = list(describe_keys(Recipe))
    assert not [name for name, _, meaning in keys if not meaning]
    assert ("optimizer.accumulate", "1", "batches per optimiser step") in keys
    assert {".".join(pair) for pair in PATH_KEYS} <= {name for name, _, _ in keys}


def test_schema_agrees_with_the_describers() -> None:
    schema = DescribeSection.model_json_schema()["properties"]
    assert MEASURED == DESCRIBERS
    assert set(schema["form"]["enum"]) == set(FORMS)
    assert EMBEDDED_WHISPER == DEFAULT_ASR
    assert yaml.safe_load(load_recipe(RECIPES[0]).to_yaml())["describe"]["asr"] == DEFAULT_ASR


def test_schema_agrees_with_the_model() -> None:
    from speech_llm.model.configuration import CONNECTOR_DEFAULTS, CONNECTOR_KEYS, LORA_DEFAULTS

    for connector in (QFormer(), Stack(type="stack")):
        expected = {key: CONNECTOR_DEFAULTS[key] for key in CONNECTOR_KEYS[connector.type]}
        assert connector.model_dump() == {**expected, "type": connector.type}
    assert Lora().model_dump() == LORA_DEFAULTS
