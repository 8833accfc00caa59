"""Versions on a node's disk: fetched once, never another one's, and none kept that is broken."""

import shutil
from pathlib import Path

import pytest

from services.core.registry import Registry
from services.recommend.fetched import Fetched
from services.recommend.live import LiveModel
from services.recommend.telemetry import Telemetry
from tests import students


def live(registry: Registry, shared: Path) -> LiveModel:
    return LiveModel(registry, poll_s=60.0, telemetry=Telemetry(), exact_items=100, shared=shared)


def promote(registry: Registry, aside: Path, *, seed: int = 0) -> Path:
    version = students.publish(registry, aside, seed=seed)
    registry.promote("student", version, "newer")
    return Path(registry.uri, "student", f"{version:06d}")


def test_replicas_of_a_node_map_the_same_table(tmp_path: Path) -> None:
    registry, shared = Registry(str(tmp_path / "registry")), tmp_path / "shared"
    stored = promote(registry, tmp_path)
    first, second = live(registry, shared), live(registry, shared)
    first.look()
    (stored / "weights.safetensors").unlink()  # the second one needs it no more
    second.look()
    assert first.model is not None and second.model is not None
    here = str(shared / "student" / "000001" / "table.npy")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if here in line]
    assert len(mapped) == 2
    promote(registry, tmp_path)
    second.look()
    assert second.model.version == 2
    assert [path.name for path in (shared / "student").iterdir()] == ["000002"]
    assert first.model.student.table_VD.any()  # its pages outlive the file


def test_a_registry_begun_anew_is_not_answered_from_the_old_one(tmp_path: Path) -> None:
    registry, shared = Registry(str(tmp_path / "registry")), tmp_path / "shared"
    tables = []
    for seed in (1, 2):
        promote(registry, tmp_path, seed=seed)
        replica = live(registry, shared)
        replica.look()
        assert replica.model is not None and replica.model.version == 1
        tables.append(replica.model.student.table_VD)
        shutil.rmtree(registry.uri)
    assert (tables[0] != tables[1]).any()


def test_what_cannot_be_loaded_is_fetched_again(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    fetched = Fetched(registry, tmp_path / "shared")
    promote(registry, tmp_path)
    with pytest.raises(ValueError, match="broken"), fetched.version(1) as directory:
        (directory / "config.json").unlink()
        raise ValueError("broken")
    with fetched.version(1) as directory:
        assert (directory / "config.json").exists()
