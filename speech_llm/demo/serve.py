"""From what was typed to a page that can be opened: `speech-llm demo`."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from speech_llm.chat_server import ServerSettings
from speech_llm.demo.app import Demo
from speech_llm.demo.run_folder import find_run, read_offer
from speech_llm.demo.server import Server, is_loopback
from speech_llm.demo.voices import Voices
from speech_llm.errors import UserError
from speech_llm.responders import load_responder


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    run: Path | None = None,
    use: Sequence[str] = (),
    max_new_tokens: int = 128,
    open_browser: bool = False,
    server_settings: ServerSettings | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until it is interrupted. Raises `UserError` where it cannot begin.

    `run`: whose instructions and clips are offered (default: the model's own). `use`: describers of other sounds.
    """
    from describers.named import check_name
    from describers.run import DESCRIBERS

    for item in use:
        check_name(
            item, [known for known in DESCRIBERS if known != "labels"]
        )  # of a recording there are none
    reference, found = find_run(model)
    offer = read_offer(run or found)
    with tempfile.TemporaryDirectory(prefix="speech-llm-demo-") as name:
        folder = Path(name)
        # Sounds that people send, and what was made of them, are gone with the folder.
        responder = load_responder(
            reference, max_new_tokens=max_new_tokens, server=server_settings, features=folder / "features"
        )
        demo = Demo(Voices(responder, model, offer, use), folder, max_new_tokens)
        with Server(demo, host, port) as server, ending_by_signal():
            prepare(demo, say)
            if not is_loopback(host):
                say(
                    f"warning: whoever reaches {host} can use this model, there is no password; browsers give their microphone only "
                    "to pages on loopback or with https (from elsewhere better: ssh -L)"
                )
            say(f"open {server.url}   (Ctrl-C ends it)")
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
            thread.start()
            if open_browser and not webbrowser.open(server.url):
                say("no browser could be opened from here; open the address by hand")
            try:
                while thread.is_alive():
                    thread.join(0.5)
            except KeyboardInterrupt:
                say("\nstopped; the sounds that were sent are deleted")
            finally:
                demo.stop()
                server.shutdown()


def prepare(demo: Demo, say: Callable[[str], None]) -> None:
    """Load the describers, so that the first sound need not wait for them; without them the page goes on."""
    voices = demo.voices
    if not voices.use:
        return
    say(f"loading describers: {', '.join(voices.use)} ...")
    examples = demo.clips.examples()
    try:
        if examples:
            voices.describe(replace(examples[0], id="first", description=None), demo.folder)
        else:
            voices.load_describers()
    except UserError as error:
        voices.use = ()
        say(f"warning: sounds are not described: {error}")


@contextlib.contextmanager
def ending_by_signal() -> Iterator[None]:
    """`kill` ends the page as Ctrl-C does, so that it too leaves no recording behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
