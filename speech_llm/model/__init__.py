"""The model: configuration, processing, connectors, modeling; known to transformers' Auto classes once imported."""

import transformers
from transformers import AutoConfig, AutoProcessor

from speech_llm.model.build import build_model
from speech_llm.model.configuration import SpeechLLMConfig
from speech_llm.model.connectors import QFormerConnector, StackConnector
from speech_llm.model.modeling import SpeechLLMForConditionalGeneration
from speech_llm.model.processing import Rendered, SpeechLLMProcessor

AutoConfig.register(SpeechLLMConfig.model_type, SpeechLLMConfig, exist_ok=True)
AutoProcessor.register(SpeechLLMConfig, SpeechLLMProcessor, exist_ok=True)
for _name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"):
    if hasattr(transformers, _name):  # the last is not in the oldest version that we accept
        getattr(transformers, _name).register(
            SpeechLLMConfig, SpeechLLMForConditionalGeneration, exist_ok=True
        )

__all__ = [
    "QFormerConnector",
    "Rendered",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
    "StackConnector",
    "build_model",
]
