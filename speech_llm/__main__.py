"""`python -m speech_llm` is `speech-llm`."""

from speech_llm.cli import main

main()
