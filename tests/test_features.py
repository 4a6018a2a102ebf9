"""The feature cache: the same features however they were come by, whole after kills, within its bound, of the size foretold."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from learning import QUICKSTART, asked_tones, on_tiny_models, saved_recipe, tiny_recipe, tones
from tiny_models import tiny_model

import speech_llm.model
from speech_llm.audio import duration_s
from speech_llm.cli import _exit_code
from speech_llm.data import entries as entries_module
from speech_llm.data import features as features_module
from speech_llm.data.encodings import measure_encodings
from speech_llm.data.features import FeatureStore, feature_key
from speech_llm.doctor import as_text, examine
from speech_llm.errors import UserError
from speech_llm.examples import write_examples
from speech_llm.files import write_jsonl
from speech_llm.recipe import load_recipe
from speech_llm.responders import load_speech_model
from speech_llm.training import loop

CLIPS = 24


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    torch.set_num_threads(1)  # so that children may be forked
    return [str(path) for path, _ in tones(tmp_path / "clips", CLIPS)]


def store(root: Path, max_gb: float | None = None, **settings: str) -> FeatureStore:
    return FeatureStore(root, *tiny_model(), max_gb=max_gb, **settings)  # type: ignore[arg-type]


def kept(root: Path) -> dict[str, Path]:
    """The entries of a cache by name."""
    return {path.name: path for path in root.rglob("*.safetensors")}


def forked(work: Callable[[], object]) -> int:
    """The id of a child process that does some work and exits."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_what_a_clip_is_kept_under(tmp_path: Path) -> None:
    model, processor = tiny_model()
    first = feature_key(model, processor, "own_length")
    assert first == feature_key(*tiny_model(), "own_length")
    others = [
        feature_key(model, processor, "padded"),
        feature_key(model, processor, "own_length", torch.float32),
        feature_key(*tiny_model(taps=[1, 2]), "own_length"),
        feature_key(*tiny_model(encoder="hubert"), "own_length"),
    ]
    with torch.no_grad():  # another revision of the encoder: two weights change places
        weight = next(p for p in model.encoder.parameters() if p.dim() == 2)
        weight[:2] = weight[[1, 0]].clone()
    others.append(feature_key(model, processor, "own_length"))
    assert len({first, *others}) == 6
    clips = [path for path, _ in tones(tmp_path, 2)]
    same = clips[0].rename(tmp_path / "another name.wav")
    there = store(tmp_path / "cache")
    before = there.entry(str(same))
    same.write_bytes(clips[1].read_bytes())
    assert store(tmp_path / "cache").entry(str(same)) != before


@pytest.mark.parametrize("encoding", ["own_length", "padded"])
def test_filled_ahead_equals_filled_on_the_fly_and_holds_real_frames_only(
    tmp_path: Path, paths: list[str], encoding: str
) -> None:
    few = paths[:4] if encoding == "padded" else paths
    ahead, later = store(tmp_path / "a", encoding=encoding), store(tmp_path / "b", encoding=encoding)
    assert ahead.fill(few, progress=False)["stored"] == len(few)
    assert store(tmp_path / "a", encoding=encoding).fill(few, progress=False)["found"] == len(few)
    for path in few:
        features = ahead.load(path)
        assert len(features) == ahead.processor.frames(round(duration_s(path) * 16_000))
        assert later.frame_count(path) == len(features)
        torch.testing.assert_close(later.load(path), features, rtol=2e-3, atol=2e-3)


def test_a_clip_stored_under_a_larger_bound_is_a_reject_under_a_smaller_one(
    tmp_path: Path, paths: list[str]
) -> None:
    long = [path for path in paths if duration_s(path) > 0.66]
    assert 0 < len(long) < len(paths)
    store(tmp_path / "cache").fill(paths, progress=False)
    for root in (tmp_path / "cache", tmp_path / "empty"):
        smaller = FeatureStore(root, *tiny_model(), max_duration_s=0.66)
        assert sorted(smaller.unusable(paths)) == sorted(long)
        smaller = FeatureStore(root, *tiny_model(), max_duration_s=0.66)
        assert smaller.fill(paths, progress=False)["rejected"] == len(long)
        assert sorted(smaller.rejects) == sorted(long)


def test_the_size_foretold_is_the_size_taken(tmp_path: Path, paths: list[str]) -> None:
    for dtype in ("float16", "float32"):
        there = store(tmp_path / dtype, dtype=dtype)
        foretold = there.predicted_bytes(map(duration_s, paths))
        there.fill(paths, progress=False)
        assert there.entries.size_bytes() == pytest.approx(foretold, rel=0.01)


