"""A teacher's way out of and into the registry."""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

import pyarrow.parquet as pq
import torch

from ray_jobs.recipes import Recipe
from ray_jobs.shards import History
from ray_jobs.teacher_quality import Quality, verdict
from ray_jobs.teacher_training import Trained
from services.core.catalog import Catalog
from services.core.errors import CorruptVersionError, NothingServingError, RegistryError
from services.core.models.teacher import Teacher
from services.core.registry import Registry

CATALOG = "catalog.parquet"


@dataclass(frozen=True, eq=False, kw_only=True)
class Parent:
    """The teacher that teaches now, where a refresh starts from."""

    version: int
    model: Teacher
    catalog: Catalog
    offsets: dict[int, int]


def teaching_now(registry: Registry, recipe: Recipe) -> Parent | None:
    """The promoted teacher, unless there is none or the recipe's sizes are others by now."""
    try:
        version = registry.serving("teacher").version
    except NothingServingError:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            home = registry.fetch("teacher", version, Path(temporary))
        except CorruptVersionError as error:
            print(f"starting from scratch: {error}")
            return None
        model = Teacher.load(home)
        catalog = Catalog.from_table(pq.read_table(home / CATALOG))
    if model.config != recipe.teacher:
        print(f"teacher {version} has other sizes than {recipe.name}: starting from scratch")
        return None
    manifest = registry.manifest("teacher", version)
    offsets = {int(partition): offset for partition, offset in manifest["offsets"].items()}
    return Parent(version=version, model=model, catalog=catalog, offsets=offsets)


def publish(
    registry: Registry,
    trained: Trained,
    history: History,
    *,
    recipe: Recipe,
    parent: Parent | None,
    keep: int,
) -> int:
    """Store a trained teacher and let it teach if the verdict is good; its version.

    `keep`: newest versions that stay; older ones go, unless they are in use.
    """
    model, metrics = trained.model, trained.metrics
    quality, before = (
        Quality(**metrics[name]) if metrics[name] else None for name in ("quality", "parent")
    )
    assert quality is not None
    finite = all(torch.isfinite(parameter).all() for parameter in model.parameters())
    promoted, reason = verdict(
        quality, parent=before, finite=finite, max_worse=recipe.train.max_worse
    )
    if promoted and (held := registry.held("teacher")) is not None:
        promoted, reason = False, f"teacher {held} is held by hand (`reflux models release`)"
    flat = {
        "slice.events": quality.events,
        "slice.teacher.ndcg@10": quality.ndcg(quality.teacher),
        "slice.popularity.ndcg@10": quality.ndcg(quality.popularity),
    }
    if before is not None:
        flat["slice.parent.ndcg@10"] = before.ndcg(before.teacher)
    manifest = {
        "metrics": flat,
        "offsets": history.offsets,
        "parent": parent.version if parent else None,
        "recipe": recipe.name,
        "code_version": package_version("reflux"),
        "n_parameters": model.n_parameters,
        "n_events": history.n_events,
        "steps": metrics["step"],
        "train_s": metrics["elapsed_s"],
        "resumed": metrics["resumed"],
        "gate": {"promoted": promoted, "reason": reason},
    }
    with tempfile.TemporaryDirectory() as temporary:
        model.save(Path(temporary))
        pq.write_table(history.catalog.to_table(), Path(temporary) / CATALOG)
        version = registry.publish("teacher", Path(temporary), manifest)
    if promoted:
        registry.promote("teacher", version, reason)
    print(f"teacher {version} {'promoted' if promoted else 'NOT promoted'}: {reason}", flush=True)
    try:
        registry.prune("teacher", keep)
    except (OSError, RegistryError) as error:  # nothing to train anew for
        print(f"old teachers stay for now: {error}", flush=True)
    return version
