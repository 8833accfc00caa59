"""The supervisor behind `reflux up`: `python -m services.local`. SIGTERM stops the stack."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from services.core import logs
from services.core.errors import RefluxError
from services.core.settings import Settings
from services.local import processes
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

    processes.on_ending(stop)
    stack = Stack(settings, report=log.info)
    try:
        with started(stack) as jobs:
            learning = LearningJobs(stack.settings, jobs, report=log.info)
            try:
                while not stopping.wait(LOOK_EVERY_S):
                    look(stack, learning)
            except KeyboardInterrupt:
                log.info("stopping")
    except RefluxError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


@contextmanager
def started(stack: Stack) -> Iterator[Jobs]:
    """Start the stack; at the end, whatever it is, let the student checkpoint and stop it all."""
    stack.start()
    try:
        jobs = Jobs(stack.settings, embedded=stack.embedded_ray)
        try:
            yield jobs
        finally:
            _let_checkpoint(jobs)
    finally:
        stack.stop()


def look(stack: Stack, learning: LearningJobs) -> None:
    """One round of supervision; trouble in it is reported and met again next round."""
    looks = [stack.supervise, learning.tick] if stack.settings.learn else [stack.supervise]
    for look_after in looks:
        try:
            look_after()
        except (RefluxError, OSError, RuntimeError) as error:
            log.warning("supervision: %s", error)


def _let_checkpoint(jobs: Jobs) -> None:
    try:
        jobs.stop("student", timeout_s=20.0)
    except (RefluxError, OSError, RuntimeError) as error:
        log.warning("the distillation job could not be asked to stop: %s", error)


if __name__ == "__main__":
    sys.exit(main())
