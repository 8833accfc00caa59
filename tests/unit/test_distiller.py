"""The distillation loop on a source that aborts: exactly once, no look ahead, and it recovers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest

from ray_jobs import checkpoint, replay
from ray_jobs.checkpoint import Counters, State
from ray_jobs.distiller import Distiller
from ray_jobs.gate import Verdict
from ray_jobs.histories import Histories
from ray_jobs.learner import adam
from ray_jobs.microbatch import MicroBatch, absorb, group
from ray_jobs.peers import ALONE
from ray_jobs.publish import Publisher
from ray_jobs.ranking import predict
from ray_jobs.recipes import CHECKPOINTS_KEPT, DistillConfig
from ray_jobs.teachers import Teachers
from ray_jobs.telemetry import Telemetry
from services.core.catalog import Catalog
from services.core.eventlog import Arrived, EventLog, events_table
from services.core.events import Event, EventType
from services.core.metrics import MISS, Prequential
from services.core.models.student import Student
from services.core.registry import Registry
from services.core.settings import Settings
from services.local.audit import learned_once
from tests.streams import CONFIG, STUDENT, AbortError, Log


def new_state(config: DistillConfig = CONFIG) -> State:
    torch.manual_seed(0)
    student = Student(STUDENT, n_rows=1)
    return State(
        student=student,
        optimizer=adam(student, config),
        catalog=Catalog(),
        histories=Histories(keep=100),
        positions={},
        ledger={},
        quality=Prequential(),
        counters=Counters(learning_rate=config.learning_rate),
    )


def distiller(
    state: State,
    log: Log,
    home: Path,
    *,
    keep: Callable[[], None],
    config: DistillConfig = CONFIG,
) -> Distiller:
    settings = Settings(home=home, publish_every_s=5, checkpoint_every_s=3)
    clock = iter(range(10**9))
    return Distiller(
        state,
        log,
        Teachers(settings.registry, config=config, width=STUDENT.teacher_dim),
        settings=settings,
        config=config,
        peers=ALONE,
        keep=keep,
        now_s=lambda: float(next(clock)),  # asked once a tick
    )


def weights(state: State) -> dict[str, torch.Tensor]:
    return state.student.state_dict()


def test_a_run_that_broke_down_and_resumed_equals_one_that_did_not(tmp_path: Path) -> None:
    whole = new_state()
    uninterrupted = distiller(whole, Log(600), tmp_path / "a", keep=lambda: None)
    for _ in range(31):
        uninterrupted.tick()

    broken = new_state()
    kept: list[Path] = []

    def keep() -> None:
        kept.append(tmp_path / f"checkpoint-{len(kept)}")
        checkpoint.save(broken, kept[-1], rank=0)

    with pytest.raises(AbortError):
        run = distiller(broken, Log(600, abort_at=330), tmp_path / "b", keep=keep)
        while True:
            run.tick()
    broken.gains = np.arange(20.0).reshape(2, 10)[:, 5:]
    checkpoint.save(broken, tmp_path / "with gains", rank=0)
    loaded = checkpoint.load(tmp_path / "with gains", config=CONFIG)
    assert loaded.gains.tolist() == broken.gains.tolist()
    resumed = checkpoint.load(kept[-1], config=CONFIG)
    at = resumed.positions[0]
    assert 0 < at < 330
    again = distiller(resumed, Log(600, at=at), tmp_path / "b", keep=lambda: None)
    while resumed.positions[0] < 600:
        again.tick()

    assert resumed.ledger == whole.ledger == {0: [[0, 600]]}
    assert resumed.counters.events_learned == whole.counters.events_learned
    assert resumed.histories.to_table().equals(whole.histories.to_table())
    assert resumed.quality.metrics()["stream.student.ndcg@10"] == pytest.approx(
        whole.quality.metrics()["stream.student.ndcg@10"]
    )
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_job_that_goes_on_learns_while_its_teacher_still_loads(tmp_path: Path) -> None:
    state = new_state()
    run = distiller(state, Log(600), tmp_path, keep=lambda: None)
    while state.frozen is None:
        run.tick()
    state.counters.teacher, state.counters.teacher_ndcg = 7, 0.5
    frozen = state.frozen
    again = distiller(state, Log(600, at=state.positions[0]), tmp_path, keep=lambda: None)
    again.begin()  # nobody labels yet
    learned = state.counters.events_learned
    for _ in range(9):
        again.tick()
    assert state.counters.events_learned > learned
    assert (state.counters.teacher, state.counters.teacher_ndcg) == (7, 0.5)
    assert state.frozen is frozen  # what was learned before is not warmed up anew


def test_what_comes_later_changes_no_earlier_prediction() -> None:
    """Plant an event after the twentieth, then permute all after it: the ranks before stay."""
    log = Log(60)
    catalog = Catalog()
    past = log.received(0, 20).arrivals(catalog)
    future = log.received(20, 60).arrivals(catalog)
    torch.manual_seed(0)
    student = Student(STUDENT, n_rows=len(catalog))

    def ranks(order: list[int]) -> dict[int, int]:
        """By the event's key, over one micro-batch: the past, then the future in `order`."""
        events = np.concatenate([past.events, future.events[order]])
        events["time_ms"] = np.arange(len(events)) * 1000
        users = [*past.user_ids, *(future.user_ids[i] for i in order)]
        histories = Histories(keep=100)
        both = replace(past, user_ids=users, events=events, partitions=[0] * len(users))
        news = group(both, histories)
        batch = MicroBatch.of(news, context=8)
        found = predict(student, batch, popularity=np.arange(31.0), known_rows=len(catalog))
        keys = np.concatenate([user.events["key"][user.new] for user in news])
        return {int(k): int(r) for k, r in zip(keys, found, strict=True) if k in past.events["key"]}

    backwards = list(range(39, -1, -1))
    assert len(ranks([])) == 20
    assert ranks([]) == ranks([7]) == ranks(list(range(40))) == ranks(backwards)


