"""Distil the student, continuously: predict each micro-batch of the stream, then learn it.

    ray job submit --working-dir . -- python -m ray_jobs.distill_student --recipe tiny_cpu

Starts from its checkpoint; without one it warms up on the offline log. Publishes a version every
`publish_every_s`, promotes it if the gate lets it through, takes up a new teacher without
stopping. SIGTERM (`ray job stop`): checkpoint, then exit 0.

This process only begins the driver, and begins it again when it was killed: seconds sooner than
whoever submits the job anew. The driver is `distill_driver`; what each worker does is
`distill_worker`.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Final

LASTING_S: Final = 60.0  # a driver that ends sooner isn't begun again here: it will end again


def keep(command: Sequence[str]) -> int:
    """Run it until it ends well, is asked to by SIGTERM or SIGINT, or doesn't last; its exit code.

    Its standard input stays open as long as this process lives.
    """
    stopping = False
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if child and number == signal.SIGTERM:  # a terminal's SIGINT has reached it already
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        began_s = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        if stopping:  # while it was being started
            child.terminate()
        code = child.wait()
        if code == 0 or stopping or time.monotonic() - began_s < LASTING_S:
            return code if code >= 0 else 128 - code  # as a shell tells what a signal has ended
        print(f"the driver ended with {code}: beginning it again", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(keep([sys.executable, "-m", "ray_jobs.distill_driver", *sys.argv[1:]]))
