"""All probes of a recipe, as the training loop calls them; their cost is told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from eval.stats import Rate
from speech_llm.errors import UserError
from speech_llm.files import read_json, read_jsonl, write_json
from speech_llm.probes.forgetting import ForgettingProbe
from speech_llm.probes.form import Now, Probe, Series
from speech_llm.probes.json_format import JsonProbe
from speech_llm.probes.text_sets import GeneralProbe, SafetyProbe

if TYPE_CHECKING:
    from speech_llm.recipe import Recipe

BASE = "base.json"


class Probes:
    """Called by the loop: `begin` with the base LLM before anything that was trained is loaded, then at every place."""

    def __init__(self, recipe: Recipe, folder: Path, probes: list[Probe], progress: bool = False) -> None:
        """`folder`: where the base LLM's figures and the rows are kept."""
        self.recipe, self.folder, self.probes, self.progress = recipe, folder, probes, progress

    def begin(self, model: Any, processor: Any) -> None:
        """Measure the base LLM's own figures and keep them."""
        now = self._now(model, processor, None)
        base: dict[str, Series] = {}
        seconds: dict[str, float] = {}
        for probe in self.probes:
            started = time.perf_counter()
            base[probe.name] = probe.begin(now)
            seconds[probe.name] = round(time.perf_counter() - started, 2)
        write_json(self.folder / BASE, base)
        self._tell("of the base LLM", seconds)

    def __call__(self, model: Any, processor: Any, epoch: float) -> dict[str, Any]:
        """`{"probe": {PROBE: {SERIES: rate}}, "probe_seconds": {PROBE: seconds}}` of the model as it is."""
        now = self._now(model, processor, epoch)
        base = read_json(self.folder / BASE)
        found: dict[str, Series] = {}
        seconds: dict[str, float] = {}
        for probe in self.probes:
            started = time.perf_counter()
            found[probe.name] = probe.run(now, base.get(probe.name, {}))
            seconds[probe.name] = round(time.perf_counter() - started, 2)
        self._tell(f"at epoch {epoch:g}", seconds)
        return {"probe": found, "probe_seconds": seconds}

    def at_strength(self, responder: Any, scale: float) -> dict[str, Series]:
        """`{PROBE: {SERIES: rate}}` of a trained model whose adapters act at a strength."""
        now = replace(
            self._now(responder.model, responder.processor, scale),
            features=responder.features,
            name="strength-",
        )
        base = read_json(self.folder / BASE)
        with torch.inference_mode():
            return {probe.name: probe.run(now, base.get(probe.name, {})) for probe in self.probes}

    def _now(self, model: Any, processor: Any, epoch: float | None) -> Now:
        from speech_llm.training.loop import open_features

        # A model that goes on from an earlier training may have had its LLM trained there.
        text_is_base = bool(model.text_path_is_base) and self.recipe.start_from is None
        return Now(
            model=model,
            processor=processor,
            features=open_features(self.recipe, model, processor),
            epoch=epoch,
            text_is_base=text_is_base,
            folder=self.folder,
            batch_tokens=self.recipe.eval.batch_tokens,
        )

    def _tell(self, place: str, seconds: dict[str, float]) -> None:
        if self.progress and seconds:
            told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            tqdm.write(f"probes {place}: {told}")


def make_probes(recipe: Recipe, run_dir: Path, progress: bool = False) -> Probes | None:
    """The probes that `eval.probes` lists; None when there are none, or no clip to ask about."""
    made: list[Probe] = []
    for name in recipe.eval.probes:
        if name == "json":
            probe = JsonProbe(recipe, run_dir)
            if probe.items:
                made.append(probe)
        elif name == "forgetting":
            made.append(ForgettingProbe(recipe, run_dir))
        elif name == "general":
            made.append(GeneralProbe(recipe, run_dir))
        else:
            made.append(SafetyProbe(recipe, run_dir))
    return Probes(recipe, run_dir / "train" / "probes", made, progress) if made else None


def read_probes(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Rate]]]:
    """What a run's probes found: `[{"epoch", PROBE: {SERIES: rate}}]` in order, and the base LLM's own figures."""
    rows = [
        {"epoch": row["epoch"], **row["probe"]}
        for _, row in read_jsonl(run_dir / "train" / "log.jsonl")
        if row.get("probe")
    ]
    try:
        base = read_json(run_dir / "train" / "probes" / BASE)
    except UserError:  # a run without probes
        base = {}
    return rows, base
