"""The process that begins the distillation's driver again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The driver says who it is, and lives until SIGTERM, after which it ends well, or until its parent
# is gone.
KEEP = """
import os, signal, sys
from ray_jobs import distill_student

def drive():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(os.getpid(), flush=True)
    os.read(0, 1)
    print("alone", flush=True)

distill_student.LASTING_S = float(sys.argv[1])
exec(sys.argv[2])
sys.exit(distill_student.keep(drive))
"""

# SIGTERM comes to the parent before the fork, and from there before the fork is ready for it.
FORK_LATE = """
import time

def late(fork=os.fork):
    os.kill(os.getpid(), signal.SIGTERM)
    driver = fork()
    time.sleep(0 if driver else 1)
    return driver

os.fork = late
"""


def test_a_killed_driver_is_begun_again_until_the_job_is_stopped() -> None:
    with _kept(lasting_s=0.0) as job:
        first = _line(job)
        os.kill(int(first), signal.SIGKILL)
        assert _line(job) != first
        job.terminate()
        assert job.wait(timeout=30) == 0


def test_a_driver_that_does_not_last_is_left_to_whoever_submits_the_job() -> None:
    with _kept(lasting_s=60.0) as job:
        os.kill(int(_line(job)), signal.SIGKILL)
        assert job.wait(timeout=30) == 128 + signal.SIGKILL


def test_a_driver_learns_that_its_parent_is_gone() -> None:
    with _kept(lasting_s=0.0) as job:
        assert _line(job)
        job.kill()
        assert _line(job) == "alone"


def test_a_job_that_is_stopped_while_it_forks_the_driver_stops() -> None:
    with _kept(lasting_s=0.0, first=FORK_LATE) as job:
        assert job.wait(timeout=30) == 128 + signal.SIGTERM


@contextmanager
def _kept(*, lasting_s: float, first: str = "") -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-c", KEEP, str(lasting_s), first]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        try:
            yield job
        finally:
            job.kill()


def _line(job: "subprocess.Popen[str]") -> str:
    assert job.stdout
    return job.stdout.readline().strip()
