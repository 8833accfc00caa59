"""One worker of the distillation job: resume, tick until told to stop, keep checkpoints.

Reads downward; the loop itself is `distiller.Distiller`.
"""

import logging
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
import ray.train
import torch
from ray.train.v2._internal.execution import context as reporting

from ray_jobs import checkpoint, own_ray, recipes
from ray_jobs.checkpoint import State
from ray_jobs.distiller import Distiller
from ray_jobs.peers import Peers
from ray_jobs.recipes import Recipe
from ray_jobs.stop_file import StopFile
from ray_jobs.stream import EventStream
from ray_jobs.teachers import Teachers
from ray_jobs.warm_up import first_state, warm_up
from services.core.kafka import ensure_topics
from services.core.memory import Trimmer
from services.core.settings import Settings

logger = logging.getLogger("distill")


def work(given: dict[str, Any]) -> None:
    """Start, then tick until told to stop."""
    # Of every connection and every checkpoint: this job's log would grow without end.
    for chatty in ("kafka", "ray.train", str(reporting.__file__)):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.update(given["settings"])
    settings = Settings.load()
    recipe = recipes.load(given["recipe"])
    context = ray.train.get_context()
    peers = Peers(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(recipe.distill.threads_per_worker)
    torch.manual_seed(settings.seed)  # one student for all
    ensure_topics(settings)
    state = resume(recipe, peers)
    own_ray.step_back(recipe.distill.niceness)  # not before: one that comes back is in a hurry
    if state is None:
        torch.manual_seed(settings.seed)  # a checkpoint of other sizes had its own for each worker
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
    resumed = state.frozen is not None
    teachers.start(wait=not resumed)
    if not resumed:
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
    trimmer = Trimmer()
    distiller.begin()
    try:
        while not peers.gather(stop.is_set())[0]:
            distiller.tick()
            trimmer.tick()
        distiller.checkpoint()
    finally:
        stream.close()


def report(state: State, peers: Peers) -> None:
    """Hand the checkpoint to Ray Train, which stores it whole."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(state, Path(directory), rank=peers.rank, world=peers.world)
        ray.train.report(
            {"events_learned": state.counters.events_learned},
            checkpoint=ray.train.Checkpoint.from_directory(directory),
        )


def resume(recipe: Recipe, peers: Peers) -> State | None:
    """The newest whole checkpoint; None where there is none that this recipe can go on from."""
    state = _newest_whole(recipe, peers)
    if state is None:
        return None
    if state.student.config != recipe.student:
        logger.warning("the checkpoint's student has other sizes than %s: anew", recipe.name)
        return None
    learned, positions = state.counters.events_learned, state.positions
    logger.info("resumed after %d events, next are %s", learned, positions)
    return state


def _newest_whole(recipe: Recipe, peers: Peers) -> State | None:
    """Worker 0 says which is damaged; an older one goes on from its own, earlier positions."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        return None
    for path in peers.gather(_until(newest))[0]:
        with ray.train.Checkpoint(path, newest.filesystem).as_directory() as directory:
            damage = checkpoint.damage(Path(directory)) if peers.rank == 0 else None
            damage = peers.gather(damage)[0]
            if damage is None:
                return checkpoint.load(
                    Path(directory), config=recipe.distill, rank=peers.rank, world=peers.world
                )
        logger.error("checkpoint %s is damaged (%s): on to the one before it", path, damage)
    logger.error("no checkpoint is whole: anew, from the offline log")
    return None


def _until(newest: ray.train.Checkpoint) -> list[str]:
    """This checkpoint's path and those of the older ones beside it, the newest first."""
    folder = pyarrow.fs.FileSelector(str(PurePosixPath(newest.path).parent))
    found = (info.path for info in newest.filesystem.get_file_info(folder))
    names = {PurePosixPath(path).name: path for path in found}
    last = PurePosixPath(newest.path).name
    return [
        names[name]
        for name in sorted(names, reverse=True)
        if name.startswith("checkpoint_") and name <= last
    ]
