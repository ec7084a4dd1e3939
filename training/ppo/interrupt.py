"""Ctrl-C, SIGTERM and SIGUSR1 end a run at the next step boundary instead of in the middle of a step."""

from __future__ import annotations

import signal
from types import FrameType

from torch_utils import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While open (`with`), remembers the first such signal in `signum`; a second one takes its usual effect at once.

    SIGUSR1, by which schedulers announce that time is up, is remembered as SIGTERM.
    """

    def __init__(self):
        self.signum = 0
        self._previous = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum
        distributed.print0(f"{signal.Signals(signum).name}: finishing this step and saving; once more ends at once")
        self.__exit__()
