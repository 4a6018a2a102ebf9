"""The recipe's section `eval`: what is asked of the trained model, and what is watched while it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from speech_llm.recipe_section import NotNegative, Positive, Section, Text

ModelName = Literal["speech_llm", "ceiling", "teacher", "cascade"]
GeneralName = Literal["knowledge", "reasoning", "arithmetic", "code", "tool_call", "translation"]
ProbeName = Literal["json", "forgetting", "general", "safety"]


class JsonProbeSection(Section):
    attributes: list[Text] = Field(
        default_factory=list, description="attributes asked for; empty = eval.attributes"
    )
    limit: NotNegative = Field(
        default=48, description="clips asked in the wording that training may have seen"
    )
    other_wordings: NotNegative = Field(
        default=24, description="clips asked in other wordings, with keys and shapes that no target has"
    )
    max_new_tokens: Positive = Field(default=32, description="longest answer, tokens")


class ForgettingProbeSection(Section):
    limit: Positive = Field(default=24, description="clips, and text prompts, that the base LLM answers")
    max_new_tokens: Positive = Field(default=32, description="its longest answer, tokens")


class GeneralProbeSection(Section):
    sets: list[GeneralName] | None = Field(default=None, description="sets of general text; null = all six")
    limit: Positive | None = Field(default=20, description="items of each set; null = all")
    with_sound: bool = Field(
        default=True, description="ask them also in a conversation that holds a clip, where adapters act"
    )


class SafetyProbeSection(Section):
    limit: Positive | None = Field(default=20, description="requests of each kind; null = all")
    spoken: bool = Field(default=True, description="ask them also spoken (by eSpeak NG)")
    max_new_tokens: Positive = Field(default=40, description="longest answer, tokens")


class EvalSection(Section):
    attributes: list[Text] = Field(default_factory=list, description="attributes tested, one task each")
    transcript: bool = Field(default=True, description="test what was said (word error rate)")
    text_column: Text = Field(default="text", description="manifest column with the true words")
    prompts: Text = Field(description="prompt pool of the test, relative to the recipe file")
    prompts_per_clip: Positive | None = Field(
        default=None, description="prompts that a clip is asked per task; null = all"
    )
    limit: Positive | None = Field(default=None, description="at most so many instances per task")
    limits: dict[ModelName, Positive] = Field(default_factory=dict, description="the same for single models")
    probes: list[ProbeName] = Field(
        default=["json"],
        description="what is watched before training, after the warm-up and after every epoch",
    )
    probe_every: Positive | None = Field(
        default=None, description="also every so many steps while it trains; null = at epochs only"
    )
    json_probe: JsonProbeSection = Field(
        default_factory=JsonProbeSection, description="probe json: does it still answer in JSON"
    )
    forgetting_probe: ForgettingProbeSection = Field(
        default_factory=ForgettingProbeSection,
        description="probe forgetting: divergence from the base LLM on its own answers, about sounds and about text",
    )
    general_probe: GeneralProbeSection = Field(
        default_factory=GeneralProbeSection,
        description="probe general: knowledge, reasoning, arithmetic, code, tool calls, translation",
    )
    safety_probe: SafetyProbeSection = Field(
        default_factory=SafetyProbeSection,
        description="probe safety: harmful requests refused, harmless ones not, who it says it is",
    )
    lora_scales: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=list,
        description="strengths at which the LLM's adapters are tried as well (1 = as trained, 0 = the base LLM): all tasks and probes "
        "for each",
    )
    ifeval: NotNegative = Field(
        default=0,
        description="instances of each Speech-IFEval-like task about the test clips (closed, without constraint, creative); 0 = none",
    )
    models: list[ModelName] = Field(
        default=["speech_llm", "ceiling", "teacher", "cascade"], description="who answers the tasks"
    )
    max_new_tokens: Positive = Field(default=48, description="longest answer, tokens")
    batch_tokens: Positive = Field(default=4096, description="tokens generated side by side")
