"""The driver of the distillation, which `distill_student` forks: one run of Ray Train.

What each worker does is `distill_worker`.
"""

import argparse
import os
import signal
import sys
import threading

import ray.train
from ray.exceptions import RayActorError

from ray_jobs import own_ray, recipes
from ray_jobs.imports import loop_of
from ray_jobs.recipes import CHECKPOINTS_KEPT, Recipe
from ray_jobs.stop_file import RUN, StopFile
from ray_jobs.trainer import Trainer
from services.core.errors import RefluxError
from services.core.settings import Settings


def main(argv: list[str] | None = None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    arguments = argparse.ArgumentParser(
        prog="python -m ray_jobs.distill_student",
        description="Distil the student, continuously.",
    )
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
    try:
        _trainer(settings, recipe).fit()
    except RayActorError as error:  # its controller is gone
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # Ray's own way out takes a second more


def _end_with_parent() -> None:
    """Nobody could stop it then, and whoever submits the job anew would have two."""
    os.read(0, 1)  # of a pipe that only ends
    os._exit(1)


def _trainer(settings: Settings, recipe: Recipe) -> Trainer:
    config = recipe.distill
    return Trainer(
        loop_of("ray_jobs.distill_worker"),
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
