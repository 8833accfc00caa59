"""Train the teacher on the offline log, or refresh the one that teaches now.

    ray job submit --working-dir . -- python -m ray_jobs.train_teacher --recipe one_gpu
    ray job submit --working-dir . -- python -m ray_jobs.train_teacher --recipe tiny_cpu

Read the log up to its end, train (`teacher_training`), publish, and promote if sane.
"""

import argparse
import signal
import sys

from ray_jobs import own_ray, recipes
from ray_jobs.recipes import Recipe
from services.core.errors import RefluxError
from services.core.registry import Registry
from services.core.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or refresh the teacher.")
    parser.add_argument("--recipe", help=f"one of {', '.join(recipes.RECIPES)}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` cleans up
    try:
        settings = Settings.load()
        recipe = recipes.chosen(settings, arguments.recipe)
    except (RefluxError, ValueError) as error:
        sys.exit(f"train_teacher: {error}")
    own_ray.step_back_as_driver(recipe.train.niceness)
    try:
        refresh(settings, recipe)
    except RefluxError as error:
        sys.exit(f"train_teacher: {error}")


def refresh(settings: Settings, recipe: Recipe) -> int:
    """Train, publish, promote if sane; the new version.

    Imports torch and what needs it only here, once the process has stepped back.
    """
    from ray_jobs.teacher_log import OnRay, read_history
    from ray_jobs.teacher_training import remove_leftovers, train
    from ray_jobs.teacher_versions import publish, teaching_now

    own_ray.join(niceness=recipe.train.niceness)
    registry = Registry(settings.registry)
    remove_leftovers(settings.checkpoints)
    parent = teaching_now(registry, recipe)
    print(f"reading {settings.offline}", flush=True)
    history = read_history(
        settings,
        OnRay(),
        n_shards=recipe.train.n_shards,
        last_slice=recipe.train.last_slice,
        parent=parent.catalog if parent else None,
        parent_offsets=parent.offsets if parent else {},
    )
    print(f"from teacher {parent.version}" if parent else "from scratch", flush=True)
    trained = train(
        recipe,
        history,
        parent=parent.model if parent else None,
        seed=settings.seed,
        checkpoints=settings.checkpoints,
    )
    return publish(
        registry, trained, history, recipe=recipe, parent=parent, keep=settings.keep_versions
    )


if __name__ == "__main__":
    main()
