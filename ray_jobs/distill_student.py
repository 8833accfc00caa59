"""Distil the student, continuously: predict each micro-batch of the stream, then learn it.

    ray job submit --working-dir . -- python -m ray_jobs.distill_student --recipe tiny_cpu

Starts from its checkpoint; without one it warms up on the offline log. Publishes a version every
`publish_every_s`, promotes it if the gate lets it through, takes up a new teacher without
stopping. SIGTERM (`ray job stop`): checkpoint, then exit 0.

This is the driver; what each worker does is `distill_worker`.
"""

import argparse
import signal
import sys
from typing import Any

import pyarrow.fs
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_jobs import own_ray, recipes
from ray_jobs.recipes import CHECKPOINTS_KEPT
from ray_jobs.rendezvous import RendezvousConfig, prepare_ray_train
from services.core.errors import RefluxError
from services.core.settings import Settings

RUN = "distill_student"
STOP = "stop"  # a file beside the checkpoints: the driver asks the workers to end


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--recipe", help=f"one of {', '.join(recipes.RECIPES)}")
    try:
        settings = Settings.load()
        recipe = recipes.chosen(settings, arguments.parse_args(argv).recipe)
    except (RefluxError, ValueError) as error:
        sys.exit(str(error))
    prepare_ray_train()
    own_ray.join(niceness=recipe.distill.niceness)
    stop = StopFile(settings)
    stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # after Ray, which sets its own
    config = recipe.distill
    DataParallelTrainer(
        train_loop,
        train_loop_config={"settings": settings.environment(secrets=False), "recipe": recipe.name},
        backend_config=RendezvousConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            placement_strategy=config.placement,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=RUN,
            storage_path=settings.checkpoints,
            # Ray Train starts four helpers beside it: it goes first, and steps back once it learns.
            worker_runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    ).fit()


class StopFile:
    """How the driver, which gets the SIGTERM, tells the workers, wherever they are."""

    def __init__(self, settings: Settings) -> None:
        uri = f"{settings.checkpoints}/{RUN}"
        self._fs: pyarrow.fs.FileSystem = pyarrow.fs.LocalFileSystem()
        self._directory = uri
        if "://" in uri:
            self._fs, self._directory = pyarrow.fs.FileSystem.from_uri(uri)
        self._path = f"{self._directory}/{STOP}"

    def set(self) -> None:
        self._fs.create_dir(self._directory, recursive=True)
        self._fs.open_output_stream(self._path).close()

    def clear(self) -> None:
        if self.is_set():
            self._fs.delete_file(self._path)

    def is_set(self) -> bool:
        found = self._fs.get_file_info(self._path).type
        return bool(found != pyarrow.fs.FileType.NotFound)


def train_loop(given: dict[str, Any]) -> None:
    """One Ray Train worker. What it needs, torch above all, is imported there and not here: a job
    that is started again then learns sooner."""
    from ray_jobs.distill_worker import work

    work(given)


if __name__ == "__main__":
    main()
