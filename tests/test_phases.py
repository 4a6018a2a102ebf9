"""Phases: each goes on from the one before, a killed run from where it was, and the matrix tells what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import speech_llm.phases as phases
from speech_llm.errors import UserError
from speech_llm.files import read_json, write_json
from speech_llm.phases import average_score, backward_transfer, mean_score, phases_table
from speech_llm.pipeline import run_stages
from speech_llm.recipe import Recipe, load_recipe, merged
from speech_llm.stages import Stage

TEXT = """\
name: life
data: {synthesize: {train_clips: 8, test_clips: 4}}
describe: {labels: {gender: gender, accent: accent}}
targets: {prompts: pool.yaml}
loss: {type: ce, mask: share}
eval: {attributes: [gender], prompts: pool.yaml}
phases:
  - name: first
    optimizer: {lr: 0.5}
  - name: second
    loss: {type: dpo}
    style: preference
    eval: {attributes: [accent]}
    targets: {prompts_per_clip: 2}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "life.yaml"
    path.write_text(TEXT)
    (tmp_path / "pool.yaml").write_text("prompts: []\n")
    return path


def test_a_phase_is_the_recipe_but_for_its_own_keys(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["seed=3"])
    first, second = recipe.phase_recipes
    assert (first.name, second.name) == ("life-first", "life-second")
    assert (first.optimizer.lr, second.optimizer.lr) == (0.5, 0.001)
    assert (first.loss.type, second.loss.type, second.style) == ("ce", "dpo", "preference")
    assert (second.targets.prompts, second.targets.prompts_per_clip) == ("pool.yaml", 2)
    assert (first.eval.attributes, second.eval.attributes) == (["gender"], ["accent"])
    assert first.seed == second.seed == 3
    assert first.phases == []
    again = recipe_file.with_name("again.yaml")
    again.write_text(recipe.to_yaml())
    assert load_recipe(again).phase_recipes[1].model_dump(exclude={"name"}) == {
        **second.model_dump(exclude={"name"}),
        "targets": {**second.targets.model_dump(), "prompts": str(recipe_file.with_name("pool.yaml"))},
        "eval": {**second.eval.model_dump(), "prompts": str(recipe_file.with_name("pool.yaml"))},
    }


def test_merging_replaces_a_section_of_another_type_whole() -> None:
    values = {"loss": {"type": "ce", "tau": 3}, "a": {"b": 1, "c": {"d": 2}}}
    own = {"loss": {"type": "kl"}, "a": {"c": {"e": 3}}}
    assert merged(values, own) == {"loss": {"type": "kl"}, "a": {"b": 1, "c": {"d": 2, "e": 3}}}
    assert merged(values, {"loss": {"tau": 4}})["loss"] == {"type": "ce", "tau": 4}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr: 0.5", "lr: fast", "line 9: optimizer.lr is 'fast'; expected a number"),
        ("style: preference", "style: rollout", "line 11: loss.type is dpo and style is rollout"),
        (
            "    optimizer:",
            "    optimzer:",
            "line 9: unknown key 'optimzer' in phases[0]. Did you mean 'optimizer'?",
        ),
        ("name: second", "name: first", "line 10: two phases are called 'first'"),
        ("lr: 0.5}", "lr: 0.5}\n    trainable: {lora: {rank: 2}}", "goes on from phase 'first'"),
    ],
)
def test_a_mistake_in_a_phase_is_told_with_its_line(recipe_file: Path, old: str, new: str, said: str) -> None:
    recipe_file.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file)
    assert said in str(caught.value)


