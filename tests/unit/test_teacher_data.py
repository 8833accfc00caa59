"""What the teacher is shown, what is kept from it until it is judged, and how it is judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ray_jobs.teacher_data import History, Lines, read_history
from ray_jobs.teacher_quality import Quality, judge, verdict
from services.core.catalog import Catalog
from services.core.errors import RefluxError
from services.core.eventlog import SCHEMAS, EventLog
from services.core.events import EVENTS
from services.core.metrics import ndcg_at, ranks_of
from services.core.models.encoder import EncoderConfig
from services.core.models.teacher import Teacher
from services.core.settings import Settings

N_USERS, N_EVENTS, N_ITEMS = 12, 600, 70


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path, teacher_first_events=100)
    write_log(settings.offline)
    return settings


def write_log(root: str) -> None:
    """Each user goes through the items in an order of their own; every 7th event is a mere view
    of what was recommended."""
    random = np.random.default_rng(0)
    users = np.arange(N_EVENTS) % N_USERS
    orders = [random.permutation(N_ITEMS) for _ in range(N_USERS)]
    items = [f"item-{orders[u][e // N_USERS]}" for e, u in enumerate(users)]
    types = ["impression" if e % 7 == 3 else "click" for e in range(N_EVENTS)]
    time = pa.array(np.arange(N_EVENTS) * 10**7, pa.timestamp("us", tz="UTC"))
    for partition in (0, 1):
        at = np.flatnonzero(users % 2 == partition)
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
            "offset": np.arange(len(at)),
        }
        EventLog(root, EVENTS).append(pa.table(columns, schema=SCHEMAS[EVENTS]))


def read(settings: Settings, parent_offsets: dict[int, int] | None = None) -> History:
    return read_history(
        settings, n_shards=3, last_slice=0.25, parent=None, parent_offsets=parent_offsets or {}
    )


def test_shards_hold_every_interaction_once(settings: Settings) -> None:
    history = read(settings)
    n = sum(e % 7 != 3 for e in range(N_EVENTS))
    assert history.n_events == n
    assert history.offsets == {0: 300, 1: 300}
    assert sum(len(shard.sequences.features.rows) for shard in history.shards) == n
    assert sum(len(shard.sequences.starts) - 1 for shard in history.shards) == N_USERS
    assert sum(shard.fresh_E.sum() for shard in history.shards) == n - int(n * 0.75)
    assert len(history.catalog) == 1 + N_ITEMS


def test_the_past_knows_nothing_of_the_fresh(settings: Settings) -> None:
    for shard in read(settings).shards:
        past, whole = shard.past(), shard.sequences
        np.testing.assert_array_equal(past.features.rows, whole.features.rows[~shard.fresh_E])
        for user in range(len(past.starts) - 1):
            kept = past.features.rows[past.starts[user] : past.starts[user + 1]]
            start = whole.starts[user]
            np.testing.assert_array_equal(kept, whole.features.rows[start : start + len(kept)])


def test_popularity_is_that_before_the_fresh_events(settings: Settings) -> None:
    history = read(settings)
    assert history.popularity.sum() < history.catalog.popularity.sum()


def test_what_the_parent_learned_is_not_judged(settings: Settings) -> None:
    assert sum(shard.judged_E.sum() for shard in read(settings, {0: 300, 1: 300}).shards) == 0
    half = sum(shard.judged_E.sum() for shard in read(settings, {0: 300, 1: 0}).shards)
    assert 0 < half < sum(shard.fresh_E.sum() for shard in read(settings).shards)


def test_a_parents_rows_stay(settings: Settings) -> None:
    parent = Catalog()
    parent.add(["gone", "item-3"])
    history = read_history(settings, n_shards=1, last_slice=0.1, parent=parent, parent_offsets={})
    assert history.catalog.rows(["gone", "item-3"]).tolist() == [1, 2]


def test_too_little_is_one_clear_line(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(RefluxError, match=r"holds 0 interactions.*TEACHER_FIRST_EVENTS"):
        read(settings.model_copy(update={"home": tmp_path / "empty"}))
    with pytest.raises(RefluxError, match="12 users can't be shared by 13"):
        read_history(settings, n_shards=13, last_slice=0.1, parent=None, parent_offsets={})


def test_an_epoch_shows_every_target_once_and_can_be_repeated(settings: Settings) -> None:
    sequences = read(settings).shards[0].sequences
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
    shard = history.shards[0]
    quality = judge(model, shard, popularity=history.popularity)
    assert model.training

    model.eval()
    rows, starts = shard.sequences.features.rows, shard.sequences.starts
    gains = []
    for event in np.flatnonzero(shard.judged_E):
        start = starts[np.searchsorted(starts, event, side="right") - 1]
        if event == start:
            continue
        before = [torch.from_numpy(c[None, start:event]) for c in shard.sequences.features]
        seen = torch.zeros(1, len(history.catalog), dtype=torch.bool)
        seen[0, rows[start:event]] = True
        with torch.no_grad():
            scores = model.scores(model(*before)[:, -1])
        rank = ranks_of(scores, torch.tensor([rows[event]]), seen_NV=seen)
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
