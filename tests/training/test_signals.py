from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import pytest

from latentae.errors import Interrupted
from latentae.training.launch import StopFlag


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a handler runs between two instructions of the main thread


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)],
    ids=lambda x: str(int(x)),
)
def test_a_signal_sets_the_flag_and_decides_the_exit_code(number, code, capsys):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.requested
        send(number)
        send(number) if number != signal.SIGINT else None
        assert stop.requested
        assert stop.signals == [signal.Signals(number).name]
    assert signal.getsignal(number) is before
    error = stop.interrupted("stopped")
    assert error.exit_code == code
    assert pickle.loads(pickle.dumps(error)).exit_code == code, "it goes from process to process"
    assert capsys.readouterr().err.count("finishing this step and saving") == 1


def test_a_process_that_another_one_told_to_stop_asks_for_a_requeue():
    with StopFlag() as stop:
        assert stop.interrupted("another process was signalled").exit_code == Interrupted.REQUEUE


def test_a_scheduler_after_ctrl_c_still_requeues():
    with StopFlag(announce=False) as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert stop.signals == ["SIGINT", "SIGTERM"]
    assert stop.interrupted("").exit_code == Interrupted.REQUEUE


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopFlag(announce=False):
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("not interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_where_nothing_can_be_lost_a_signal_ends_it_where_it_is(number):
    with StopFlag() as stop:
        started = time.monotonic()
        name = signal.Signals(number).name
        said = f"stopped by {name} before the first step; run the same command again to resume"
        with pytest.raises(Interrupted, match=said), stop.at_once():
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            time.sleep(60)
        assert time.monotonic() - started < 30
        with pytest.raises(Interrupted, match="before phase 1"), stop.at_once("before phase 1"):
            pytest.fail("began although it was to end")


@pytest.mark.parametrize("made_of_it", ["wrapped", "swallowed"])
def test_code_that_catches_the_interruption_does_not_hold_it_up(made_of_it):
    with StopFlag(announce=False) as stop, pytest.raises(Interrupted), stop.at_once():
        try:
            send(signal.SIGTERM)
        except BaseException as error:  # as a compiler may
            if made_of_it == "wrapped":
                raise RuntimeError("internal compiler error") from error


def test_errors_pass_and_later_signals_wait_again():
    with StopFlag(announce=False) as stop:
        with pytest.raises(ValueError, match="bug"), stop.at_once():
            raise ValueError("bug")
        with stop.at_once():
            pass
        send(signal.SIGTERM)  # raises nothing any more
        assert stop.requested


def test_outside_the_main_thread_nothing_is_installed():
    before = [signal.getsignal(number) for number in StopFlag.SIGNALS]
    found = []

    def run():
        with StopFlag() as stop, stop.at_once():
            found.append([signal.getsignal(number) for number in StopFlag.SIGNALS])
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_a_forked_worker_leaves_it_to_its_parent():
    with StopFlag() as stop:
        child = os.fork()
        if not child:
            send(signal.SIGUSR1)
            os._exit(int(stop.requested))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not stop.requested
