"""General text: sets as they should be, choices scored as the harness scores them, and what a sound may and may not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import tones
from tiny_models import tiny_llm, tiny_model, tiny_tokenizer

from eval.general import SETS, general_tasks, load_sets, pick, probe, probe_with_sound
from eval.harness import build_harness, run_harness
from eval.runner import evaluate
from eval.tasks import load_tasks
from speech_llm.choosing import choose_plain, encode_pair
from speech_llm.data.features import FeatureStore
from speech_llm.errors import UserError
from speech_llm.examples import user_turn
from speech_llm.files import read_json, read_jsonl
from speech_llm.responders import SpeechResponder, TextResponder


def test_the_sets_are_large_balanced_and_without_doubles() -> None:
    for found in load_sets():
        assert len(found.items) >= 40
        assert all(len(set(item.choices)) == 4 for item in found.items)
        assert len({item.context for item in found.items}) == len(found.items)
        places = Counter(item.answer for item in found.items)
        assert set(places) == {0, 1, 2, 3}
        assert max(places.values()) - min(places.values()) <= 1
    with pytest.raises(UserError, match=r"knowlege.*knowledge"):
        load_sets(["knowlege"])


@pytest.fixture
def text_model() -> TextResponder:
    return TextResponder(tiny_llm().eval(), tiny_tokenizer())


def test_a_choice_is_as_likely_as_the_llm_says(text_model: TextResponder) -> None:
    llm, tokenizer = text_model.llm, text_model.tokenizer
    contexts, choices = ["Who? ", "What is it?\nAnswer:"], [["male", " a long answer"], [" 1", " 22", " 333"]]
    told = choose_plain(llm, tokenizer, contexts, choices)
    for context, own, values in zip(contexts, choices, told, strict=True):
        for choice, value in zip(own, values, strict=True):
            start, rest = encode_pair(tokenizer, context, choice)
            assert start + rest == tokenizer(context + choice)["input_ids"]
            ids = torch.tensor([start + rest])
            with torch.no_grad():
                logs = llm(input_ids=ids).logits[0].float().log_softmax(-1)
            alone = sum(float(logs[len(start) + i - 1, token]) for i, token in enumerate(rest))
            assert value == pytest.approx(alone, abs=1e-4)


def test_the_harness_counts_as_we_do(text_model: TextResponder, tmp_path: Path) -> None:
    """lm-evaluation-harness on our own sets: the same likelihoods and the same accuracy."""
    names = ["arithmetic", "translation"]
    theirs = run_harness(text_model, build_harness(names), tmp_path, limit=8)
    ours = probe(text_model, names, limit=8)
    for name in names:
        result = theirs[f"lm-eval:{name}"]
        assert (result["accuracy"], result["n"]) == (ours[name]["value"], 8)
        assert result["interval"] == [ours[name]["low"], ours[name]["high"]]
        (found,) = load_sets([name])
        items = found.items[:8]
        told = text_model.choose([item.context for item in items], [item.continuations for item in items])
        rows = [row for _, row in read_jsonl(tmp_path / f"lm-eval-speech_llm_{name}.jsonl")]
        for row, values in zip(rows, told, strict=True):
            assert [likelihood for likelihood, _ in row["filtered_resps"]] == pytest.approx(values, abs=1e-3)


def test_a_task_of_the_harness_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_task_at_all"):
        build_harness(["no_such_task_at_all"])
    with pytest.raises(UserError, match="no such task file"):
        build_harness([str(tmp_path / "absent.yaml")])


def test_the_harness_builds_a_task_once(
    text_model: TextResponder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.task import ConfigurableTask
    from typer.testing import CliRunner

    from speech_llm.cli import app

    built, download = [], ConfigurableTask.download

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(self.config.task)
        download(self, *args, **kwargs)

    monkeypatch.setattr(ConfigurableTask, "download", counted)
    monkeypatch.setattr("speech_llm.responders.load_responder", lambda *_, **__: text_model)
    command = ["eval", "text:any", "--tasks", "lm-eval:arithmetic,lm-eval:code", "--out", str(tmp_path), "--limit", "2"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert set(read_json(tmp_path / "results.json")) == {"lm-eval:arithmetic", "lm-eval:code"}
    assert built == ["speech_llm_arithmetic", "speech_llm_code"]


def test_a_task_of_the_harness_that_is_not_there_is_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from speech_llm.cli import app

    monkeypatch.setattr("speech_llm.responders.load_responder", lambda *_, **__: pytest.fail("loaded"))
    for name in ("no_such_task_at_all", str(tmp_path / "absent.yaml")):
        command = ["eval", "text:any", "--tasks", f"general:arithmetic,lm-eval:{name}", "--out", str(tmp_path / "out")]  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, UserError)
        assert name in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`speech(gate)`: a model whose adapters do something, and two sounds."""
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    clips = [{"path": str(path), "transcript": ""} for path, _ in tones(tmp_path / "clips", 2)]

    def make(gate: bool) -> tuple[SpeechResponder, list[dict[str, Any]]]:
        model, processor = tiny_model(lora={"rank": 2, "alpha": 8}, gate_adapters=gate)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
        features = FeatureStore(tmp_path / "features", model, processor, "padded")
        return SpeechResponder(model, processor, features), clips

    return make


