"""Rows that are read while training: from every kind of shard the same, each once an epoch, and exactly so after a kill."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import parallel
import pytest
import safetensors.torch
import torch
from learning import asked_tones, tiny_recipe
from tiny_models import tiny_model

import speech_llm.model
from speech_llm.data.features import FeatureStore
from speech_llm.data.shards import JsonlRows, StreamedRows, example_of, open_files, shard_files
from speech_llm.data.stream import Place, RowPool, Stream, open_stream
from speech_llm.doctor import examine
from speech_llm.errors import UserError
from speech_llm.examples import Example, read_examples, write_examples
from speech_llm.files import read_jsonl
from speech_llm.recipe import Recipe, load_recipe
from speech_llm.training import loop
from speech_llm.training.losses import cross_entropy_sum
from speech_llm.training.rows import build_training_set
from speech_llm.training.student import Student

ANSWER = {"role": "assistant", "content": "Low."}
STREAM = ("data.stream=true", "data.step_rows=16", "optimizer.epochs=2")


def sharded(folder: Path, examples: list[Example]) -> dict[str, Path]:
    """The same rows with their sounds as shards of every kind, in a folder each."""
    rows = []
    for example in examples:
        question = example.messages[0]["content"][-1]["text"]
        sound = Path(example.audio_parts()[0]["path"])
        rows.append((example.id, question, sound, example.messages[1]["content"]))
    made = {kind: folder / kind for kind in ("jsonl", "parquet", "tar", "arrow")}
    for path in made.values():
        path.mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        write_examples(
            made["jsonl"] / f"{number}.jsonl", [e for e in examples if e.id in {r[0] for r in part}]
        )
        table = datasets.Dataset.from_list(
            [
                {
                    "id": name,
                    "sound": {"bytes": sound.read_bytes(), "path": sound.name},
                    "q": question,
                    "a": answer,
                }
                for name, question, sound, answer in part
            ]
        )
        table.to_parquet(str(made["parquet"] / f"train-{number}.parquet"))
        table.save_to_disk(str(folder / f"saved{number}"))
        (next((folder / f"saved{number}").glob("*.arrow"))).rename(made["arrow"] / f"{number}.arrow")
        with tarfile.open(made["tar"] / f"{number}.tar", "w") as archive:
            for place, (name, question, sound, answer) in enumerate(part):
                turns = [
                    {"role": "user", "content": f"<|AUDIO|>{question}"},
                    {"role": "assistant", "content": answer},
                ]
                row = {"id": name, "messages": turns}
                if place % 2:  # the row names its sound, or it lies beside it
                    row["audios"] = [{"audio": f"{place:04}.wav"}]
                for suffix, data in (("json", json.dumps(row).encode()), ("wav", sound.read_bytes())):
                    member = tarfile.TarInfo(f"part/{place:04}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return made


COLUMNS = {"id": "id", "audio": "sound", "user": "q", "assistant": "a"}


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return asked_tones(tmp_path / "sounds", 6)[0]


def test_every_kind_of_shard_gives_the_same_examples(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    for kind, folder in sharded(tmp_path, examples).items():
        columns = COLUMNS if kind in ("parquet", "arrow") else {}
        read = []
        for rows in open_files(shard_files(str(folder), folder)):
            for number in range(len(rows)):
                read.append(example_of(*rows.row(number), columns, tmp_path / "clips"))  # noqa: PERF401
        assert [e.id for e in read] == [e.id for e in examples], kind
        for found, wanted in zip(read, examples, strict=True):
            assert found.messages[1] == wanted.messages[1]
            assert found.messages[0]["content"][-1] == wanted.messages[0]["content"][-1]
            (part,), (original,) = found.audio_parts(), wanted.audio_parts()
            assert Path(part["path"]).read_bytes() == Path(original["path"]).read_bytes()
    assert len(list((tmp_path / "clips").rglob("*.wav"))) == 6  # a sound that several rows name is there once


def test_files_that_cannot_be_rows_are_named(tmp_path: Path) -> None:
    for reference, wanted in (
        ("gone.jsonl", "no such file"),
        ("empty", "no shards in it"),
        ("*.csv", "no such"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=wanted):
            shard_files(reference, tmp_path / reference)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"a.csv: rows are read from .jsonl, .parquet"):
        shard_files("a.csv", tmp_path / "a.csv")
    (tmp_path / "a.tar").write_bytes(b"not a tar file at all" * 100)
    with pytest.raises(UserError, match=r"a.tar: not a tar file"):
        open_files([tmp_path / "a.tar"])
    (tmp_path / "a.parquet").write_bytes(b"nor is this")
    with pytest.raises(UserError, match=r"a.parquet: not parquet files"):
        open_files([tmp_path / "a.parquet"])


def test_turns_of_the_hubs_other_form_and_plain_text_are_rows_too(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<|AUDIO|>Who?"}, {"from": "gpt", "value": "A man."}]
    sound = {"path": "a.wav", "bytes": b"RIFF"}
    made = example_of(
        "x", {"talk": turns, "sound": sound}, None, {"messages": "talk", "audio": "sound"}, tmp_path
    )
    assert [turn["role"] for turn in made.messages] == ["user", "assistant"]
    assert Path(made.audio_parts()[0]["path"]).read_bytes() == b"RIFF"
    assert example_of("x", {"body": "Words."}, None, {"text": "body"}, tmp_path).text == "Words."
    with pytest.raises(ValueError, match=r"no column 'bdy'.*body"):
        example_of("x", {"body": "Words."}, None, {"text": "bdy"}, tmp_path)
    alone = example_of("x", {"q": "2+2?", "a": "4"}, None, {"user": "q", "assistant": "a"}, tmp_path)
    assert alone.messages[0]["content"] == "2+2?"


def test_paths_of_rows_start_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").write_text("")
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    sets = ["optimizer.soft_word_epochs=0", "data.stream=true", "data.rows=[{path: here.jsonl}]"]
    made = load_recipe(quickstart, sets)
    assert made.resolve_path(made.data.rows[0].path or "") == tmp_path / "here.jsonl"


def test_lines_are_found_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": "x" * n}) for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + "\n\n".join(lines))  # empty lines, none at the end
    for size in (7, 64, 1 << 20):
        monkeypatch.setattr("speech_llm.data.shards._READ_BYTES", size)
        rows = JsonlRows(path)
        assert [rows.row(n)[1]["text"] for n in range(len(rows))] == ["x" * n for n in range(40)]


def pool(folder: Path, rows: int, step_rows: int = 32, seed: int = 0, files: int = 3) -> RowPool:
    places = []
    for number in range(files):
        path = folder / f"{number}.jsonl"
        own = range(number * rows // files, (number + 1) * rows // files)
        path.write_text(
            "".join(f'{{"id": "{i}", "messages": [{json.dumps(ANSWER)}]}}\n' for i in own), encoding="utf-8"
        )
        places.append(Place(JsonlRows(path)))
    return RowPool(places, [], step_rows, seed, folder / "clips")


def test_an_epoch_takes_each_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    made = pool(tmp_path, 301)
    steps = made.steps_per_epoch()
    assert steps == 10  # 38 blocks of 8, four a step
    rejects: list[dict[str, Any]] = []

    def epoch(number: int, of: RowPool) -> list[str]:
        assert steps is not None
        return [
            e.id for step in range(number * steps, (number + 1) * steps) for e in of.examples(step, rejects)
        ]

    first = epoch(0, made)
    assert sorted(first, key=int) == [str(i) for i in range(301)]
    assert first == epoch(0, pool(tmp_path, 301))
    assert sorted(epoch(1, made)) == sorted(first)
    assert epoch(1, made) != first
    assert epoch(0, pool(tmp_path, 301, seed=1)) != first
    assert not rejects
    # A step in the middle is the same without those before it.
    assert [e.id for e in pool(tmp_path, 301).examples(13, rejects)] == [
        e.id for e in made.examples(13, rejects)
    ]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A dataset as a folder in the hub's form: three shards of text rows."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for shard in range(3):
        table = datasets.Dataset.from_list(
            [{"q": f"question {shard}-{i}", "a": f"answer {i}"} for i in range(50)]
        )
        table.to_parquet(str(folder / f"train-{shard:05}-of-00003.parquet"))
    return folder


def test_a_stream_gives_the_same_rows_wherever_it_is_taken_up_again(
    tmp_path: Path, hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(name: str) -> StreamedRows:
        return StreamedRows(str(hub_folder), None, "train", 32, tmp_path / name)

    whole = open_it("a")
    blocks = [[row[1]["q"] for row in whole.block(number)] for number in range(8)]
    seen = [question for block in blocks for question in block]
    assert len(set(seen[:150])) == 150
    assert seen[150:] == seen[: 256 - 150]  # it begins again
    again = open_it("a")  # a resumed run, with what was kept
    assert [row[1]["q"] for row in again.block(5)] == blocks[5]
    assert [row[1]["q"] for row in again.block(6)] == blocks[6]
    assert [row[1]["q"] for row in open_it("b").block(3)] == blocks[3]  # without
    monkeypatch.setattr("speech_llm.data.shards.KEPT_BLOCKS", 3)  # a few of what a long run would keep
    open_it("d").block(9)
    assert sorted(int(file.stem) for file in (tmp_path / "d").iterdir()) == [3, 6, 8, 9, 10]
    assert [row[1]["q"] for row in open_it("d").block(5)] == blocks[5]
    with pytest.raises(UserError, match="split dev: not a dataset that could be loaded"):
        StreamedRows(str(hub_folder), None, "dev", 32, tmp_path / "c")


def test_steps_take_their_share_of_a_stream(tmp_path: Path, hub_folder: Path) -> None:
    stream = StreamedRows(str(hub_folder), None, "train", 64, tmp_path / "s")
    made = pool(tmp_path, 96)
    both = RowPool(made.places, [Stream(stream, {"user": "q", "assistant": "a"}, 0.25)], 32, 0, tmp_path)
    assert (both.steps_per_epoch(), both.of_streams) == (4, [8])
    rejects: list[dict[str, Any]] = []
    steps = [both.examples(step, rejects) for step in range(4)]
    of_stream = [e.messages[0]["content"] for step in steps for e in step if not e.id.isdigit()]
    assert len(of_stream) == len(set(of_stream)) == 32
    assert sorted(int(e.id) for step in steps for e in step if e.id.isdigit()) == list(range(96))
    with pytest.raises(UserError, match="none is left for the other rows"):
        RowPool(made.places, [Stream(stream, {}, 1.0)], 32, 0, tmp_path)


# ---------------------------------------------------------------- training


@pytest.fixture
def data(tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> Path:
    write_examples(tmp_path / "examples.jsonl", examples[:6])
    sharded(tmp_path / "shards", examples[6:])
    (tmp_path / "shards" / "jsonl" / "2.jsonl").write_text(
        '{"id": "bad"}\nnot json\n{"text": "Words alone."}\n'
    )
    return tmp_path


def places(data: Path) -> list[dict[str, Any]]:
    return [
        {"path": str(data / "shards" / "jsonl")},
        {"path": str(data / "shards" / "parquet" / "*.parquet"), "columns": COLUMNS},
        {"path": str(data / "shards" / "tar")},
    ]


def streaming_recipe(monkeypatch: pytest.MonkeyPatch, data: Path, *overrides: str) -> Recipe:
    return tiny_recipe(monkeypatch, data, *STREAM, f"data.rows={json.dumps(places(data))}", *overrides)


def run(recipe: Recipe, data: Path, out: Path, probe: Any = None) -> dict[str, Any]:
    return loop.train(
        recipe, data / "examples.jsonl", out / "train", out / "model", probe=probe, progress=False
    )


def trained(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


def test_a_streaming_run_that_was_killed_ends_as_an_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, data: Path, hub_folder: Path, tmp_path: Path
) -> None:
    recipe = streaming_recipe(monkeypatch, data)
    recipe.data.rows.append(
        type(recipe.data.rows[0])(
            dataset=str(hub_folder), columns={"user": "q", "assistant": "a"}, share=0.25
        )
    )
    counts = run(recipe, data, tmp_path / "whole")
    assert counts["rows"] == 6 + 6 + 3 + 6 + 6
    assert counts["steps"] == 2 * 4
    assert counts["rejected"] == 2

    def killed(_model: Any, _processor: Any, epoch: float) -> dict[str, Any]:
        if epoch == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tmp_path / "parts", killed)
    run(recipe, data, tmp_path / "parts")
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("whole", "parts"):
        rejects = [row for _, row in read_jsonl(tmp_path / name / "train" / "rejects.jsonl")]
        assert len(rejects) == 2  # once, however often they are met
        assert {row["reason"] for row in rejects} == {
            "it has neither 'messages' nor 'text'",
            "the line is not JSON",
        }


def test_a_column_that_no_row_has_is_told_before_training(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    recipe = streaming_recipe(monkeypatch, data)
    columns = recipe.data.rows[1].columns
    name, right = next(iter(columns.items()))
    columns[name] = right.upper() + "S"
    with pytest.raises(UserError, match=rf"there is no column '{right.upper()}S'; its rows have .*{right}"):
        run(recipe, data, tmp_path / "run")


@pytest.mark.parametrize("loss", ["{type: ce}", "{type: kl, top_k: null}"])
def test_the_loss_of_a_streamed_step_is_that_of_the_rows_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: str
) -> None:
    rows = asked_tones(tmp_path / "sounds", 4)[0]
    for example in rows:
        example.context = "A tone."
    write_examples(tmp_path / "examples.jsonl", rows)
    losses = []
    for stream in ("true", "false"):
        recipe = tiny_recipe(
            monkeypatch, tmp_path, f"data.stream={stream}", "data.step_rows=8", "optimizer.batch_tokens=8192",
            "optimizer.epochs=1", f"loss={loss}",
        )  # fmt: skip
        run(recipe, tmp_path, tmp_path / stream)
        losses += [
            row["loss"] for _, row in read_jsonl(tmp_path / stream / "train" / "log.jsonl") if "loss" in row
        ]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_processes_plan_the_same_steps_and_share_their_batches(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    recipe = streaming_recipe(monkeypatch, data, "optimizer.batch_tokens=128")
    model, processor = tiny_model()
    plans, rows_of = [], []
    for process in range(2):
        store = FeatureStore(tmp_path / "features", model, processor)
        streamed, steps = open_stream(
            recipe, [data / "examples.jsonl"], processor, store, tmp_path / f"p{process}", process == 0
        )
        plan, rows = [], []
        for number in range(len(steps)):
            _, micro = steps[number]
            plan.append([[streamed.packs[i].rows for i in batch] for batch in micro])
            rows.append(
                [name for batch in micro[process::2] for i in batch for name in streamed.packs[i].rows]
            )
        plans.append(plan)
        rows_of.append(rows)
    assert plans[0] == plans[1]
    for number, step in enumerate(plans[0]):
        assert len(step) > 1
        first, second = rows_of[0][number], rows_of[1][number]
        assert not set(first) & set(second)
        assert sorted([*first, *second]) == sorted(row for batch in step for pack in batch for row in pack)


def test_two_processes_stream_what_one_does(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    overrides = [*STREAM, f"data.rows={json.dumps(places(data))}", "optimizer.epochs=4"]
    with monkeypatch.context() as patch:  # what it sets is unset
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        patch.setattr(speech_llm.model, "build_model", speech_llm.model.build_model)
        patch.setenv("SPEECH_LLM_CACHE", "")
        parallel.main(data, "one", *overrides)
    parallel.launch(data, "two", parallel.COPIES, *overrides)
    one, two = trained(data / "one"), trained(data / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    logs = [
        [row["loss"] for _, row in read_jsonl(data / name / "train" / "log.jsonl") if "loss" in row]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == 6
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_streamed_and_held_rows_have_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    recipe = streaming_recipe(monkeypatch, data, "data.rows=[]")
    model, processor = tiny_model()
    store = FeatureStore(tmp_path / "features", model, processor)
    streamed, steps = open_stream(recipe, [data / "examples.jsonl"], processor, store, tmp_path / "o", True)
    _, micro = steps[0]
    held = build_training_set(
        list(read_examples(data / "examples.jsonl")), processor, store, 512, False, progress=False
    )
    student = Student(model, processor, store, [], 0)

    def total(packs: list[Any]) -> float:
        return sum(
            float(cross_entropy_sum(*student.answer_logits(student.batch([p]))).detach()) for p in packs
        )

    assert total([streamed.packs[i] for batch in micro for i in batch]) == pytest.approx(
        total(held.packs), rel=1e-5
    )


def test_what_streaming_cannot_do_is_said(tmp_path: Path) -> None:
    quickstart = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    plain = ["optimizer.soft_word_epochs=0"]
    for sets, wanted in (
        (["data.rows=[{path: a.jsonl}]"], "data.stream is false"),
        (["data.stream=true", "optimizer.soft_word_epochs=1"], "soft words are tuned on all rows"),
        (["data.stream=true", "optimizer.accumulate=2"], "data.step_rows higher"),
        (["data.stream=true", "loss={type: kl, top_k: 8}"], "set it to null"),
        (["data.stream=true", "loss.mask=share"], "set it to none"),
        (["data.stream=true", "data.rows=[{path: a, dataset: b}]"], "names one place"),
        (["data.stream=true", "data.rows=[{path: a, share: 0.5}]"], "share is for a dataset"),
        (["data.stream=true", "data.rows=[{path: a, colums: {}}]"], "columns"),
    ):
        with pytest.raises(UserError, match=wanted):
            load_recipe(quickstart, [*plain, *sets])
    rows = "data:\n  stream: true\n  rows: [{path: a.jsonl}, {dataset: X/y}]\n"
    (tmp_path / "r.yaml").write_text(quickstart.read_text().replace("data:\n", rows))
    made = load_recipe(tmp_path / "r.yaml", plain)
    assert any("a.jsonl: no such file" in problem for problem in examine(made)["recipe"]["problems"])
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.data.rows[0].path == str(tmp_path / "a.jsonl")
    assert again.data.rows[1].dataset == "X/y"


def test_memory_stays_flat_and_the_first_step_comes_at_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is it? " * 8}, ANSWER]
    line = json.dumps({"id": "x", "messages": turns}) + "\n"
    peaks = []
    for rows in (1_500, 150_000):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(line * rows)
        tracemalloc.start()
        started = time.perf_counter()
        made = RowPool([Place(JsonlRows(path))], [], 64, 0, tmp_path)
        assert len(made.examples(0, [])) == 64
        seconds = time.perf_counter() - started
        for step in range(1, 20):
            made.examples(step, [])
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        peaks.append(peak)
        assert held < rows * 8 + 2_000_000  # where each line begins, and little else
    assert seconds < 2
    # Of the rows themselves only a block of the file and those of a step are ever held.
    assert peaks[1] < 20_000_000 < path.stat().st_size


@pytest.mark.parametrize("reference", ["start", "context"])
def test_pairs_are_streamed_with_the_loss_that_they_have_together_and_go_on_after_a_kill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference: str
) -> None:
    rows = asked_tones(tmp_path / "sounds", 4)[0]
    for number, example in enumerate(rows):
        example.context, example.rejected = "A tone.", f"Nothing, {number}."
    write_examples(tmp_path / "examples.jsonl", rows)

    def recipe(stream: str, *overrides: str) -> Any:
        return tiny_recipe(
            monkeypatch, tmp_path, f"data.stream={stream}", "data.step_rows=8", "optimizer.batch_tokens=8192", "style=preference",
            f"loss={{type: dpo, reference: {reference}}}", "trainable.lora={rank: 2, dropout: 0.2}", *overrides,
        )  # fmt: skip

    def losses(name: str) -> list[float]:
        log = [row for _, row in read_jsonl(tmp_path / name / "train" / "log.jsonl")]
        return [row["loss"] for row in log if "loss" in row]

    for name in ("true", "false"):
        run(recipe(name, "trainable.lora=null"), tmp_path, tmp_path / name)
    assert len(losses("true")) == 3
    # Batches of streamed rows are put together in another order, whose sums differ in the last places.
    assert losses("true") == pytest.approx(losses("false"), rel=1e-3)

    def killed(_model: Any, _processor: Any, epoch: float) -> dict[str, Any]:
        if epoch == 2:
            raise KeyboardInterrupt
        return {}

    run(recipe("true"), tmp_path, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe("true"), tmp_path, tmp_path / "parts", killed)
    run(recipe("true"), tmp_path, tmp_path / "parts")
    assert losses("whole") == losses("parts")
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
