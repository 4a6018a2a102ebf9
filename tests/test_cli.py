"""The command line is a contract: verbs, exit codes, one line per mistake, nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import speech_llm.pipeline as pipeline
from speech_llm.chat import session, split_inputs
from speech_llm.cli import _exit_code
from speech_llm.errors import UserError
from speech_llm.files import write_json, write_jsonl
from speech_llm.stages import STAGE_NAMES, STAGES, Stage
from speech_llm.summary import results_table, scores_table

VERBS = (
    "run",
    "describe",
    "targets",
    "mixture",
    "cache",
    "export",
    "train",
    "eval",
    "score",
    "judge",
    "report",
    "chat",
    "demo",
    "doctor",
)
TEXT = """\
name: small
data: {synthesize: {train_clips: 8, test_clips: 4}}
describe: {labels: {gender: gender}}
targets: {prompts: pool.yaml}
eval: {attributes: [gender], prompts: pool.yaml}
"""
POOL = """\
prompts:
  - {id: gender, text: "Male or female?", asks: [gender], example: "{gender}"}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a recipe and a recording."""
    (tmp_path / "small.yaml").write_text(TEXT)
    (tmp_path / "pool.yaml").write_text(POOL)
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(8000) / 5).astype(np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the stages; the list says which ran."""
    ran: list[str] = []

    def stand_in(name: str, outputs: tuple[str, ...]) -> Stage:
        def run(recipe: Any, run_dir: Path, progress: bool) -> dict[str, Any]:
            ran.append(name)
            for output in outputs:
                write_json(run_dir / output, RESULTS)
            return {"clips": 3}

        real = next(stage for stage in STAGES if stage.name == name)
        return Stage(name, 1, lambda r: {"seed": r.seed}, lambda r, run: [], run, outputs, real.when)

    outside = {"eval": ("results.json",), "report": ("report.html",)}
    made = tuple(stand_in(name, outside.get(name, ())) for name in STAGE_NAMES)
    monkeypatch.setattr(pipeline, "STAGES", made)
    return ran


def result(value: float, n: int = 40) -> dict[str, Any]:
    half = {
        "accuracy": value,
        "n": n,
        "unparsed": 1,
        "interval": [value - 0.1, value + 0.05],
        "chance": 0.5,
        "majority": 0.55,
    }
    return {**half, "seen": half, "unseen": {**half, "accuracy": value / 2}}


RESULTS = {
    "models": {
        "speech_llm": {"gender": result(0.9)},
        "ceiling": {"gender": result(0.8)},
        "cascade": {"gender": result(0.5)},
    }
}


class Echo:
    """A responder that says what it was asked."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
        self.heard += conversations
        return [f"answer {len(self.heard)}" for _ in conversations]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    responder = Echo()
    stub = types.ModuleType("speech_llm.responders")
    stub.load_responder = lambda model, **options: responder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "speech_llm.responders", stub)
    return responder


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error that a mistake gives, exit code 2."""
    capsys.readouterr()
    assert _exit_code(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from speech_llm.cli import _exit_code; assert _exit_code(['run', '--help']) == 0;"
        "assert not {'torch', 'transformers', 'numpy', 'speech_llm.recipe'} & set(sys.modules), 'a heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "speech-llm run recipes/quickstart.yaml" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Example" in said
    assert f"speech-llm {verb} " in said


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["--help"]) == 0
    said = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in said