@pytest.mark.parametrize("gate", [True, False])
def test_text_is_the_base_llms_exactly_where_adapters_are_gated(speech: Any, gate: bool) -> None:
    """With a frozen LLM and adapters that only sound switches on, the text path cannot change; beside a sound it can."""
    model, clips = speech(gate)
    context, choices = "Question: who?\nAnswer:", [" male", " female"]
    base = choose_plain(tiny_llm().eval(), model.processor.tokenizer, [context], [choices])
    assert (model.choose([context], [choices]) == base) is gate
    chat = [user_turn(context)]
    own = TextResponder(tiny_llm().eval(), model.processor.tokenizer).choose([chat], [choices])[0]
    assert (model.choose([chat], [choices])[0] == pytest.approx(own, abs=1e-5)) is gate
    heard = [user_turn(context, clip) for clip in clips]
    with_sound = model.choose([[turn] for turn in heard], [choices, choices])
    assert with_sound[0] != pytest.approx(own, abs=1e-3)
    # What is asked beside it changes nothing.
    assert model.choose([[heard[1]]], [choices])[0] == pytest.approx(with_sound[1], abs=1e-4)


def test_the_harness_runs_with_adapters_on_and_off(speech: Any, tmp_path: Path) -> None:
    model, _ = speech(True)

    def likelihoods(adapters: bool | None) -> list[Any]:
        run_harness(model, build_harness(["arithmetic"]), tmp_path, limit=2, adapters=adapters)
        rows = read_jsonl(tmp_path / "lm-eval-speech_llm_arithmetic.jsonl")
        return [row["filtered_resps"] for _, row in rows]

    as_text, on, off = (likelihoods(adapters) for adapters in (None, True, False))
    assert as_text == off != on


def test_sets_as_tasks_of_the_runner(text_model: TextResponder, tmp_path: Path) -> None:
    tasks = load_tasks("general")
    assert [task.name for task in tasks] == list(SETS)
    results = evaluate(text_model, load_tasks("general:code"), tmp_path, limit=6, progress=False)
    assert results["code"]["n"] == 6
    assert results["code"]["chance"] == 0.25
    assert results["code"]["accuracy"] == probe(text_model, ["code"], 6)["code"]["value"]
    again = evaluate(text_model, general_tasks(["code"]), tmp_path, limit=6, progress=False)
    assert again == results

    class Server:
        def respond(self, conversations: Any, on_answer: Any = None) -> list[str]:
            return []

    with pytest.raises(UserError, match="code: its answers are picked by how likely they are"):
        evaluate(Server(), load_tasks("general:code"), tmp_path / "server", progress=False)


def test_sound_is_in_every_conversation_by_turns(speech: Any) -> None:
    model, clips = speech(True)
    asked: list[Any] = []

    class Spy:
        def choose(self, contexts: Any, choices: Any) -> Any:
            asked.extend(contexts)
            return model.choose(contexts, choices)

    series = probe_with_sound(Spy(), clips, ["knowledge"], limit=3)
    assert series["knowledge"]["n"] == 3
    assert [turns[0]["content"][0]["path"] for turns in asked] == [clips[i % 2]["path"] for i in range(3)]
    assert pick([-2.0, -1.0, -1.0]) == 1