def test_a_cache_killed_while_it_is_filled_holds_whole_entries_only(tmp_path: Path, paths: list[str]) -> None:
    whole = store(tmp_path / "whole")
    started = time.perf_counter()
    whole.fill(paths, progress=False)
    seconds = time.perf_counter() - started
    wanted = {name: path.read_bytes() for name, path in kept(tmp_path / "whole").items()}
    rng = random.Random(0)
    seen = set()
    there = store(tmp_path / "killed", max_gb=1)
    for attempt in range(12):
        before = len(kept(tmp_path / "killed"))
        child = forked(lambda: there.fill(paths, progress=False))
        if attempt % 2:
            time.sleep(rng.random() * seconds)
        else:  # however slow the machine: as soon as it has written something
            ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while len(kept(tmp_path / "killed")) == before and os.waitid(os.P_PID, child, ended) is None:
                time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = kept(tmp_path / "killed")
        seen.add(len(found))
        assert all(path.read_bytes() == wanted[name] for name, path in found.items())
        if len(found) == CLIPS:  # from the beginning
            for path in found.values():
                path.unlink()
    assert any(0 < count < CLIPS for count in seen)
    there.fill(paths, progress=False)
    assert {name: path.read_bytes() for name, path in kept(tmp_path / "killed").items()} == wanted
    parts = tmp_path / "killed" / ".parts"
    for part in parts.glob("*.safetensors.*"):
        os.utime(part, (0, 0))
    there.entries.tidy()
    assert not list(parts.glob("*.safetensors.*"))
    assert there.entries._counted() == there.entries.size_bytes()


