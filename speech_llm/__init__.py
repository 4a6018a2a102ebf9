"""speech-llm: teach an existing text LLM to hear without making it forget."""

__version__ = "0.1.0"
