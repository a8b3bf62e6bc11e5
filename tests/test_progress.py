from __future__ import annotations

import re

import pytest

from latentae.progress import Progress, duration, say


def test_a_non_terminal_gets_plain_lines_with_speed_and_time_left(capsys):
    with Progress("encoding", total=100, every=0.0) as progress:
        progress.advance(25, note="psnr 20")
        say("a line between")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"encoding: 25/100 img, [\d.e+]+ img/s, \d+ s left, psnr 20", lines[0])
    assert lines[1] == "a line between"
    assert "done in" in lines[2]


def test_resumed_work_does_not_count_for_the_speed(capsys):
    with Progress("x", total=1000, initial=900, every=1e9) as progress:
        progress.advance(10)
    assert progress.done == 910
    assert progress.speed * 1e-9 < 1e6
    assert "910/1000" in capsys.readouterr().err


def test_quiet_prints_nothing_and_an_error_prints_no_done(capsys):
    with Progress("x", total=1, quiet=True, every=0.0) as progress:
        progress.advance()
    try:
        with Progress("x", total=2, every=1e9) as progress:
            progress.advance()
            raise ValueError
    except ValueError:
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("training", total=10) as progress:
        progress.advance(5, note="loss 1")
        say("hello")
    error = capsys.readouterr().err
    assert "training" in error
    assert "hello" in error


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3570, "1 h 00 min"),
        (11100, "3 h 05 min"),
        (86400, "1 d 0 h"),
        (2e5, "2 d 8 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