def test_bad_usage_is_one_line_and_exit_code_2(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing argument 'RECIPE'; see speech-llm run --help" in fails(capsys, "run")
    assert "Did you mean 'run'?" in fails(capsys, "rnu", "small.yaml")
    assert "--otu" in fails(capsys, "run", "small.yaml", "--otu", "x")
    assert "small.yml: no such recipe" in fails(capsys, "run", "small.yml")
    assert "--set optimzer.lr=1: unknown key 'optimzer'" in fails(
        capsys, "run", "small.yaml", "--set", "optimzer.lr=1"
    )
    assert "expected COLUMN=ATTRIBUTE" in fails(
        capsys, "describe", "a.wav", "--out", "o.jsonl", "--label", "sex"
    )
    assert "--limit" in fails(capsys, "eval", "m", "--tasks", "t", "--out", "o", "--limit", "0")
    assert "nope: no such run folder" in fails(capsys, "report", "nope")


def test_run_prints_the_results_and_where_the_report_is(
    here: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["run", "small.yaml", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert stages == [name for name in STAGE_NAMES if name != "mixture"]
    assert "[1/6] corpus: done in" in said
    assert "report: runs/small/report.html" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["gender", "seen", "40", "50.0", "55.0", "50.0", "80.0", "90.0", "80.0", "to", "95.0"] in rows
    assert _exit_code(["run", "small.yaml", "--quiet"]) == 0
    assert stages == [name for name in STAGE_NAMES if name != "mixture"]
    assert capsys.readouterr().out.count("already done") == 6


def test_single_stage_verbs_run_what_comes_before_them(here: Path, stages: list[str]) -> None:
    assert _exit_code(["targets", "small.yaml", "--out", "here"]) == 0
    assert stages == ["corpus", "describe", "targets"]
    assert _exit_code(["train", "small.yaml", "--out", "here"]) == 0
    assert stages == ["corpus", "describe", "targets", "train"]
    assert (here / "here" / "train" / "manifest.json").exists()


def test_mixture_is_a_stage_of_a_recipe_that_mixes(
    here: Path, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["--set", "trainable.lora.rank=2", "--set", "model.gate_adapters=false", "--set", "mixture.sources=[{type: replay}]"]  # fmt: skip
    assert _exit_code(["mixture", "small.yaml", "--out", "here", *mixed]) == 0
    assert stages == ["corpus", "describe", "targets", "mixture"]
    assert "mixed in: here/mixture/examples.jsonl" in capsys.readouterr().out
    assert _exit_code(["mixture", "small.yaml", "--out", "there"]) == 2
    assert (
        "a run of this recipe has no stage mixture, because its mixture is empty" in capsys.readouterr().err
    )


def test_interrupt_says_how_to_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "STAGES", (Stage("report", 1, lambda r: {}, lambda r, run: [], stop),))
    monkeypatch.setattr(sys, "argv", ["speech-llm", "run", "small.yaml", "--set", "a b=c"])
    assert _exit_code(["run", "small.yaml"]) == 130
    assert "goes on from here: speech-llm run small.yaml --set 'a b=c'" in capsys.readouterr().err
    assert not (here / "runs" / "small" / "report" / "manifest.json").exists()


def test_keys_lists_every_key_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["run", "--keys"]) == 0
    said = capsys.readouterr().out
    assert "optimizer.batch_tokens" in said
    assert "peak learning rate" in said


def test_describe_writes_one_line_per_recording_and_counts_rejects(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "1", "audio": "a.wav", "sex": "F"}, {"id": "2", "audio": "gone.wav"}]
    write_jsonl(here / "m.jsonl", rows)
    assert (
        _exit_code(
            ["describe", "m.jsonl", "--out", "d.jsonl", "--use", "duration", "--label", "sex=gender", "-q"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "d.jsonl: described 1, rejected 1" in said
    line = json.loads((here / "d.jsonl").read_text())
    assert line["attributes"] == {"duration": 0.5, "gender": "female"}
    assert "unknown describer 'durations'" in fails(
        capsys, "describe", "a.wav", "--out", "x.jsonl", "--use", "durations"
    )


def test_chat_answers_once(here: Path, echo: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["chat", "model", "a.wav", "What can you hear?"]) == 0
    assert capsys.readouterr().out == "answer 1\n"
    assert echo.heard[0] == [
        {
            "role": "user",
            "content": [
                {"type": "audio", "path": str(here / "a.wav")},
                {"type": "text", "text": "What can you hear?"},
            ],
        }
    ]
    assert _exit_code(["chat", "model", "Hello"]) == 0
    assert echo.heard[1] == [{"role": "user", "content": "Hello"}]
    assert "gone.wav: no such recording" in fails(capsys, "chat", "model", "gone.wav", "What?")
    assert "no such recording" in fails(capsys, "chat", "model", "a.wav", "What", "can")


def test_chat_inputs_are_told_apart(here: Path) -> None:
    assert split_inputs(["a.wav"]) == ([here / "a.wav"], None)
    assert split_inputs(["a.wav", "a.wav", "Same?"]) == ([here / "a.wav"] * 2, "Same?")
    assert split_inputs([]) == ([], None)
    with pytest.raises(UserError):
        split_inputs(["gone.mp3"])


def test_session_keeps_its_turns_and_survives_mistakes(here: Path) -> None:
    echo, said = Echo(), []
    typed = iter(
        [
            "What is it?",
            "",
            "And how?",
            "/audio gone.wav",
            "/audio a.wav",
            "Again?",
            "/new",
            "Fresh?",
            "/quit",
        ]
    )
    session(echo, [here / "a.wav"], ask=lambda _: next(typed), say=said.append)
    assert [len(conversation) for conversation in echo.heard] == [1, 3, 5, 1]
    assert echo.heard[1][1] == {"role": "assistant", "content": "answer 1"}
    assert echo.heard[2][4]["content"][0]["path"] == str(here / "a.wav")
    assert any("error: gone.wav: no such recording" in line for line in said)


def test_tables_survive_missing_parts() -> None:
    assert results_table({}) == "no results yet"
    assert scores_table({}) == "nothing was scored"
    only = results_table({"models": {"ceiling": {"words": {"wer": 0.25, "n": 8, "interval": [0.1, 0.4]}}}})
    assert "words (WER)  all      8       -         -     25.0   10.0 to 40.0" in only


def test_doctor_tells_what_a_recipe_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["doctor", "small.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1
    assert found["gflops"]["float32"] > 0
    assert found["versions"]["torch"]
    recipe = found["recipe"]
    assert [model["role"] for model in recipe["models"]] == ["LLM", "encoder", "speech recognition"]
    assert recipe["clips"]["train"] == 8
    assert recipe["estimate"]["memory_gb"] > 0
    assert recipe["problems"] == []


def test_doctor_names_what_keeps_a_recipe_from_running(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "pool.yaml").unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    sets = [
        "optimizer.compile=true",
        "model.llm=./gone",
        "model.encoder=./gone",
        "data.synthesize=null",
        "data.manifests=gone.jsonl",
        "data.train={a: 1}",
        "data.test={a: 2}",
    ]
    assert _exit_code(["doctor", "small.yaml", *[part for item in sets for part in ("--set", item)]]) == 2
    said = capsys.readouterr().out
    compiler = "optimizer.compile is true, which needs a C++ compiler (no-such-compiler"
    for part in ("PROBLEM: ./gone", "gone.jsonl: no such manifest", "no such prompt pool", compiler):
        assert part in said
    assert said.count("PROBLEM: ./gone") == 1  # two roles share it
    assert "Ready" not in said


def test_what_an_answer_depends_on_is_the_weights_behind_any_prefix_and_its_length(tmp_path: Path) -> None:
    from speech_llm.cli.app import identity_of

    (tmp_path / "model.safetensors").write_bytes(b"one")
    told = {identity_of(f"{prefix}{tmp_path}", 64) for prefix in ("", "text:", "teacher:", "cascade:")}
    assert len(told) == 4
    assert identity_of(f"text:{tmp_path}", 64) != identity_of(f"text:{tmp_path}", 100)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert not told & {identity_of(f"{prefix}{tmp_path}", 64) for prefix in ("", "text:", "teacher:")}


def test_a_text_llm_given_as_a_speech_model_is_told_how_it_is_named(tmp_path: Path) -> None:
    from speech_llm.responders import load_responder

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"'llama'.*text:"):
        load_responder(str(tmp_path))
