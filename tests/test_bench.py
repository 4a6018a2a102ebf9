"""The benchmark runs, compares like with like, and says what it found."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from speech_llm.bench.run import ARMS, GOALS
from speech_llm.cli.app import app
from speech_llm.files import read_json


@pytest.mark.assets
def test_both_ways_have_the_same_loss_and_their_seconds_are_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["bench", "--quick", "--only", "ours, encoder padded", "--precision", "float32", "--json", str(tmp_path / "b.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = read_json(tmp_path / "b.json")
    plain, ours = found["arms"]["plain"], found["arms"]["ours, encoder padded"]
    assert found["rows"] == 8
    assert ours["loss"] == pytest.approx(plain["loss"], abs=2e-3)
    assert found["goals"]["equal loss"]["reached"]
    assert ours["tokens"] < plain["tokens"]
    assert plain["parts"]["encode"] > 0
    assert ours["parts"]["encode"] == 0
    assert ours["fill_parts"]["encode"] > 0
    for arm in (plain, ours):
        llm_s = arm["parts"]["LLM forward"] + arm["parts"]["backward"]
        assert arm["share_of_peak"] > 0
        # Two operations a weight, there and back: of the 106 million weights of the layers at least, of all 135 million at most
        # (and what tokens see of each other).
        assert 4 * 106e6 < 1e9 * arm["llm_gflops"] * llm_s / arm["tokens"] < 1.1 * 4 * 135e6
        assert arm["parts"]["LLM forward"] > 0
    assert "of matmul peak" in done.output
    assert set(GOALS) == {"cached", "first", "share_of_peak"}
    assert next(iter(ARMS)) == "plain"


def test_an_arm_that_there_is_not(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--only", "odd"])
    assert done.exit_code != 0
    assert "there is no arm 'odd'" in (done.output + str(done.exception))
