"""Who ends with whom: small trees of processes in the place of dvc, shell, launcher and stage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.core import lifetime

STAGE = """
import os, sys, time
from stages.core.lifetime import end_with_parent, stop_signal
with stop_signal() as stop:
    end_with_parent(interval_s=0.02)
    print(os.getpid(), flush=True)
    while not stop.received:
        time.sleep(0.02)
open(sys.argv[1], "w").write("stopped")
"""
LAUNCHER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, lambda *_: None)  # as torchelastic does, whatever nohup had asked for
worker = [sys.executable, "-c", os.environ["STAGE"], sys.argv[1]]
sys.exit(subprocess.call(worker, env=os.environ | {"TORCHELASTIC_RUN_ID": "1"}, start_new_session=True))
"""
STARTER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
subprocess.Popen(sys.argv[1:], start_new_session="SETSID" in os.environ)
input()
"""
PROGRAMS = {"STAGE": STAGE, "LAUNCHER": LAUNCHER}
ENDS = {
    "a stage": '"$PYTHON" -c "$STAGE" "$0"',
    "a stage under a launcher": '"$PYTHON" -c "$LAUNCHER" "$0"',
}


def tree(command, mark, **variables):
    """A starter that runs `sh -c COMMAND` with the path `mark`: the starter, and the stage's process id."""
    environment = {name: value for name, value in os.environ.items() if name != "_"}
    environment |= {"PYTHON": sys.executable, **PROGRAMS, **variables}
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, "bash", "-c", f"{command}; true", str(mark)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return starter, int(starter.stdout.readline())


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def waits_for(condition, limit_s=30):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("command", ENDS.values(), ids=ENDS)
def test_a_stage_ends_with_what_started_it(command, tmp_path):
    starter, stage = tree(command, tmp_path / "mark")
    starter.kill()
    starter.wait()
    assert waits_for(lambda: is_gone(stage))
    assert (tmp_path / "mark").read_text() == "stopped"


@pytest.mark.parametrize("command", [f"nohup {ENDS['a stage']}", f"nohup {ENDS['a stage under a launcher']}"])
@pytest.mark.slow
def test_under_nohup_a_stage_outlives_its_starter(command, tmp_path):
    starter, stage = tree(command, tmp_path / "mark")
    starter.kill()
    starter.wait()
    time.sleep(0.5)
    assert not is_gone(stage)
    os.kill(stage, signal.SIGKILL)


@pytest.mark.parametrize("command", ENDS.values(), ids=ENDS)
@pytest.mark.slow
def test_in_a_session_of_its_own_a_command_outlives_its_starter(command, tmp_path):
    starter, stage = tree(command, tmp_path / "mark", SETSID="1")
    starter.kill()
    starter.wait()
    time.sleep(0.5)
    assert not is_gone(stage)
    os.kill(stage, signal.SIGKILL)


def test_a_worker_ends_with_its_launcher(tmp_path):
    starter, stage = tree(ENDS["a stage under a launcher"], tmp_path / "mark", SETSID="1")
    os.kill(lifetime._parent_of(stage), signal.SIGKILL)
    assert waits_for(lambda: is_gone(stage))
    assert (tmp_path / "mark").read_text() == "stopped"
    starter.kill()
    starter.wait()


def test_a_launcher_s_echo_of_the_signal_ends_nothing_and_a_later_one_does(monkeypatch):
    with lifetime.stop_signal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    program = (
        "import os, signal\nfrom stages.core import lifetime\nlifetime.ECHO_S = 0.0\n"
        "with lifetime.stop_signal():\n  for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert b"alive" not in done.stdout


def test_the_first_ctrl_c_raises_a_flag_with_its_own_exit_code_and_the_second_ends_at_once():
    with pytest.raises(KeyboardInterrupt), lifetime.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert (stop.received, stop.code) == (True, 130)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_launcher_s_time_is_its_own_setting(monkeypatch):
    assert lifetime.granted_s() is None
    monkeypatch.setattr(lifetime, "_is_launched", lambda: True)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert lifetime.granted_s() == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert lifetime.granted_s() == 600


def test_an_interrupt_waits_for_the_end_of_a_block_and_one_that_is_ignored_stays_ignored():
    done = []
    with pytest.raises(KeyboardInterrupt), lifetime.interrupts_wait():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("all of it")
    assert done
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with lifetime.interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
