"""What the teacher is shown, what is kept from it until it is judged, and how it is judged."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from ray_jobs.shards import History, Shard
from ray_jobs.teacher_data import Lines
from ray_jobs.teacher_log import read_history
from ray_jobs.teacher_quality import Quality, judge, verdict
from services.core.catalog import Catalog
from services.core.errors import RefluxError
from services.core.eventlog import SCHEMAS, EventLog
from services.core.events import EVENTS
from services.core.metrics import ndcg_at, ranks_of
from services.core.models.sizes import EncoderConfig
from services.core.models.teacher import Teacher
from services.core.settings import Settings

N_USERS, N_EVENTS, N_ITEMS = 12, 600, 70


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path, teacher_first_events=100)
    write_log(settings.offline)
    return settings


class Here:
    """Runs what Ray would, at once and in this process."""

    def keep(self, value: Any) -> Any:
        return value

    def start(self, function: Callable[..., Any], *arguments: Any, n: int) -> list[Any]:
        values = list(function(*arguments))
        assert len(values) == n
        return values

    def get(self, values: Sequence[Any]) -> list[Any]:
        return list(values)


def write_log(root: str) -> None:
    """Each user goes through the items in an order of their own; every 7th event is a mere view
    of what was recommended."""
    random = np.random.default_rng(0)
    users = np.arange(N_EVENTS) % N_USERS
    orders = [random.permutation(N_ITEMS) for _ in range(N_USERS)]
    items = [f"item-{orders[u][e // N_USERS]}" for e, u in enumerate(users)]
    types = ["impression" if e % 7 == 3 else "click" for e in range(N_EVENTS)]
    time = pa.array(np.arange(N_EVENTS) * 10**7, pa.timestamp("us", tz="UTC"))
    for partition, part in itertools.product((0, 1), range(3)):
        of_partition = np.flatnonzero(users % 2 == partition)
        at = of_partition[100 * part : 100 * (part + 1)]
        columns = {
            "event_id": [str(e) for e in at],
            "user_id": [f"user-{users[e]}" for e in at],
            "item_id": [items[e] for e in at],
            "type": [types[e] for e in at],
            "timestamp": time.take(at),
            "value": pa.nulls(len(at), pa.float64()),
            "context": pa.nulls(len(at), pa.string()),
            "arrival": time.take(at),
            "partition": np.full(len(at), partition, np.int32),
            "offset": 100 * part + np.arange(len(at)),
        }
        EventLog(root, EVENTS).append(pa.table(columns, schema=SCHEMAS[EVENTS]))


def read(settings: Settings, **different: Any) -> History:
    given: dict[str, Any] = {
        "n_shards": 3,
        "last_slice": 0.25,
        "parent": None,
        "parent_offsets": {},
    }
    return read_history(settings, Here(), **{**given, **different})


def shards_of(history: History) -> list[Shard]:
    return [shard for shard in history.shards if isinstance(shard, Shard)]


def test_shards_hold_every_interaction_once(settings: Settings) -> None:
    history = read(settings)
    n = sum(e % 7 != 3 for e in range(N_EVENTS))
    assert history.n_events == n
    assert history.offsets == {0: 300, 1: 300}
    assert sum(len(shard.sequences.features.rows) for shard in shards_of(history)) == n
    assert sum(len(shard.sequences.starts) - 1 for shard in shards_of(history)) == N_USERS
    assert sum(shard.fresh_E.sum() for shard in shards_of(history)) == n - int(n * 0.75)
    assert len(history.catalog) == 1 + N_ITEMS


def test_the_past_knows_nothing_of_the_fresh(settings: Settings) -> None:
    for shard in shards_of(read(settings)):
        past, whole = shard.past(), shard.sequences
        np.testing.assert_array_equal(past.features.rows, whole.features.rows[~shard.fresh_E])
        for user in range(len(past.starts) - 1):
            kept = past.features.rows[past.starts[user] : past.starts[user + 1]]
            start = whole.starts[user]
            np.testing.assert_array_equal(kept, whole.features.rows[start : start + len(kept)])


def test_popularity_is_what_a_catalog_observes(settings: Settings) -> None:
    """That of all for the catalog, that before the fresh events for who learns without them."""
    history = read(settings)
    log = EventLog(settings.offline).read(columns=["item_id", "type"])
    ids = log.filter(pc.not_equal(log["type"], "impression"))["item_id"].to_pylist()
    observed = Catalog()
    rows = observed.add(ids)
    np.testing.assert_array_equal(history.catalog.rows(ids), rows)  # in the order of appearance
    observed.observe(rows[: int(len(rows) * 0.75)])
    np.testing.assert_allclose(history.popularity, observed.popularity)
    observed.observe(rows[int(len(rows) * 0.75) :])
    np.testing.assert_allclose(history.catalog.popularity, observed.popularity)


def test_shards_are_the_same_however_the_log_is_cut(settings: Settings) -> None:
    log = EventLog(settings.offline)
    whole, cut = read(settings), read(settings, portion_records=150)
    assert len(log.portions(until=log.end(), records=150)) > 3
    np.testing.assert_allclose(whole.popularity, cut.popularity)
    for one, other in zip(shards_of(whole), shards_of(cut), strict=True):
        for a, b in zip(one.sequences.features, other.sequences.features, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.sequences.starts, other.sequences.starts)
        np.testing.assert_array_equal(one.judged_E, other.judged_E)

    again = log.read(since={0: 90, 1: 300}, until={0: 100, 1: 300})  # a producer's retry
    offsets = pa.array(np.arange(300, 310), pa.int64())
    log.append(again.set_column(again.schema.get_field_index("offset"), "offset", offsets))
    assert read(settings, portion_records=150).n_events == whole.n_events


def test_what_the_parent_learned_is_not_judged(settings: Settings) -> None:
    def judged(of_1: int) -> int:
        history = read(settings, parent_offsets={0: 300, 1: of_1})
        return sum(shard.judged_E.sum() for shard in shards_of(history))

    assert judged(300) == 0
    fresh = sum(shard.fresh_E.sum() for shard in shards_of(read(settings)))
    assert 0 < judged(0) < fresh


def test_a_parents_rows_stay(settings: Settings) -> None:
    parent = Catalog()
    parent.add(["gone", "item-3"])
    history = read(settings, n_shards=1, parent=parent)
    assert history.catalog.rows(["gone", "item-3"]).tolist() == [1, 2]


def test_too_little_is_one_clear_line(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RefluxError, match=r"holds 0 interactions.*TEACHER_FIRST_EVENTS"):
        read(settings.model_copy(update={"home": tmp_path / "empty"}))
    with pytest.raises(RefluxError, match="12 users are too few to be shared by 13"):
        read(settings, n_shards=13)


def test_an_epoch_shows_every_target_once_and_can_be_repeated(settings: Settings) -> None:
    sequences = shards_of(read(settings))[0].sequences
    lines, again = (Lines(sequences, line_events=16, batch_lines=2, seed=[1, 0]) for _ in range(2))
    n_steps = -(-len(sequences.features.rows) // 32)
    epochs = [[lines.batch(e * n_steps + s)[-1] for s in range(n_steps)] for e in range(2)]
    wanted = np.sort(sequences.targets())
    for epoch in epochs:
        shown = np.sort(np.concatenate([targets.numpy().ravel() for targets in epoch]))
        np.testing.assert_array_equal(shown[shown > 0], wanted[wanted > 0])
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(again.batch(n_steps)[-1], epochs[1][0])


def test_judging_equals_ranking_event_by_event(settings: Settings) -> None:
    history = read(settings)
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, n_layers=1, n_heads=2, max_len=64, dropout=0.5)
    model = Teacher(config, n_rows=len(history.catalog))
    model.describe(history.catalog.content)
    shard = shards_of(history)[0]
    quality = judge(model, shard, popularity=history.popularity)
    assert model.training

    model.eval()
    rows, starts = shard.sequences.features.rows, shard.sequences.starts
    gains = []
    for event in np.flatnonzero(shard.judged_E):
        start = starts[np.searchsorted(starts, event, side="right") - 1]
        if event == start:
            continue
        before = [torch.from_numpy(c[None, start:event]).long() for c in shard.sequences.features]
        seen = torch.zeros(1, len(history.catalog), dtype=torch.bool)
        seen[0, rows[start:event]] = True
        with torch.no_grad():
            scores = model.scores(model(*before)[:, -1])
        rank = ranks_of(scores, torch.tensor([int(rows[event])]), seen_NV=seen)
        gains.append(ndcg_at(rank.numpy(), 10))
    assert quality.events == len(gains)
    assert quality.teacher == pytest.approx(sum(gains), abs=1e-4)


def test_verdicts() -> None:
    good = Quality(events=1000, teacher=130, popularity=22)

    def decide(quality: Quality, parent: Quality | None, finite: bool = True) -> tuple[bool, str]:
        return verdict(quality, parent=parent, finite=finite, max_worse=0.05)

    assert decide(good, None) == (
        True,
        "NDCG@10 0.1300 on the last 1000 events, popularity 0.0220",
    )
    assert decide(good, replace(good, teacher=135))[0]
    promoted, reason = decide(good, replace(good, teacher=140))
    assert not promoted
    assert reason.startswith("worse than its parent")
    promoted, reason = decide(replace(good, teacher=22), None)
    assert not promoted
    assert reason.startswith("no better than popularity")
    assert decide(good, None, finite=False) == (False, "weights are not finite")
    assert decide(Quality(events=10, teacher=0, popularity=5), None)[0]
