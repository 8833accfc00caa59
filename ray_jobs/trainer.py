"""Ray Train, with what our jobs use of it and no more."""

import os
from collections.abc import Callable
from typing import Any

import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_jobs.rendezvous import RendezvousConfig

SETTINGS = {
    # report() waits for the controller's next look: 1.5 s at the default of 2 s.
    "HEALTH_CHECK_INTERVAL_S": "0.1",
    "ENABLE_PRINT_PATCH": "0",  # it prints every line twice
    # An actor for each run (200 MB, one more process to wait for) that asks whether the cloud
    # is about to take a node away. A node that is gone costs us seconds without it, too.
    "ENABLE_PREEMPTION_WATCHER": "0",
}


class Trainer(DataParallelTrainer):
    """`DataParallelTrainer` whose workers share a process group, without two of its processes.

    Those take 200 MB each, and a worker that starts beside them is seconds later on two cores. One
    deals out Ray Data sets; ours come in other ways. The other, which outlives the run, frees the
    workers' place when the run's controller dies and its job does not: ours do. (It also asks the
    Ray that the environment names whether the controller lives, which on a machine with several
    may be another one, and ends a training in good health.)
    """

    def __init__(
        self,
        train_loop: Callable[[dict[str, Any]], None],
        given: dict[str, Any],
        *,
        scaling: ray.train.ScalingConfig,
        run: ray.train.RunConfig,
    ) -> None:
        for name, value in SETTINGS.items():  # read once a trainer starts
            os.environ.setdefault(f"RAY_TRAIN_{name}", value)
        super().__init__(
            train_loop,
            train_loop_config=given,
            backend_config=RendezvousConfig(use_gpu=bool(scaling.use_gpu)),
            scaling_config=scaling,
            run_config=run,
        )

    def _create_default_callbacks(self) -> list[Any]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, without)]
