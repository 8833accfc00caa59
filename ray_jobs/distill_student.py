"""Distil the student, continuously: predict each micro-batch of the stream, then learn it.

    ray job submit --working-dir . -- python -m ray_jobs.distill_student --recipe tiny_cpu

Starts from its checkpoint; without one it warms up on the offline log. Publishes a version every
`publish_every_s`, promotes it if the gate lets it through, takes up a new teacher without
stopping. SIGTERM (`ray job stop`): checkpoint, then exit 0.

Reads downward: entry, worker, resume; the loop itself is `distiller.Distiller`.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
from ray.train.torch import TorchTrainer

from ray_jobs import checkpoint, own_ray, recipes
from ray_jobs.checkpoint import CHECKPOINTS_KEPT, State
from ray_jobs.distiller import Distiller
from ray_jobs.peers import Peers
from ray_jobs.recipes import Recipe
from ray_jobs.rendezvous import RendezvousConfig
from ray_jobs.stream import EventStream
from ray_jobs.teachers import Teachers
from ray_jobs.warm_up import first_state, warm_up
from services.core.errors import RefluxError
from services.core.kafka import ensure_topics
from services.core.settings import Settings

logger = logging.getLogger("distill")

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
    # report() waits for the controller's next look; Train's default of 2 s would stall the stream.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    own_ray.join()
    stop = StopFile(settings)
    stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # after Ray, which sets its own
    config = recipe.distill
    TorchTrainer(
        train_loop,
        train_loop_config={"settings": settings.environment(secrets=False), "recipe": recipe.name},
        torch_config=RendezvousConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            placement_strategy=config.placement,
            resources_per_worker={"CPU": config.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=RUN,
            storage_path=settings.checkpoints,
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
    """One Ray Train worker: start, then tick until told to stop."""
    logging.getLogger("kafka").setLevel(logging.WARNING)  # it tells of every connection
    os.environ.update(given["settings"])
    settings = Settings.load()
    recipe = recipes.load(given["recipe"])
    context = ray.train.get_context()
    peers = Peers(context.get_world_rank(), context.get_world_size())
    os.nice(recipe.distill.niceness)
    torch.set_num_threads(recipe.distill.threads_per_worker)
    torch.manual_seed(settings.seed)  # one student for all
    ensure_topics(settings)
    state = resume(recipe, peers)
    if state is None:
        state = first_state(settings, recipe, peers)
        torch.manual_seed(settings.seed + peers.rank)  # dropout of its own for each
    teachers = Teachers(
        settings.registry,
        config=recipe.distill,
        width=recipe.student.teacher_dim,
        first=state.counters.first_teacher,
        peers=peers,
    )
    teachers.align(state.catalog)
    teachers.start()
    if state.frozen is None:
        warm_up(state, teachers, recipe.distill, peers)
    stream = EventStream(settings, state.positions, rank=peers.rank, world=peers.world)
    distiller = Distiller(
        state,
        stream,
        teachers,
        settings=settings,
        config=recipe.distill,
        peers=peers,
        keep=lambda: report(state, peers),
    )
    if settings.student_metrics_port and peers.rank == 0:
        distiller.telemetry.serve(host=settings.host, port=settings.student_metrics_port)
    stop = StopFile(settings)
    distiller.begin()
    try:
        while not peers.gather(stop.is_set())[0]:
            distiller.tick()
        distiller.checkpoint()
    finally:
        stream.close()


def report(state: State, peers: Peers) -> None:
    """Hand the checkpoint to Ray Train, which stores it whole."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(state, Path(directory), rank=peers.rank)
        ray.train.report(
            {"events_learned": state.counters.events_learned},
            checkpoint=ray.train.Checkpoint.from_directory(directory),
        )


def resume(recipe: Recipe, peers: Peers) -> State | None:
    """The newest checkpoint; None where there is none that this recipe can go on from."""
    stored = ray.train.get_checkpoint()
    if stored is None:
        return None
    with stored.as_directory() as directory:
        state = checkpoint.load(
            Path(directory), config=recipe.distill, rank=peers.rank, world=peers.world
        )
    if state.student.config != recipe.student:
        logger.warning("the checkpoint's student has other sizes than %s: anew", recipe.name)
        return None
    learned, positions = state.counters.events_learned, state.positions
    logger.info("resumed after %d events, next are %s", learned, positions)
    return state


if __name__ == "__main__":
    main()
