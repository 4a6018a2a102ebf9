"""A run folder of tiny random models, and the demo's page over real HTTP on loopback, for tests."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from learning import saved_recipe

from speech_llm.demo.app import Demo
from speech_llm.demo.server import Server
from speech_llm.files import write_jsonl
from speech_llm.model import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from speech_llm.recipe import load_recipe


def tiny_run(folder: Path) -> Path:
    """A run folder as `speech-llm run` leaves it: recipe, described test clips, model."""
    import torch
    from tiny_models import tiny_feature_extractor, tiny_tokenizer

    recipe = load_recipe(saved_recipe(folder))
    run = folder / "run"
    (run / "describe").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = []
        for number in numbers:
            gender = ("male", "female")[number % 2]
            rows.append(
                {
                    "id": f"c{number}",
                    "audio": str(folder / "clips" / f"c{number}.wav"),
                    "attributes": {"gender": gender, "duration": 0.7},
                    "how": {"gender": "given in column 'gender'"},
                    "description": f"A {gender} speaker is heard. The recording is 1 second long.",
                }
            )
        write_jsonl(run / "describe" / f"{split}.jsonl", rows)
    torch.manual_seed(0)
    model = SpeechLLMForConditionalGeneration.build(
        str(folder / "llm"),
        str(folder / "encoder"),
        connector={"type": "qformer", "queries": 3, "layers": 1, "heads": 2},
    )
    model.save_pretrained(run / "model")
    SpeechLLMProcessor(tiny_tokenizer(), tiny_feature_extractor("wav2vec2"), model.config).save_pretrained(
        run / "model"
    )
    return run


def tone(seconds: float = 0.7, rate: int = 16_000, level: float = 0.3, kind: str = "WAV") -> bytes:
    """A sound file's bytes: a tone of 200 Hz in two channels."""
    samples = level * np.sin(2 * np.pi * 200 * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([samples, 0.5 * samples], axis=1), rate, format=kind)
    return buffer.getvalue()


class Browser:
    """Asks one server as a browser would; `port` is its own."""

    def __init__(self, server: Server) -> None:
        self.server, self.port = server, int(server.server_address[1])
        self.demo = server.demo

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        status, _, data = self.request(method, path, body, **headers)
        return status, json.loads(data)

    def send(self, data: bytes, name: str = "a.wav") -> dict[str, Any]:
        status, clip = self.json("POST", "/clips", data, X_File_Name=name)
        assert status == 200, clip
        return dict(clip)

    def events(self, path: str, **asked: Any) -> list[dict[str, Any]]:
        status, _, data = self.request("POST", path, json.dumps(asked).encode())
        assert status == 200, data
        return [json.loads(line) for line in data.splitlines()]

    def ask(self, **asked: Any) -> dict[str, str]:
        """What each voice answered."""
        events = self.events("/ask", **asked)
        assert events[-1] == {"event": "done"}, events
        return {event["voice"]: event["text"] for event in events if event["event"] == "end"}


@contextlib.contextmanager
def page(demo: Demo, host: str = "127.0.0.1") -> Iterator[Browser]:
    """The page of a demo for the time of a block."""
    with Server(demo, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield Browser(server)
        finally:
            demo.stop()
            server.shutdown()
            thread.join()
