"""Real signals to a real process that trains a RevNet."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memcnn
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import load, run_name
from properties.support import commands
from properties.support.runs import assert_same_run, run

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX; run on Linux or macOS")
PACKAGE = Path(memcnn.__file__).resolve().parent
RECIPE = override(SMOKE, batch_size=4, iterations=24, milestones=(10, 20), evaluate_every=4, test_images=20)
WORDS = """revnet38 cifar10 --recipe smoke --batch-size 4 --iterations 24 --milestones 10,20 --evaluate-every 4
    --test-images 20 --data generated --device cpu --threads 1""".split()
NAME = run_name("revnet38", "cifar10", RECIPE, 0, data="generated")


def process(*arguments: str, cwd: Path = PACKAGE.parent) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sigterm_and_the_same_command_again_give_the_same_bits(tmp_path):
    """``python train.py`` trains a RevNet until the signal, and ``python -m memcnn.train`` resumes it."""
    first = process("train.py", *WORDS, "--runs", str(tmp_path / "stopped"), cwd=PACKAGE)
    record = tmp_path / "stopped" / NAME / "record.json"
    while not record.exists():  # the first evaluation
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 3, err
    assert "(interrupted); resume with: " in out and "Traceback" not in err
    stopped = load(record)
    assert stopped.reason == "interrupted" and 4 <= stopped.iterations < 24

    second = process("-m", "memcnn.train", *WORDS, "--runs", str(tmp_path / "stopped"))
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert f"Resuming from iteration {stopped.iterations} " in err

    run(tmp_path / "whole", model="revnet38", recipe=RECIPE)
    assert load(record).interruptions == 1
    assert_same_run(tmp_path / "stopped" / NAME, tmp_path / "whole" / NAME)


def test_a_second_interrupt_kills_at_once(tmp_path):
    program = """if True:
        import time
        from memcnn.training.stopping import Stop
        with Stop() as stop:
            print("ready", flush=True)
            while not stop.reason(needed_seconds=0):
                time.sleep(0.01)
            print("asked to stop", flush=True)
            time.sleep(60)
    """
    output, errors = tmp_path / "output", tmp_path / "errors"
    running = commands.start("-c", program, output=output, errors=errors)

    def wait_for(text: str) -> None:
        while not output.exists() or text not in output.read_text():
            assert running.exitcode is None, errors.read_text()
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGINT)

    wait_for("ready\n")
    wait_for("asked to stop\n")
    running.join(10)
    assert running.exitcode == -signal.SIGINT
    assert "Ctrl-C again stops at once" in errors.read_text()