class Bench:
    """Stand-in stages that note what ran; `train` notes what it went on from."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail: str | None = None
        names = ("corpus", "describe", "targets", "train", "eval", "report")
        self.stages = tuple(
            Stage(
                name,
                1,
                (lambda r: {"lr": r.optimizer.lr}) if name == "train" else (lambda r: {"seed": r.seed}),
                self._before if name == "train" else lambda r, run: [],
                self._runner(name),
                ("model",) if name == "train" else (),
            )
            for name in names
        )

    @staticmethod
    def _before(recipe: Recipe, _run_dir: Path) -> list[Path]:
        return [] if recipe.start_from is None else [recipe.start_from / "model.json"]

    def _runner(self, name: str) -> Any:
        def run(recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
            told = f"{recipe.phase_name}:{name}"
            if told == self.fail:
                raise KeyboardInterrupt
            self.ran.append(told)
            write_json(run_dir / name / "out.json", told)
            if name == "train":
                before = [] if recipe.start_from is None else read_json(recipe.start_from / "model.json")
                (run_dir / "model").mkdir(exist_ok=True)
                write_json(run_dir / "model" / "model.json", [*before, told])
            return {}

        return run


def test_a_killed_run_goes_on_in_its_phase_and_a_changed_phase_redoes_those_after_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "phases": {
            "names": ["first", "second"],
            "matrix": [[0.9, 0.2], [0.6, 0.8]],
            "backward_transfer": -0.3,
        }
    }
    monkeypatch.setattr(phases, "evaluate_phases", lambda *_: result)
    bench, said = Bench(), []

    def go(*overrides: str) -> list[str]:
        bench.ran = []
        run_stages(
            load_recipe(recipe_file, overrides),
            tmp_path / "run",
            "eval",
            say=said.append,
            stages=bench.stages,
        )
        return bench.ran

    bench.fail = "second:train"
    with pytest.raises(KeyboardInterrupt):
        go()
    # The second phase hears the same clips: they are not made again.
    assert bench.ran == ["first:corpus", "first:describe", "first:targets", "first:train", "second:targets"]
    bench.fail = None
    assert go() == ["second:train"]
    assert read_json(tmp_path / "run" / "model" / "model.json") == ["first:train", "second:train"]
    assert read_json(tmp_path / "run" / "results.json") == result
    assert any("backward transfer -30.0 points" in line for line in said)
    assert go() == []
    recipe_file.write_text(TEXT.replace("lr: 0.5", "lr: 0.25"))
    bench.ran = []
    assert "first:train" in go()


def test_backward_transfer_and_average_are_by_hand() -> None:
    matrix = [[0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.5, 0.9, 0.6]]
    assert backward_transfer(matrix) == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert average_score(matrix) == pytest.approx((0.5 + 0.9 + 0.6) / 3, abs=1e-4)
    assert backward_transfer([[0.5]]) is None
    assert backward_transfer([[None, 0.1], [0.2, 0.3]]) is None
    tasks = {"gender": {"metric": "accuracy", "accuracy": 0.5}, "words": {"metric": "wer", "wer": 0.1}}
    assert mean_score(tasks) == pytest.approx(0.7)
    assert mean_score({}) is None
    table = phases_table(
        {"names": ["a", "b"], "matrix": [[0.9, None], [0.6, 0.8]], "backward_transfer": -0.3}
    )
    assert table.splitlines()[1].split() == ["a", "90.0", "-"]


def test_the_matrix_holds_every_task_after_every_phase(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import speech_llm.evaluation
    import speech_llm.responders
    from eval.tasks import Instance, Task

    def build(phase: Recipe, _folder: Path) -> list[Task]:
        name = phase.eval.attributes[0]
        options = ["a", "b"]
        instances = [
            Instance(str(i), [{"role": "user", "content": f"{name}?"}], options[i], name, "option", options)
            for i in (0, 1)
        ]
        return [Task(name, "test", instances, "option", options)]

    class Parrot:
        """After the first phase it knows gender; after the second accent, and of gender half."""

        def __init__(self, folder: Path) -> None:
            self.second = "2-second" in str(folder)

        def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
            out = []
            for number, chat in enumerate(conversations):
                knows = ("gender" in chat[0]["content"]) != self.second
                out.append("ab"[number] if knows else "a")
            return out

    monkeypatch.setattr(speech_llm.evaluation, "build_tasks", build)
    monkeypatch.setattr(speech_llm.responders, "load_speech_model", lambda folder, *_, **__: Parrot(folder))
    recipe = load_recipe(recipe_file)
    folders = [phases.phase_dir(tmp_path, i, phase) for i, phase in enumerate(recipe.phase_recipes)]
    for folder in folders:
        (folder / "model").mkdir(parents=True)
        write_json(folder / "model" / "training.json", {})
    result = phases.evaluate_phases(recipe.phase_recipes, folders, False)
    assert result["phases"]["matrix"] == [[1.0, 0.5], [0.5, 1.0]]
    assert result["phases"]["backward_transfer"] == -0.5
    assert set(result["models"]["speech_llm"]) == {"first: gender", "second: accent"}
    assert yaml.safe_dump(result)

    # Trained again, the first model's answers are not taken for the new one's, and a task that is gone is not asked.
    (folders[1] / "eval" / "tasks" / "gone.jsonl").write_text("not a task\n")
    (folders[1] / "model" / "model.safetensors").write_bytes(b"new weights")
    monkeypatch.setattr(
        speech_llm.responders, "load_speech_model", lambda folder, *_, **__: Parrot(Path("1-first"))
    )
    result = phases.evaluate_phases(recipe.phase_recipes, folders, False)
    assert result["phases"]["matrix"] == [[1.0, 0.5], [1.0, 0.5]]


def test_a_stage_that_only_a_later_phase_has_is_run_there(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        phases, "evaluate_phases", lambda *_: {"phases": {"names": ["first", "second"], "matrix": [[1], [1]]}}
    )
    monkeypatch.setattr(phases, "phases_table", lambda *_: "")
    bench = Bench()
    mixture = Stage(
        "mixture",
        1,
        lambda r: {"seed": r.seed},
        lambda r, run: [],
        bench._runner("mixture"),
        when=lambda r: r.phase_name == "second",
    )
    stages = (*bench.stages[:3], mixture, *bench.stages[3:])
    run_stages(load_recipe(recipe_file), tmp_path / "run", "train", say=lambda _: None, stages=stages)
    assert "second:mixture" in bench.ran
    assert "first:mixture" not in bench.ran
    assert bench.ran[-1] == "second:train"


def test_paths_of_a_phases_mixture_are_made_absolute_too(recipe_file: Path) -> None:
    (recipe_file.parent / "chat.jsonl").write_text("{}\n")
    mixture = "mixture: {sources: [{type: replay, ratio: 0.05, rows: chat.jsonl}]}\n    trainable: {lora: {rank: 4}}"
    text = TEXT.replace("loss: {type: dpo}\n    style: preference", mixture)
    recipe_file.write_text(text.replace("name: life", "name: life\nmodel: {gate_adapters: false}"))
    again = yaml.safe_load(load_recipe(recipe_file).to_yaml())
    assert again["phases"][1]["mixture"]["sources"][0]["rows"] == str(recipe_file.parent / "chat.jsonl")


def test_a_phase_keeps_the_scale_of_the_adapters_that_it_goes_on_from(recipe_file: Path) -> None:
    text = TEXT.replace("optimizer: {lr: 0.5}", "trainable: {lora: {rank: 4}}")
    second = "trainable: {lora: {rank: 4, alpha: 8}}\n    loss: {type: dpo}"
    recipe_file.write_text(text.replace("loss: {type: dpo}", second))
    load_recipe(recipe_file)  # 8 is what null means
    recipe_file.write_text(text.replace("loss: {type: dpo}", second.replace("alpha: 8", "alpha: 64")))
    with pytest.raises(UserError, match=r"trainable\.lora it must keep"):
        load_recipe(recipe_file)
