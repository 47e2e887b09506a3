import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from mbv2.train import signals
from mbv2.train.signals import EXIT_PREEMPTED, StopRequest


def test_the_exit_code_for_preemption_is_75():
    assert EXIT_PREEMPTED == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_stops_nothing(number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_the_handlers_from_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError, match="inside"), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError("inside")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_stops_at_once(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_one_ctrl_c_passed_on_by_the_launcher_is_still_one(monkeypatch):
    clock = iter([10.0, 10.3])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_it_can_be_used_outside_the_main_thread():
    seen = []

    def use():
        with StopRequest() as stop:
            seen.append(stop.requested)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before


_TWO_RANKS = """
import os, signal, sys
from pathlib import Path
from mbv2 import distributed
from mbv2.train.agreement import Control
from mbv2.train.signals import StopRequest

world = distributed.init("CPU")
stopped = None
control = Control(world)
with StopRequest() as stop:
    for step in range(6):
        if world.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if control.stop(stop.requested, None):
            stopped = step
            break
Path(sys.argv[1], f"rank{world.rank}").write_text(f"{stopped} {stop.requested}")
distributed.shutdown()
distributed.leave(0)
"""


def test_all_ranks_stop_at_the_same_step_when_one_is_signalled(tmp_path):
    script = tmp_path / "stop.py"
    script.write_text(_TWO_RANKS)
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3 False", "3 True"]
