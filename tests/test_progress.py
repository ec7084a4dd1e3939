"""The progress display: silent for short work, plain lines for a file, a bar for a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from torch_utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `time.perf_counter` gives, one after the other."""

    def set_to(*seconds: float) -> None:
        times = iter(seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: next(times))

    return set_to


def test_plain_lines_where_there_is_no_terminal(clock, capsys):
    clock(0.0, 1.0, 4.0, 5.0, 20.0)
    with Progress("distilling", 100, "network row") as progress:
        for count in (10, 30, 10, 25):
            progress.advance(count)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "distilling: 40 of 100 network rows, 00:06 left",
        "distilling: 75 of 100 network rows, 00:06 left",
    ]


def test_what_was_there_before_does_not_count_as_speed(clock, capsys):
    clock(0.0, 10.0)
    with Progress("fetching x.pt", 4_000_000, "B", done=2_000_000) as progress:
        progress.advance(1_000_000)
    assert capsys.readouterr().err == "fetching x.pt: 3.00MB of 4.00MB, 00:10 left\n"


def test_an_unknown_total(clock, capsys):
    clock(0.0, 10.0)
    with Progress("fetching x.csv", None, "B") as progress:
        progress.advance(5_000)
    assert capsys.readouterr().err == "fetching x.csv: 5.00kB so far\n"


def test_short_work_and_other_processes_are_silent(clock, capsys):
    clock(0.0, 2.9, 0.0, 60.0)
    for shown in (True, False):
        with Progress("scoring", 2, "image", shown=shown) as progress:
            progress.advance(1)
            progress.close("all of it waiting for files")
    assert capsys.readouterr() == ("", "")


def test_the_note_comes_with_what_was_shown(clock, capsys):
    clock(0.0, 4.0, 6.0)
    progress = Progress("scoring with hps", 20, "image")
    progress.advance(10)
    progress.message("not scored: a.png")
    progress.advance(10)
    progress.close("7% of it waiting for files")
    assert capsys.readouterr().err.splitlines()[1:] == [
        "not scored: a.png",
        "scoring with hps: 20 images in 00:06, 7% of it waiting for files",
    ]


def test_a_bar_with_the_time_left_on_a_terminal(clock, monkeypatch):
    clock(0.0, 4.0, 5.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("sampling with ddim", 8, "image", done=0) as progress:
        progress.advance(2)
        progress.advance(6)
    shown = terminal.getvalue()
    assert "sampling with ddim:  25%" in shown and "2/8 [00:04<00:12" in shown
    assert "8/8" in shown
