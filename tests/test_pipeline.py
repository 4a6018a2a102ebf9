"""A run's stages: finished ones are skipped, interrupted ones continue, changed ones start over."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from speech_llm.errors import UserError
from speech_llm.files import write_jsonl
from speech_llm.pipeline import run_stages
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.stages import STAGE_NAMES, STAGES, Stage

TEXT = """\
name: small
data: {synthesize: {train_clips: 8, test_clips: 4}}
describe: {labels: {gender: gender}}
targets: {prompts: pool.yaml, attempts: 2}
eval: {attributes: [gender], prompts: pool.yaml}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    (tmp_path / "pool.yaml").write_text("prompts: []\n")
    return path


class Bench:
    """Three stand-in stages that count how often they run: words -> upper -> joined."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.ran: list[str] = []
        self.said: list[str] = []
        self.fail: str | None = None
        self.error: BaseException = UserError("it broke")
        self.stages = (
            Stage("words", 1, lambda r: {"attempts": r.targets.attempts}, lambda r, run: [], self._words),
            Stage(
                "upper",
                1,
                lambda r: {"seed": r.seed},
                lambda r, run: [run / "words" / "out.txt"],
                self._upper,
            ),
            Stage(
                "joined",
                1,
                lambda r: {"lr": r.optimizer.lr},
                lambda r, run: [run / "upper" / "out.txt", r.resolve_path(r.targets.prompts)],
                self._joined,
                ("final.txt",),
            ),
        )

    def _step(self, name: str, text: str) -> dict[str, Any]:
        self.ran.append(name)
        folder = self.run_dir / name
        half = folder / "half.txt"
        done = half.read_text() if half.exists() else ""
        half.write_text(done + "x")
        if self.fail == name:
            raise self.error
        (folder / "out.txt").write_text(text)
        half.unlink()
        return {"continued": len(done)}

    def _words(self, recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
        return self._step("words", "a" * min(recipe.targets.attempts, 3))

    def _upper(self, recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
        return self._step("upper", (run_dir / "words" / "out.txt").read_text().upper())

    def _joined(self, recipe: Recipe, run_dir: Path, progress: bool) -> dict[str, Any]:
        (run_dir / "final.txt").write_text("done")
        return self._step("joined", "done")

    def run(self, recipe_file: Path, *overrides: str, until: str = "joined") -> list[str]:
        """Run; returns the stages that were not skipped."""
        self.ran, self.said = [], []
        run_stages(
            load_recipe(recipe_file, overrides),
            self.run_dir,
            until,
            say=self.said.append,
            stages=self.stages,
            command="speech-llm run small.yaml",
        )
        return self.ran

    def manifest(self, stage: str) -> Any:
        return json.loads((self.run_dir / stage / "manifest.json").read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "runs" / "small")


def test_finished_stages_are_skipped_with_one_line_each(bench: Bench, recipe_file: Path) -> None:
    assert bench.run(recipe_file) == ["words", "upper", "joined"]
    assert bench.run(recipe_file) == []
    assert len(bench.said) == 3
    assert all("already done" in line and "skipped" in line for line in bench.said)


def test_manifest_says_what_went_in_and_out_and_how_long_it_took(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    manifest = bench.manifest("joined")
    assert set(manifest) == {
        "stage", "version", "key", "recipe", "inputs", "outputs", "versions", "seconds", "counts", "finished",
    }  # fmt: skip
    assert manifest["recipe"] == {"lr": 0.001}
    assert list(manifest["inputs"]) == ["upper/out.txt", str(recipe_file.parent / "pool.yaml")]
    assert list(manifest["outputs"]) == ["joined/out.txt"]
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])
    assert load_recipe(bench.run_dir / "recipe.yaml").targets.attempts == 2


def test_only_what_depends_on_a_changed_recipe_part_runs_again(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    assert bench.run(recipe_file, "optimizer.lr=0.1") == ["joined"]
    assert bench.run(recipe_file, "optimizer.lr=0.1", "seed=3") == ["upper"]  # its output stays the same
    assert bench.run(recipe_file, "optimizer.lr=0.1", "seed=3", "targets.attempts=1") == [
        "words",
        "upper",
        "joined",
    ]
    assert bench.run(recipe_file, "optimizer.lr=0.1", "seed=3", "targets.attempts=1", "name=other") == []


def test_upstream_that_runs_again_with_the_same_result_spares_the_rest(
    bench: Bench, recipe_file: Path
) -> None:
    bench.run(recipe_file, "targets.attempts=3")
    assert bench.run(recipe_file, "targets.attempts=4") == ["words"]


def test_changed_input_file_or_edited_output_runs_what_reads_it(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    (recipe_file.parent / "pool.yaml").write_text("prompts: [1]\n")
    assert bench.run(recipe_file) == ["joined"]
    (bench.run_dir / "words" / "out.txt").write_text("edited by hand")
    assert bench.run(recipe_file) == ["upper", "joined"]


def test_new_stage_version_or_missing_output_runs_again(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    (bench.run_dir / "final.txt").unlink()
    assert bench.run(recipe_file) == ["joined"]
    first = bench.stages[0]
    bench.stages = (Stage("words", 2, first.part, first.inputs, first.run), *bench.stages[1:])
    assert bench.run(recipe_file) == ["words"]


def test_failing_stage_leaves_no_manifest_and_continues_next_time(bench: Bench, recipe_file: Path) -> None:
    bench.fail = "upper"
    with pytest.raises(UserError, match="it broke"):
        bench.run(recipe_file)
    assert not (bench.run_dir / "upper" / "manifest.json").exists()
    assert not (bench.run_dir / "joined").exists()
    bench.fail = None
    assert bench.run(recipe_file) == ["upper", "joined"]
    assert bench.manifest("upper")["counts"] == {"continued": 1}
    assert any("continues where it was interrupted" in line for line in bench.said)


def test_interrupted_stage_starts_over_when_its_recipe_part_changed(bench: Bench, recipe_file: Path) -> None:
    bench.fail, bench.error = "upper", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.run(recipe_file)
    bench.fail = None
    bench.run(recipe_file, "seed=9")
    assert bench.manifest("upper")["counts"] == {"continued": 0}
    assert any("starts over" in line for line in bench.said)


def test_failing_stage_does_not_keep_the_manifest_of_an_earlier_success(
    bench: Bench, recipe_file: Path
) -> None:
    bench.run(recipe_file)
    bench.fail = "upper"
    with pytest.raises(UserError):
        bench.run(recipe_file, "seed=9")
    assert not (bench.run_dir / "upper" / "manifest.json").exists()
    bench.fail = None
    assert bench.run(recipe_file) == [
        "upper"
    ]  # back to the old seed: made again, since the old output is gone
    assert bench.manifest("upper")["counts"] == {"continued": 0}


def test_until_stops_after_that_stage(bench: Bench, recipe_file: Path) -> None:
    assert bench.run(recipe_file, until="upper") == ["words", "upper"]
    assert bench.run(recipe_file) == ["joined"]


def test_damaged_manifest_is_made_again(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    (bench.run_dir / "words" / "manifest.json").write_text("{")
    assert bench.run(recipe_file) == ["words"]


def test_run_folder_can_be_moved(bench: Bench, recipe_file: Path) -> None:
    bench.run(recipe_file)
    bench.run_dir = bench.run_dir.rename(bench.run_dir.with_name("moved"))
    assert bench.run(recipe_file) == []


def test_folder_with_somebody_s_files_is_left_alone(bench: Bench, recipe_file: Path) -> None:
    for name in ("words", "final.txt", "recipe.yaml"):
        bench.run_dir = recipe_file.parent / f"theirs-{name}"
        theirs = bench.run_dir / name
        theirs.parent.mkdir()
        theirs.write_text("precious")
        with pytest.raises(UserError, match="was not made by a run"):
            bench.run(recipe_file)
        assert theirs.read_text() == "precious"


def test_full_disk_is_a_sentence(bench: Bench, recipe_file: Path) -> None:
    bench.fail, bench.error = "words", OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        UserError, match=r"words: the disk is full; free some space and run the same command again"
    ):
        bench.run(recipe_file)
    assert not (bench.run_dir / "words" / "manifest.json").exists()


def _hold(run_dir: Path, ready: Any, release: Any) -> None:
    from speech_llm.pipeline import _locked

    with _locked(run_dir):
        ready.set()
        release.wait(30)


def test_two_runs_do_not_work_in_one_folder(bench: Bench, recipe_file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(bench.run_dir, ready, release))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="another process is at work"):
            bench.run(recipe_file)
    finally:
        release.set()
        other.join()
    assert bench.run(recipe_file) == ["words", "upper", "joined"]


# The real stages: what each depends on, and the corpus stage.


def changed(recipe_file: Path, override: str) -> list[str]:
    """The stages whose recipe part a `--set` changes."""
    before, after = load_recipe(recipe_file), load_recipe(recipe_file, [override])
    return [stage.name for stage in STAGES if stage.when(after) and stage.part(before) != stage.part(after)]


def test_each_recipe_key_belongs_to_the_stages_that_read_it(recipe_file: Path) -> None:
    assert [stage.name for stage in STAGES] == list(STAGE_NAMES)
    assert changed(recipe_file, "data.limit=3") == ["corpus"]
    assert changed(recipe_file, "describe.asr=x/y") == ["describe"]
    assert changed(recipe_file, "targets.attempts=5") == ["targets"]
    assert changed(recipe_file, "targets.strategy=given") == ["targets"]
    assert changed(recipe_file, "targets.teacher={backend: openai, url: http://x}") == ["targets"]
    assert changed(recipe_file, "optimizer.lr=0.5") == ["train"]
    assert changed(recipe_file, "optimizer.checkpoint_every=7") == []
    assert changed(recipe_file, "model.connector.queries=4") == ["train"]
    assert changed(recipe_file, "eval.limit=5") == ["eval"]
    assert changed(recipe_file, "model.llm=x/y") == ["targets", "train", "eval"]
    assert changed(recipe_file, "seed=5") == ["corpus", "targets", "train", "eval"]


def test_a_server_may_move_and_be_asked_otherwise_without_losing_what_it_answered(recipe_file: Path) -> None:
    stage = next(stage for stage in STAGES if stage.name == "targets")
    one, other = (
        load_recipe(
            recipe_file, [f"targets.teacher={{backend: openai, url: {url}, concurrency: {at_a_time}}}"]
        )
        for url, at_a_time in (("http://a/v1", 1), ("http://b/v1", 9))
    )
    assert stage.part(one) == stage.part(other)
    assert stage.part(one) != stage.part(load_recipe(recipe_file))


def test_files_that_happen_to_lie_where_the_command_is_typed_are_no_input(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(recipe_file)
    for stage in STAGES:
        inputs = {path.absolute() for path in stage.inputs(recipe, tmp_path / "run")}
        assert tmp_path / "here" / "notes.txt" not in inputs, stage.name


def test_targets_depend_on_the_manifest_where_people_answer(recipe_file: Path, tmp_path: Path) -> None:
    stage = next(stage for stage in STAGES if stage.name == "targets")
    for strategy, depends in (("self", False), ("rewrite", True)):
        inputs = stage.inputs(load_recipe(recipe_file, [f"targets.strategy={strategy}"]), tmp_path)
        assert (tmp_path / "corpus" / "train.jsonl" in inputs) is depends


@pytest.fixture
def manifests(tmp_path: Path) -> list[Path]:
    import numpy as np
    import soundfile

    out = []
    for number, name in enumerate(("a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        for sound in ("short.wav", "other.wav"):
            soundfile.write(folder / sound, np.zeros(1600, dtype=np.float32), 16000)
        soundfile.write(folder / "long.wav", np.zeros(40 * 1000, dtype=np.float32), 1000)
        rows = [
            {
                "id": f"c{i}",
                "audio": "short.wav" if i < 6 else "other.wav",
                "split": "train" if i < 6 else "dev",
                "gender": "female",
                "n": i,
            }
            for i in range(9)
        ]
        rows += [{"id": "long", "audio": "long.wav", "split": "train", "gender": "male"}]
        rows += [{"id": "other", "audio": "short.wav", "split": "spare", "gender": "male"}]
        write_jsonl(folder / "metadata.jsonl", rows)
        if number == 0:
            with open(folder / "metadata.jsonl", "a") as handle:
                handle.write('not json\n{"id": "x", "split": "train", "gender": "male"}\n')
                handle.write('{"id": "y", "audio": "short.wav", "split": "train"}\n')
                handle.write('{"id": "c0", "audio": "short.wav", "split": "train", "gender": "male"}\n')
        out.append(folder / "metadata.jsonl")
    return out


def picked(recipe_file: Path, run_dir: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    from speech_llm.corpus import build_corpus

    base = [
        "data.synthesize=null",
        "data.train={split: train}",
        "data.test={split: [dev, test]}",
        "data.require=[gender]",
    ]
    counts = build_corpus(load_recipe(recipe_file, [*base, *overrides]), run_dir)
    tables = {
        name: [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test", "rejects")
    }
    return counts, tables


def test_corpus_from_manifests_splits_keeps_labels_and_counts_what_is_left_out(
    recipe_file: Path, manifests: list[Path], tmp_path: Path
) -> None:
    counts, tables = picked(
        recipe_file, tmp_path / "out", f"data.manifests=[{manifests[0]}, {manifests[1].parent}]"
    )
    assert (counts["train"], counts["test"], counts["in_neither_split"]) == (12, 6, 2)
    assert tables["train"][3] == {
        "id": "c3", "audio": str(manifests[0].parent / "short.wav"), "split": "train", "gender": "female", "n": 3,
    }  # fmt: skip
    ids = [row["id"] for row in tables["train"] + tables["test"]]
    assert len(set(ids)) == len(ids)
    assert "b/c3" in ids
    places = [(Path(row["file"]).parent.name, row["line"]) for row in tables["rejects"]]
    assert places == [("a", 10), ("a", 12), ("a", 13), ("a", 14), ("a", 15), ("b", 10)]
    said = " | ".join(row["reason"] for row in tables["rejects"])
    for part in ("not a JSON object", "has no 'audio'", "has no 'gender'", "already used", "40.0 s long"):
        assert part in said
    assert counts["reasons"]["too long"] == 2


def test_every_clip_of_any_number_of_manifests_has_an_id_of_its_own(
    recipe_file: Path, manifests: list[Path], tmp_path: Path
) -> None:
    folder = manifests[1].parent
    for name in ("c", "d"):
        rows = [{"id": "c3", "audio": "short.wav", "split": "train", "gender": name}]
        write_jsonl(folder / f"{name}.jsonl", [*rows, *rows])
    names = ", ".join(map(str, [*manifests, folder / "c.jsonl", folder / "d.jsonl"]))
    counts, tables = picked(recipe_file, tmp_path / "out", f"data.manifests=[{names}]")
    assert counts["train"] == 14
    ids = [row["id"] for row in tables["train"]]
    assert len(set(ids)) == 14
    assert {"c3", "b/c3", "b/c/c3", "b/d/c3"} <= set(ids)
    again = [row for row in tables["rejects"] if Path(row["file"]).stem in ("c", "d")]
    assert len(again) == 2
    assert all("already used in this manifest" in row["reason"] for row in again)


def test_one_sound_cannot_be_in_training_and_in_the_test(
    recipe_file: Path, manifests: list[Path], tmp_path: Path
) -> None:
    rows = [
        {"id": f"q{i}", "audio": "short.wav", "split": split, "gender": "male"}
        for i, split in enumerate(("train", "test"))
    ]
    write_jsonl(manifests[0].parent / "both.jsonl", rows)
    with pytest.raises(
        UserError, match=r"line 2: the sound .*short\.wav is in data\.test, and in data\.train by .*line 1"
    ):
        picked(recipe_file, tmp_path / "out", f"data.manifests={manifests[0].parent / 'both.jsonl'}")


def test_corpus_limit_draws_from_the_whole_manifest(
    recipe_file: Path, manifests: list[Path], tmp_path: Path
) -> None:
    pattern = f"data.manifests={manifests[0].parents[1]}/*/metadata.jsonl"
    counts, tables = picked(recipe_file, tmp_path / "out", pattern, "data.limit=4")
    assert (counts["train"], counts["test"]) == (4, 4)
    _, same = picked(recipe_file, tmp_path / "again", pattern, "data.limit=4")
    assert same["train"] == tables["train"]
    assert [row["n"] for row in tables["train"]] != [0, 1, 2, 3]


def test_corpus_mistakes_are_sentences(recipe_file: Path, manifests: list[Path], tmp_path: Path) -> None:
    one = f"data.manifests={manifests[0]}"
    with pytest.raises(
        UserError, match=r"no usable line matches data.test = \{'split': 'devv'\}; column 'split' has train"
    ):
        picked(recipe_file, tmp_path / "out", one, "data.test={split: devv}")
    with pytest.raises(UserError, match=r"line 7: this clip matches both data\.train"):
        picked(recipe_file, tmp_path / "out", one, "data.train={gender: female}")
    with pytest.raises(UserError, match="no such manifest"):
        picked(recipe_file, tmp_path / "out", "data.manifests=nowhere.jsonl")
    with pytest.raises(UserError, match="nothing matches"):
        picked(recipe_file, tmp_path / "out", "data.manifests=nowhere/*.jsonl")