def test_after_repeated_failures_the_job_goes_back_to_what_is_proved(tmp_path: Path) -> None:
    config = replace(CONFIG, failures_until_reset=2)
    state = new_state(config)
    run = distiller(state, Log(2_000), tmp_path, keep=lambda: None, config=config)
    registry = Registry(run.settings.registry)
    while state.proved is None:
        run.tick()
    good = registry.serving("student").version
    with torch.no_grad():
        state.student.bias_V[1] = torch.nan
    while state.counters.learning_rate == config.learning_rate:
        run.tick()
    assert registry.serving("student").version == good
    newest = registry.manifest("student", registry.versions("student")[-1])
    assert not newest["gate"]["promoted"]
    assert f"back to version {good}" in newest["gate"]["reason"]
    while registry.serving("student").version == good:
        run.tick()
    assert state.counters.learning_rate == config.learning_rate / 2
    assert all(torch.isfinite(weight).all() for weight in weights(state).values())


def test_a_small_loss_shows_in_time_and_is_undone(tmp_path: Path) -> None:
    """Too small for the few events between two versions, it is one for all of them together."""
    state = new_state()
    state.catalog.add(map(str, range(60)))
    state.student.grow(state.catalog.content, optimizer=state.optimizer)
    registry = Registry(str(tmp_path))
    publisher = Publisher(
        str(tmp_path), state, config=CONFIG, keep=3, peers=ALONE, telemetry=Telemetry()
    )
    probe = MicroBatch.of([], context=8)
    assert publisher.publish(probe).promoted
    good = copy.deepcopy(weights(state))
    rng = np.random.default_rng(0)

    def published(lost: float) -> Verdict:
        """A version after 200 events, in which `lost` of the hits were lost."""
        ranks = rng.integers(1, 40, 200)
        worse = np.where(rng.random(200) < lost, MISS, ranks)
        publisher.scored(worse, ranks)
        with torch.no_grad():
            state.student.bias_V.add_(1.0)
        return publisher.publish(probe)

    verdicts = [published(0.07)]
    while verdicts[-1].promoted:
        assert len(verdicts) < 50
        verdicts.append(published(0.07))
    assert len(verdicts) > 1
    assert "worse" in verdicts[-1].reason
    assert all(torch.equal(weights(state)[name], weight) for name, weight in good.items())
    assert state.counters.learning_rate == CONFIG.learning_rate / 2
    while state.counters.proved == 1:  # the same events, none lost
        assert published(0.0).promoted
        assert registry.serving("student").version == state.counters.published
    assert state.counters.learning_rate == CONFIG.learning_rate


def test_a_registry_that_cannot_be_written_stops_nothing_and_is_told_all_later(
    tmp_path: Path,
) -> None:
    state = new_state()
    state.catalog.add(map(str, range(60)))
    state.student.grow(state.catalog.content, optimizer=state.optimizer)
    state.positions[0] = 7
    registry = tmp_path / "registry"
    registry.touch()  # no folder: whatever is written there fails
    publisher = Publisher(
        str(registry), state, config=CONFIG, keep=3, peers=ALONE, telemetry=Telemetry()
    )
    probe = MicroBatch.of([], context=8)
    publisher.learned(np.array([1_000]))
    assert not publisher.publish(probe).promoted
    assert publisher.behind()
    registry.unlink()
    publisher.learned(np.array([2_000]))
    assert publisher.publish(probe).promoted
    assert not publisher.behind()
    arrived = Registry(str(registry)).manifest("student", 1)["arrivals_ms"]
    assert (arrived["oldest"], arrived["newest"]) == (1_000, 2_000)


