"""The one display of work that takes its time: a bar on a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SHOW_AFTER, SHOW_EVERY = 3.0, 10.0  # seconds: before the first sign, and between plain lines


class Progress:
    """How much of some work is done and how long the rest will take. Silent for what is over in SHOW_AFTER seconds."""

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, shown: bool = True):
        """`what`: the work in a word or two. `total` and `done` are counted in `unit` ("B": bytes); None: not known.

        `shown=False` keeps it silent, for all processes but the first.
        """
        self.what, self.total, self.unit = what, total, unit
        self.began_at = self.done = done
        self.shown = shown
        self.started = time.perf_counter()
        self.elapsed = 0.0
        self.next = SHOW_AFTER
        self.bar: tqdm | None = None

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        self.elapsed = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and self.elapsed >= self.next and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total,
                initial=self.done,
                unit=self.unit,
                unit_scale=self.unit == "B",
                desc=self.what,
                file=sys.stderr,
            )
            self.bar.start_t -= self.elapsed  # the time and the speed since the beginning of the work
            self.bar.initial = self.began_at
            self.bar.refresh()
        elif self.shown and self.elapsed >= self.next:
            self.next = self.elapsed + SHOW_EVERY
            self._print(self._line())

    def message(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            self._print(text)

    def close(self, note: str = "") -> None:
        """The end; `note` is shown with it if anything was shown before."""
        if self.bar is not None:
            self.bar.set_postfix_str(note)
            self.bar.close()
        elif self.next > SHOW_AFTER and note:
            self._print(f"{self.what}: {self._count(self.done)} in {tqdm.format_interval(self.elapsed)}, {note}")

    def _line(self) -> str:
        if self.total is None:
            return f"{self.what}: {self._count(self.done)} so far"
        left = self.elapsed / max(self.done - self.began_at, 1) * (self.total - self.done)
        done = self._count(self.done) if self.unit == "B" else str(self.done)
        return f"{self.what}: {done} of {self._count(self.total)}, {tqdm.format_interval(left)} left"

    def _count(self, number: int) -> str:
        return tqdm.format_sizeof(number, "B") if self.unit == "B" else f"{number} {self.unit}s"

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
