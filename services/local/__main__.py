"""The supervisor behind `reflux up`: `python -m services.local`. SIGTERM stops the stack."""

import logging
import signal
import sys
import threading
from types import FrameType

from services.core import logs
from services.core.errors import RefluxError
from services.core.settings import Settings
from services.local.jobs import Jobs
from services.local.learning import LearningJobs
from services.local.stack import Stack

log = logging.getLogger("reflux.supervisor")
LOOK_EVERY_S = 0.5


def main() -> int:
    settings = Settings.load()
    logs.configure(settings)
    stopping = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if not stopping.is_set():
            stopping.set()
            raise KeyboardInterrupt  # ends a start that is still waiting, too

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    stack = Stack(settings, report=log.info)
    try:
        stack.start()
    except RefluxError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 0
    jobs = Jobs(stack.settings, embedded=stack.embedded_ray)
    learning = LearningJobs(stack.settings, jobs, report=log.info)
    try:
        while not stopping.wait(LOOK_EVERY_S):
            look(stack, learning)
    except KeyboardInterrupt:
        log.info("stopping")
    finish(stack, jobs)
    return 0


def look(stack: Stack, learning: LearningJobs) -> None:
    """One round of supervision; trouble in it is reported and met again next round."""
    try:
        stack.supervise()
        if stack.settings.learn:
            learning.tick()
    except (RefluxError, OSError, RuntimeError) as error:
        log.warning("supervision: %s", error)


def finish(stack: Stack, jobs: Jobs) -> None:
    """Let the distillation job checkpoint, then stop everything."""
    try:
        jobs.stop("student", timeout_s=20.0)
    except (RefluxError, OSError, RuntimeError) as error:
        log.warning("the distillation job could not be asked to stop: %s", error)
    finally:
        stack.stop()


if __name__ == "__main__":
    sys.exit(main())