def test_what_nobody_has_is_not_entered_as_learned() -> None:
    state = new_state()
    state.learned({0: 10, 1: 4})
    state.learned({0: 30, 1: 9}, skipped={0: (10, 25)})
    state.learned({0: 31})
    assert state.positions == {0: 31, 1: 9}
    assert state.ledger == {0: [[0, 10], [25, 31]], 1: [[0, 9]]}
    assert not learned_once(state.ledger, state.positions).kept


def test_what_the_registry_does_not_take_changes_nothing(tmp_path: Path) -> None:
    state = new_state()
    state.catalog.add(map(str, range(60)))
    state.student.grow(state.catalog.content, optimizer=state.optimizer)
    registry = tmp_path / "registry"
    publisher = Publisher(
        str(registry), state, config=CONFIG, keep=3, peers=ALONE, telemetry=Telemetry()
    )
    probe = MicroBatch.of([], context=8)
    (registry / "student").mkdir(parents=True)
    (registry / "student" / "trial.json").touch()  # unreadable: nothing can be pruned
    assert publisher.publish(probe).promoted
    assert state.counters.proved == state.counters.serving == 1

    with torch.no_grad():
        state.student.bias_V[1] = torch.nan
    registry.rename(tmp_path / "away")
    registry.touch()  # no folder: whatever is written there fails
    for _ in range(3):
        assert not publisher.publish(probe).promoted
    assert state.counters.learning_rate == CONFIG.learning_rate
    assert state.counters.rejected_in_a_row == 0
    registry.unlink()
    (tmp_path / "away").rename(registry)
    for _ in range(CONFIG.failures_until_reset):
        publisher.publish(probe)
    assert state.counters.learning_rate == CONFIG.learning_rate / 2
    assert all(torch.isfinite(weight).all() for weight in weights(state).values())


def test_the_replay_window_is_learned_like_news() -> None:
    histories = Histories(keep=100)
    absorb(group(Log(100).received(0, 100).arrivals(Catalog()), histories), histories)
    news = replay.draw(histories, [0], sizes=histories.sizes(), users=3, window=8, ordered=True)
    batch = MicroBatch.of(news, context=8)
    assert len(batch) == sum(int(user.new.sum()) for user in news)


@pytest.mark.parametrize(
    "heard",
    [
        {"forgotten": frozenset({"u3", "a stranger"})},
        {"rejoined": frozenset({0})},  # Kafka had removed the wish meanwhile
    ],
)
def test_a_user_who_wished_it_is_in_no_checkpoint_that_is_kept(
    tmp_path: Path, heard: dict[str, Any]
) -> None:
    state, kept = new_state(), list[set[str]]()
    log = Log(60)
    offline = EventLog(Settings(home=tmp_path).offline)
    for n in np.flatnonzero(log.users != 3).tolist():
        event = Event(
            event_id=str(n), user_id="u", item_id="i", type=EventType.VIEW, timestamp=n + 1
        )
        arrived = Arrived(record=event, arrival_ms=1, partition=0, offset=n)
        offline.append(events_table([arrived]))
    run = distiller(state, log, tmp_path, keep=lambda: kept.append(set(state.histories.users())))
    while log.positions[0] < 60:
        run.tick()
    run.checkpoint()
    assert "u3" in state.histories
    nothing = log.received(60, 60)
    received = iter([replace(nothing, **heard)])
    log.poll = lambda **_: next(received, nothing)  # type: ignore[method-assign]
    n_before = len(kept)
    for _ in range(12):
        run.tick()
    assert len(kept) == n_before + CHECKPOINTS_KEPT  # and no more, with nothing to keep
    assert not any("u3" in users for users in kept[n_before:])
    assert len(kept[-1]) == 11
    told = generate_latest(run.telemetry.registry).decode()
    assert "reflux_student_events_total 60.0" in told
    assert f"reflux_student_checkpoints_total {len(kept)}.0" in told
    assert 'reflux_gate_decisions_total{promoted="true"}' in told
    assert 'reflux_prequential_ndcg{model="popularity",span="stream"}' in told
