"""How a worker stays in its Kafka group amid work that takes longer than the group waits."""

import time
from collections.abc import Callable
from typing import Final

from kafka import KafkaConsumer

BREATHE_S: Final = 1.0  # between two polls


class PartitionsMovedError(Exception):
    """The group has shared out its partitions anew."""


def breathing(consumer: KafkaConsumer, n_moves: Callable[[], int]) -> Callable[[], None]:
    """What tells the group that its consumer lives, once a second, however often it is called:
    whoever hasn't polled for five minutes loses its partitions, and a rebuild of millions of users
    takes longer.

    `n_moves`: how often the group has shared out its partitions. `PartitionsMovedError` is raised
    once that is more than now: another worker may write there by then.
    """
    moves_before, due_s = n_moves(), time.monotonic() + BREATHE_S

    def breathe() -> None:
        nonlocal due_s
        if time.monotonic() < due_s:
            return
        consumer.pause(*consumer.assignment())
        consumer.poll(timeout_ms=0)  # what comes of partitions not yet resumed comes again
        consumer.resume(*consumer.paused())
        if n_moves() != moves_before:
            raise PartitionsMovedError
        due_s = time.monotonic() + BREATHE_S

    return breathe
