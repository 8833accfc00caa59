"""Distil the student, continuously: predict each micro-batch of the stream, then learn it.

    ray job submit --working-dir . -- python -m ray_jobs.distill_student --recipe tiny_cpu

Starts from its checkpoint; without one it warms up on the offline log. Publishes a version every
`publish_every_s`, promotes it if the gate lets it through, takes up a new teacher without
stopping. SIGTERM (`ray job stop`): checkpoint, then exit 0.

This is the driver; what each worker does is `distill_worker`.
"""

import argparse
import os
import signal
import sys
import time
from typing import Any, Final

import ray.train
from ray.exceptions import RayActorError

from ray_jobs import own_ray, recipes
from ray_jobs.imports import importing
from ray_jobs.recipes import CHECKPOINTS_KEPT, Recipe
from ray_jobs.stop_file import RUN, StopFile
from ray_jobs.trainer import Trainer, free_places
from services.core.errors import RefluxError
from services.core.settings import Settings

LASTING_S: Final = 60.0  # a run that ends sooner isn't begun again here: it will end again


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--recipe", help=f"one of {', '.join(recipes.RECIPES)}")
    try:
        settings = Settings.load()
        recipe = recipes.chosen(settings, arguments.parse_args(argv).recipe)
    except (RefluxError, ValueError) as error:
        sys.exit(str(error))
    own_ray.join(niceness=recipe.distill.niceness)
    stop = StopFile(settings)
    stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # after Ray, which sets its own
    while True:
        began_s = time.monotonic()
        try:
            _trainer(settings, recipe).fit()
            return
        except RayActorError as error:  # its controller is gone
            print(error, file=sys.stderr, flush=True)
            if time.monotonic() - began_s < LASTING_S:
                os._exit(1)  # Ray's own way out takes a second more
            free_places()


def _trainer(settings: Settings, recipe: Recipe) -> Trainer:
    config = recipe.distill
    return Trainer(
        train_loop,
        {"settings": settings.environment(secrets=False), "recipe": recipe.name},
        scaling=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            placement_strategy=config.placement,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run=ray.train.RunConfig(
            name=RUN,
            storage_path=settings.checkpoints,
            # Ray Train's helper starts beside it: it goes first, and steps back once it learns.
            worker_runtime_env={"env_vars": {"RAY_worker_niceness": "0"}},
            failure_config=ray.train.FailureConfig(max_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
        ),
    )


def train_loop(given: dict[str, Any]) -> None:
    """One Ray Train worker. What it needs, torch above all, is imported there and not here: a job
    that is started again then learns sooner."""
    with importing():
        from ray_jobs.distill_worker import work

    work(given)


if __name__ == "__main__":
    main()
