"""Several processes that `accelerate launch` started, outside of training: one leads, the others wait and follow, one tells of a failure.

The main process alone does what only one may do (manifests, answers, evaluation, printing) and calls the others for what all do together.
They talk through the store of the launch (key -> value) and not through a process group, whose waiting ends after a time limit and keeps
a device busy; that group is made when training begins.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.2
# A launcher ends all processes as soon as one has ended, so those with nothing to say leave the one that has the time to say it.
TELL_S = 1.0


class OtherFailed(Exception):
    """Another process of the launch has failed, and says why. `code`: the exit code of all."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process of this launch failed with exit code {code}")
        self.code = code


class Launch:
    """The processes of a launch; without a store there is one, and every method does nothing."""

    def __init__(self, store: Any = None, main: bool = True) -> None:
        """`store`: a `torch.distributed.Store` that all share. `main`: whether this process leads."""
        self._store, self.main = store, main
        self._number, self._ended = 0, False

    def call(self, part: dict[str, Any]) -> None:
        """As the main process: let the others begin `part` (JSON)."""
        if self._store is not None:
            self._store.set(f"part-{self._number}", json.dumps(part))
            self._number += 1

    def end(self) -> None:
        """As the main process: let the others leave; what follows needs them no more."""
        if self._store is not None and not self._ended:
            self.call({})
            self._leave()

    def follow(self, do: Callable[[dict[str, Any]], None]) -> None:
        """As another process: do every part that the main one calls for, until it lets go.

        Raises `OtherFailed` when another process fails or the store is gone.
        """
        while part := json.loads(self._wait(f"part-{self._number}")):
            self._number += 1
            do(part)
        self._leave()

    def fails(self, code: int) -> int | None:
        """Note that this process fails with an exit code. None for the first, which is to say why; for others the first one's code."""
        if self._store is None:
            return None
        try:
            if self._store.add("failures", 1) == 1:
                self._store.set("exit code", str(code))
                return None
            first = int(self._store.get("exit code"))
        except RuntimeError:  # the launcher, which holds the store, is gone
            first = code
        time.sleep(TELL_S)
        return first

    def _wait(self, key: str) -> bytes:
        while True:
            try:
                if self._store.check(["exit code"]):
                    raise OtherFailed(int(self._store.get("exit code")))
                if self._store.check([key]):
                    value: bytes = self._store.get(key)
                    return value
            except RuntimeError:
                raise OtherFailed(1) from None
            time.sleep(POLL_S)

    def _leave(self) -> None:
        from torch import distributed

        self._ended = True
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()


@functools.cache
def launched() -> Launch:
    """The launch that this process belongs to, by the variables that launchers set for torch; alone without them."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return Launch()
    from torch.distributed import PrefixStore, rendezvous

    store, rank, _ = next(rendezvous("env://"))
    return Launch(PrefixStore("speech-llm", store), rank == 0)
