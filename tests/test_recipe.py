"""A recipe is checked strictly, and every mistake is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from describers.compose import FORMS
from describers.run import DEFAULT_ASR, DESCRIBERS
from speech_llm.errors import UserError
from speech_llm.recipe import (
    EMBEDDED_WHISPER,
    MEASURED,
    PATH_KEYS,
    DescribeSection,
    Lora,
    QFormer,
    Recipe,
    Stack,
    load_recipe,
)
from speech_llm.recipe_errors import describe_keys

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


def test_values_that_are_not_implemented_list_those_that_are(recipe_file: Path) -> None:
    said = error(recipe_file, "targets.strategy=continuation")
    assert said.endswith(
        "targets.strategy is 'continuation', which is not implemented yet; implemented: self"
    )
    assert "implemented: ce" in error(recipe_file, "loss.type=kl")
    assert "implemented: sft" in error(recipe_file, "style=rollout")
    assert "unknown key 'replay' in mixture. Known: sources, count." in error(
        recipe_file, "mixture.replay=0.05"
    )
    assert "trainable.encoder_lora is not implemented yet" in error(
        recipe_file, "trainable.encoder_lora={rank: 4}"
    )


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
