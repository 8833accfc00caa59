"""Distil the student, continuously: predict each micro-batch of the stream, then learn it.

    ray job submit --working-dir . -- python -m ray_jobs.distill_student --recipe tiny_cpu

Starts from its checkpoint; without one it warms up on the offline log. Publishes a version every
`publish_every_s`, promotes it if the gate lets it through, takes up a new teacher without
stopping. SIGTERM (`ray job stop`): checkpoint, then exit 0.

This process only forks the driver, with all that it imports, and does so again when it was killed:
seconds sooner than whoever submits the job anew. The driver is `distill_driver`; what each worker
does is `distill_worker`.
"""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Final

from ray_jobs import distill_driver

LASTING_S: Final = 20.0  # a driver that ends sooner isn't begun again here: it will end again
STOPS: Final = (signal.SIGTERM, signal.SIGINT)


def keep(drive: Callable[[], None]) -> int:
    """Run it in a fork until it ends well, is asked to by SIGTERM or SIGINT, or doesn't last; its
    exit code.

    The fork's standard input ends with this process.
    """
    stopping = False
    driver = 0

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if driver and number == signal.SIGTERM:  # a terminal's SIGINT has reached it already
            with suppress(ProcessLookupError):
                os.kill(driver, signal.SIGTERM)

    gc.freeze()  # a collection in the fork would write to, and so copy, every page
    for number in STOPS:
        signal.signal(number, stop)
    while True:
        began_s = time.monotonic()
        standard_input, held_open = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the fork would take one as `stop` does
        driver = os.fork()
        if driver == 0:
            os.dup2(standard_input, 0)
            os.close(held_open)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            drive()
            sys.exit()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        os.close(standard_input)
        if stopping:  # since the last one ended
            os.kill(driver, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
        driver = 0
        os.close(held_open)
        if code == 0 or stopping or time.monotonic() - began_s < LASTING_S:
            return code if code >= 0 else 128 - code  # as a shell tells what a signal has ended
        print(f"the driver ended with {code}: beginning it again", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(keep(distill_driver.main))