def test_several_workers_fill_and_read_one_cache(tmp_path: Path, paths: list[str]) -> None:
    whole = store(tmp_path / "whole")
    whole.fill(paths, progress=False)
    expected = {path: whole.load(path) for path in paths}
    shared = store(tmp_path / "shared")

    def work(seed: int) -> None:
        mine = random.Random(seed).sample(paths, len(paths))
        if seed == 0:
            shared.fill(paths, progress=False)
        for path in mine:
            torch.testing.assert_close(shared.load(path), expected[path], rtol=2e-3, atol=2e-3)

    children = [forked(lambda seed=seed: work(seed)) for seed in range(3)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert kept(tmp_path / "shared").keys() == kept(tmp_path / "whole").keys()


def test_a_damaged_entry_is_made_anew(tmp_path: Path, paths: list[str]) -> None:
    there = store(tmp_path / "cache")
    expected = there.load(paths[0])
    entry = there.entry(paths[0])
    for damage in (entry.read_bytes()[:-7], b"", b"\xff" * 40):
        entry.write_bytes(damage)
        again = store(tmp_path / "cache")
        assert torch.equal(again.load(paths[0]), expected)
        assert torch.equal(safetensors.torch.load_file(entry)["features"], expected)
        entry.write_bytes(damage[:9])
        assert store(tmp_path / "cache").frame_count(paths[0]) == len(expected)


def test_at_its_bound_the_cache_gives_up_what_other_runs_left_and_then_stores_no_more(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features_module, "WINDOW_CLIPS", 8)
    monkeypatch.setattr(features_module, "BATCH_CLIPS", 2)
    free = store(tmp_path / "free")
    free.fill(paths, progress=False)
    total = free.entries.size_bytes()
    root = tmp_path / "bound"
    # Another run, an hour ago: it used clip 1 last.
    other = store(root, encoding="padded")
    for number, path in enumerate(paths[:3]):
        other.load(path)
        os.utime(other.entry(path), (time.time() - 3600 + number * (number == 1),) * 2)
    monkeypatch.setattr(entries_module, "_BEGAN", time.time() - 60)
    there = store(root, max_gb=(0.6 * total + other.size_bytes(paths[1]) / 2) / 1e9)
    counts = there.fill(paths)
    assert counts["stored"] + counts["without_room"] == CLIPS
    assert 0.3 * CLIPS < counts["stored"] < 0.9 * CLIPS
    assert there.entries.size_bytes() <= (there.entries.max_bytes or 0)
    assert not any(other.entry(path).exists() for path in paths[:3])
    assert f"{counts['without_room']} clips are encoded anew at each use" in "".join(capsys.readouterr())
    # What was stored stays, whatever is asked for; what was not is the same as if it had been.
    mine = kept(there.folder).keys()
    for path in paths:
        torch.testing.assert_close(there.load(path), free.load(path), rtol=2e-3, atol=2e-3)
        assert there.frame_count(path) == free.frame_count(path)
    assert kept(there.folder).keys() == mine
    assert there.entries.size_bytes() <= (there.entries.max_bytes or 0)


def test_the_oldest_goes_first(tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    there = store(tmp_path)
    for number, path in enumerate(paths[:4]):
        there.load(path)
        os.utime(there.entry(path), (time.time() - 3600 - (number == 2),) * 2)
    monkeypatch.setattr(entries_module, "_BEGAN", time.time() - 60)
    room = there.entries.size_bytes() + there.predicted_bytes([duration_s(paths[4])]) - 100
    bound = store(tmp_path, max_gb=room / 1e9)
    bound.load(paths[4])
    assert [bound.entry(path).exists() for path in paths[:5]] == [True, True, False, True, True]
    bound.fill(paths[:2], progress=False)  # used now, so they stay
    for path in paths[5:8]:
        bound.load(path)
    assert [bound.entry(path).exists() for path in paths[:2]] == [True, True]
    assert not bound.entry(paths[3]).exists()


def test_features_that_do_not_fit_their_number_format_are_refused(tmp_path: Path, paths: list[str]) -> None:
    there = store(tmp_path)
    with torch.no_grad():
        there.model.encoder.layer_norm.weight.fill_(1e6)
    with pytest.raises(UserError, match=r"does not fit float16; set cache.dtype"):
        there.load(paths[0])
    assert not kept(tmp_path)
    wide = store(tmp_path, dtype="float32")
    wide.model.encoder.load_state_dict(there.model.encoder.state_dict())
    assert float(wide.load(paths[0]).abs().max()) > 1e5


def test_the_cache_verb_and_doctor_say_the_size_before_anything_is_encoded(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_tiny_models(monkeypatch, tmp_path)
    rows = [{"audio": path, "split": ("dev", "train")[number > 3]} for number, path in enumerate(paths)]
    write_jsonl(tmp_path / "manifest.jsonl", [*rows, {"audio": "gone.wav", "split": "train"}])
    sets = [
        "data.synthesize=null",
        f"data.manifests={tmp_path / 'manifest.jsonl'}",
        "data.train={split: train}",
        "data.test={split: dev}",
        "targets.tasks=null",
    ]
    command = ["cache", str(QUICKSTART), "--out", str(tmp_path / "run"), "--quiet"]
    command += [part for item in sets for part in ("--set", item)]
    there = store(tmp_path / "cache" / "features")
    foretold = there.predicted_bytes(map(duration_s, paths)) / 1e6
    assert _exit_code([*command, "--set", "cache.max_gb=1"]) == 0
    said = capsys.readouterr().out
    assert f"the features of {CLIPS} clips (0.3 minutes) take about {foretold:,.1f} MB" in said
    assert f"{CLIPS} stored, 0 found, 1 rejected, 0 without room" in said
    assert _exit_code([*command, "--set", "cache.max_gb=0.000001"]) == 0
    assert f"0 stored, {CLIPS} found" in capsys.readouterr().out
    assert _exit_code([*command, "--set", "trainable.encoder_lora={rank: 2}"]) == 2
    assert "trains the encoder, so its features cannot be cached" in capsys.readouterr().err

    tight = examine(load_recipe(QUICKSTART, [*sets, "cache.max_gb=0.000001"]))
    estimate = tight["recipe"]["estimate"]
    assert estimate["features_gb"] > 0
    assert f"about {estimate['features_gb']:.3g} GB" in as_text(tight)
    assert any("cache.max_gb allows 1e-06" in note for note in tight["recipe"]["notes"])
    live = examine(load_recipe(QUICKSTART, [*sets, "trainable.encoder_lora={rank: 2}"]))
    assert live["recipe"]["estimate"]["features_gb"] == 0
    assert any("nothing is cached" in note for note in live["recipe"]["notes"])


def test_the_cache_verb_takes_the_clips_of_every_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPEECH_LLM_CACHE", str(tmp_path / "cache"))
    recipe = saved_recipe(tmp_path / "saved")
    command = ["cache", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert _exit_code(command) == 0
    assert "clips: 12 stored, 0 found, 0 rejected" in capsys.readouterr().out
    trained = [{"name": name, "trainable": {"encoder_lora": {"rank": 2}}} for name in ("first", "second")]
    assert _exit_code([*command, "--set", f"phases={json.dumps(trained)}"]) == 2
    assert "trains the encoder, so its features cannot be cached" in capsys.readouterr().err


def test_the_encodings_are_compared_over_real_frames(tmp_path: Path, paths: list[str]) -> None:
    found = measure_encodings(*tiny_model(), paths[:3])
    assert found["frames"] == sum(store(tmp_path).frame_count(path) for path in paths[:3])
    assert [row["layer"] for row in found["layers"]] == [1, 2, 3]
    assert all(0 < row["difference"] < 1 and 0 < row["cosine"] <= 1 for row in found["layers"])
    assert found["seconds"]["padded"] > found["seconds"]["own_length"]


def test_a_trained_model_keeps_to_the_bound_and_the_format_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(
        monkeypatch, tmp_path, "cache.max_gb=0.5", "cache.dtype=float32", "optimizer.max_steps=1"
    )
    examples, _ = asked_tones(tmp_path / "clips", 2)
    write_examples(tmp_path / "examples.jsonl", examples)
    folder = tmp_path / "model"
    loop.train(recipe, tmp_path / "examples.jsonl", tmp_path / "train", folder, progress=False)
    model, processor = tiny_model()
    monkeypatch.setattr(
        speech_llm.model.SpeechLLMForConditionalGeneration, "from_pretrained", lambda *_, **__: model
    )
    monkeypatch.setattr(speech_llm.model.SpeechLLMProcessor, "from_pretrained", lambda *_: processor)
    features = load_speech_model(folder).features
    assert (features.entries.max_bytes, features.dtype) == (500_000_000, torch.float32)
    clip = str(examples[0].audio_parts()[0]["path"])
    assert features.entry(clip).exists()  # what training stored
