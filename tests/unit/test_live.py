"""Whatever becomes of a version's files or of the pointer, the last good model answers."""

import math
import shutil
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.registry import POINTER, Registry
from services.recommend.engine import rank
from services.recommend.live import LiveModel
from services.recommend.schema import RecommendRequest
from services.recommend.telemetry import Telemetry
from tests import students

MANIFEST: Final = "manifest.json"
WHOLE: Final = ("weights.safetensors", "config.json", "catalog.parquet")


def damaged(intact: bytes, how: str, where: float) -> bytes:
    at = int(where * len(intact))
    if how == "cut":
        return intact[:at]
    if how == "flipped":
        return intact[:at] + bytes([intact[at] ^ 1 << at % 8]) + intact[at + 1 :]
    return b"\0" * len(intact)


@settings(max_examples=40)
@given(
    name=st.sampled_from([*WHOLE, MANIFEST, POINTER]),
    how=st.sampled_from(["cut", "flipped", "zeros"]),
    where=st.floats(0, 1, exclude_max=True),
    published=st.booleans(),
)
def test_no_damaged_version_silences_a_replica(
    tmp_path_factory: pytest.TempPathFactory, name: str, how: str, where: float, published: bool
) -> None:
    """`published`: it was damaged before its hashes were taken, so that only loading can tell."""
    tmp_path = tmp_path_factory.mktemp("live")
    registry = Registry(str(tmp_path / "registry"))
    live = LiveModel(registry, poll_s=60.0, telemetry=Telemetry(), exact_items=100)
    registry.promote("student", students.publish(registry, tmp_path), "good")
    live.look()
    stored = Path(registry.uri, "student", "000002")
    if published and name in WHOLE:
        source = Path(shutil.copytree(stored.with_name("000001"), tmp_path / "source"))
        (source / MANIFEST).unlink()
        (source / name).write_bytes(damaged((source / name).read_bytes(), how, where))
        registry.publish("student", source, {})
    else:
        students.publish(registry, tmp_path)
    registry.promote("student", 2, "damaged")
    if not published or name not in WHOLE:
        path = stored / name if name != POINTER else stored.parent / name
        path.write_bytes(damaged(path.read_bytes(), how, where))
    live.look()
    assert live.model is not None
    if not published and name in WHOLE:
        assert live.model.version == 1
    request = RecommendRequest(recent_items=[students.item(3)], n=5)
    found = rank(live.model, request, None, now_ms=0)
    assert len(found.rows) == 5
    assert all(math.isfinite(score) for score in found.scores)
    assert all(live.model.catalog.ids(found.rows))
    registry.promote("student", students.publish(registry, tmp_path), "good again")
    live.look()
    assert live.model.version == 3
