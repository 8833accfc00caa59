"""Several distillation workers learn what one would, and take over from each other."""

import itertools
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from ray_jobs import checkpoint, recipes
from ray_jobs.checkpoint import State
from ray_jobs.distiller import Distiller
from ray_jobs.labels import Items, Labels, aligned, items_of, label
from ray_jobs.microbatch import MicroBatch
from ray_jobs.peers import ALONE, Peers
from ray_jobs.stream import Received
from ray_jobs.teachers import Asked
from ray_jobs.warm_up import remembering, state_of, warm_up
from services.core.catalog import Catalog
from services.core.events import Event, EventType
from services.core.metrics import Ranks
from services.core.models.teacher import Teacher
from services.core.settings import Settings
from tests.unit.test_parallel import teach_together

PARTITIONS, EACH, TICKS = 4, 10, 6  # events of a partition in a micro-batch; micro-batches a run
HISTORY = 40  # events of a partition in the offline log
SMALL = recipes.smoke_cpu()
RECIPE = replace(
    SMALL,
    student=replace(SMALL.student, dropout=0.0),  # its noise is each worker's own
    distill=replace(SMALL.distill, warm_up_s=1e9, context_events=8, replay_users=4),
)


def event(partition: int, at: int) -> Event:
    """Users stay in their partition; the later, the more items there are."""
    draw = np.random.default_rng([partition, at])
    return Event(
        event_id=f"{partition}-{at}",
        user_id=f"u{partition}-{draw.integers(5)}",
        item_id=f"i{draw.integers(10 + at // 4)}",
        type=EventType.CLICK,
        timestamp=at * 1000 + partition,
    )


def received(partitions: list[int], first: int, last: int) -> Received:
    return Received.of(
        (event(partition, at), at * 1000, partition)
        for partition in partitions
        for at in range(first, last)
    )


class Partitions:
    """Each poll brings `EACH` events of each partition that is ours."""

    def __init__(self, positions: Mapping[int, int], peers: Peers) -> None:
        self.positions = {
            p: positions.get(p, 0) for p in range(peers.rank, PARTITIONS, peers.world)
        }

    def poll(self, *, max_events: int, timeout_s: float) -> Received:
        first = next(iter(self.positions.values()))
        self.positions = dict.fromkeys(self.positions, first + EACH)
        return received(list(self.positions), first, first + EACH)

    def lag_events(self) -> int:
        return 0

    def check_topic(self) -> None:
        return


class Tutor:
    """A teacher in our own process: the same for all, as an actor of each worker would be."""

    version: int | None = 1
    first: int | None = 1
    offsets: Mapping[int, int] = dict.fromkeys(range(PARTITIONS), HISTORY)

    def __init__(self, catalog: Catalog) -> None:
        torch.manual_seed(1)
        self._own = Catalog()
        self._own.add(catalog.ids(range(1, len(catalog))))
        self._teacher = Teacher(RECIPE.teacher, n_rows=len(catalog)).eval()
        self.align(catalog)

    def align(self, catalog: Catalog) -> None:
        ids = catalog.ids(range(1, len(catalog)))
        self._aligned = aligned(self._teacher, self._own, item_ids=ids, content=catalog.content)

    def look(self) -> None:
        return

    def items(self) -> Items:
        return items_of(self._aligned)

    def ask_labels(self, batch: MicroBatch) -> Asked:
        return self.ask(batch, stale=False)

    def ask(self, batch: MicroBatch, *, stale: bool, **how: Any) -> Asked:
        labels = label(self._aligned, batch, top_k=RECIPE.distill.top_k, **how)
        return Asked(labels)

    def answer(self, asked: Asked) -> tuple[Labels | None, Ranks | None]:
        return asked.teacher, None


def no_items() -> pa.Table:
    items = pa.table({name: pa.array([], pa.string()) for name in ("item_id", "title", "text")})
    return items.append_column("categories", pa.array([], pa.list_(pa.string())))


def first_state(peers: Peers) -> State:
    torch.manual_seed(0)
    history = received(list(range(PARTITIONS)), 0, HISTORY)
    state = state_of(history, no_items(), recipe=RECIPE, seed=0, peers=peers)
    state.learned(dict.fromkeys(range(peers.rank, PARTITIONS, peers.world), HISTORY))
    return state


def run(home: Path, peers: Peers, *, since: Path | None = None) -> State:
    """Go on from the checkpoint `since` (None: warm up) for `TICKS`, keep checkpoints in `home`."""
    if since is None:
        state = first_state(peers)
        warm_up(state, Tutor(state.catalog), RECIPE.distill, peers)
    else:
        state = checkpoint.load(since, config=RECIPE.distill, rank=peers.rank, world=peers.world)
    clock, kept = itertools.count(), itertools.count()
    distiller = Distiller(
        state,
        Partitions(state.positions, peers),
        Tutor(first_state(ALONE).catalog),
        settings=Settings(home=home, publish_every_s=5, checkpoint_every_s=1e9),
        config=RECIPE.distill,
        peers=peers,
        keep=lambda: checkpoint.save(
            state, home / f"kept-{next(kept)}", rank=peers.rank, world=peers.world
        ),
        now_s=lambda: 1000.0 * peers.rank + next(clock),  # each machine's clock has its own zero
    )
    distiller.begin()
    for _ in range(TICKS):
        distiller.tick()
    distiller.checkpoint()
    return state


def work(rank: int, home: Path) -> None:
    """What one of three processes does: two learn, then all three go on from there."""
    for world, before in ((2, None), (3, 2)):
        if rank < world:
            meet = f"file://{home}/meet-{world}"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
            since = newest(home / str(before)) if before else None
            run(home / str(world), Peers(rank, world), since=since)
            if world == 2:
                teach_together(rank, home)
            dist.destroy_process_group()
            (home / f"ended-{world}-{rank}").touch()
        while not all((home / f"ended-{world}-{other}").exists() for other in range(world)):
            time.sleep(0.05)


def newest(home: Path) -> Path:
    return max(home.glob("kept-*"))


def left_in(home: Path) -> State:
    return checkpoint.load(newest(home), config=RECIPE.distill)


def assert_same(one: State, other: State) -> None:
    """Up to the order in which floats are added."""
    assert one.ledger == other.ledger
    assert one.counters.events_learned == other.counters.events_learned
    assert one.counters.steps == other.counters.steps
    assert one.catalog.to_table().equals(other.catalog.to_table())
    assert set(one.histories.users()) == set(other.histories.users())
    for name, weight in other.student.state_dict().items():
        torch.testing.assert_close(one.student.state_dict()[name], weight, atol=1e-3, rtol=0)
    assert one.quality.metrics() == pytest.approx(other.quality.metrics(), abs=2e-3)
    assert one.counters.teacher_ndcg == pytest.approx(other.counters.teacher_ndcg, abs=1e-6)
    assert one.counters.student_ndcg == pytest.approx(other.counters.student_ndcg, abs=2e-3)


def test_what_is_learned_does_not_depend_on_the_number_of_workers(
    together: Path, tmp_path: Path
) -> None:
    """Two workers learn what one does; one and three go on alike from where the two stopped."""
    first = run(tmp_path / "1", ALONE)
    end = HISTORY + TICKS * EACH
    assert first.ledger == {p: [[0, end]] for p in range(PARTITIONS)}
    assert first.counters.events_learned == PARTITIONS * TICKS * EACH
    assert_same(left_in(together / "2"), first)

    second = run(tmp_path / "1 after 2", ALONE, since=newest(together / "2"))
    assert second.ledger == {p: [[0, end + TICKS * EACH]] for p in range(PARTITIONS)}
    assert second.quality.metrics()["stream.events"] == 2 * PARTITIONS * TICKS * EACH
    assert_same(left_in(together / "3"), second)


def test_a_damaged_checkpoint_is_noticed(together: Path, tmp_path: Path) -> None:
    whole = newest(together / "2")
    assert checkpoint.damage(whole) is None

    def damaged(name: str) -> tuple[Path, Path]:
        directory = tmp_path / name.replace("/", "-")
        shutil.copytree(whole, directory)
        return directory, directory / name

    directory, path = damaged("student/weights.safetensors")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert checkpoint.damage(directory) == "student/weights.safetensors is not what was written"
    directory, path = damaged("rank-00001/own.json")
    os.truncate(path, 10)
    assert checkpoint.damage(directory) == "rank-00001/own.json is not what was written"
    directory, path = damaged("rank-00000/histories.parquet")
    path.unlink()
    assert "FileNotFoundError" in (checkpoint.damage(directory) or "")
    directory, path = damaged("rank-00001")
    shutil.rmtree(path)
    assert checkpoint.damage(directory) == "1 workers' manifests are there"


def test_a_log_in_parts_is_remembered_as_a_whole_one() -> None:
    whole = first_state(ALONE)
    parts = remembering(
        (received([partition], 0, HISTORY) for partition in range(PARTITIONS)),
        no_items(),
        recipe=RECIPE,
        seed=0,
        peers=ALONE,
    )

    def known(state: State) -> dict[str, list[str]]:
        rows_of = {user: state.histories.of(user)["row"] for user in state.histories.users()}
        return {user: state.catalog.ids(rows) for user, rows in rows_of.items()}

    assert known(parts) == known(whole)
    ids = whole.catalog.ids(range(1, len(whole.catalog)))
    one, other = (state.catalog.popularity[state.catalog.rows(ids)] for state in (whole, parts))
    np.testing.assert_allclose(one, other, rtol=1e-3)  # ties of time in another order
