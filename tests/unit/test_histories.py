"""What is remembered of users, how a micro-batch is cut from it, and what is replayed."""

from collections.abc import Sequence

import numpy as np
import pytest

from ray_jobs import replay
from ray_jobs.histories import EVENT, EventRows, Histories, first_seen
from ray_jobs.microbatch import COLD, Arrivals, MicroBatch, absorb, group
from ray_jobs.stream import Impression, Received, answer_lists
from services.core.catalog import Catalog


def events(rows: Sequence[int], times: Sequence[int] | None = None) -> EventRows:
    made = np.zeros(len(rows), EVENT)
    made["row"] = rows
    made["type"] = 1
    made["time_ms"] = times if times is not None else range(len(rows))
    made["key"] = rows
    return made


def arrivals(by_user: Sequence[tuple[str, int, int]]) -> Arrivals:
    return Arrivals(
        user_ids=[user for user, _, _ in by_user],
        events=events([row for _, row, _ in by_user], [time for _, _, time in by_user]),
        partitions=[0] * len(by_user),
    )


def take_in(histories: Histories, by_user: Sequence[tuple[str, int, int]]) -> MicroBatch:
    news = group(arrivals(by_user), histories)
    absorb(news, histories)
    return MicroBatch.of(news, context=4)


def test_the_oldest_are_forgotten_and_a_late_event_takes_its_place_in_time() -> None:
    histories = Histories(keep=3)
    take_in(histories, [("u", 1, 10), ("u", 2, 20), ("u", 3, 30)])
    take_in(histories, [("u", 4, 25)])
    assert histories.of("u")["row"].tolist() == [2, 4, 3]


def test_only_what_the_log_still_has_is_kept() -> None:
    histories = Histories(keep=10)
    take_in(histories, [("u", 1, 10), ("v", 2, 20), ("u", 3, 30), ("w", 4, 40)])
    histories.show("only shown", np.array([1], np.int32), partition=0)
    histories.put("elsewhere", events([9]), partition=1)
    assert histories.keep_only([np.array([4]), np.array([3, 5])], partition=0) == 2
    assert {user: histories.of(user)["row"].tolist() for user in histories.users()} == {
        "u": [3],
        "w": [4],
        "elsewhere": [9],
    }
    assert histories.sizes() == {0: 2, 1: 1}


def test_a_retry_counts_once_within_and_across_micro_batches() -> None:
    histories = Histories(keep=10)
    assert len(take_in(histories, [("u", 1, 10), ("u", 1, 10), ("u", 2, 20)])) == 2
    assert len(take_in(histories, [("u", 2, 20)])) == 0
    assert first_seen(np.array([5, 5, 6, 7]), np.array([6])).tolist() == [True, False, False, True]


def test_each_new_event_is_predicted_from_the_one_before_it_and_nothing_later() -> None:
    histories = Histories(keep=10)
    take_in(histories, [("u", 1, 10), ("u", 2, 20)])
    batch = take_in(histories, [("u", 3, 30), ("v", 7, 31), ("u", 4, 40)])
    assert batch.target_N.tolist() == [3, 4, 7]
    at_3, at_4, at_7 = batch.at_N
    assert batch.rows_E[at_3] == 2
    assert batch.rows_E[at_4] == 3
    assert at_7 == COLD
    assert 4 not in batch.rows_E
    seen = batch.seen(10, slice(None))
    assert seen[0].nonzero().flatten().tolist() == [1, 2]
    assert seen[1].nonzero().flatten().tolist() == [1, 2, 3]
    assert not seen[2].any()


def test_what_a_user_has_seen_is_kept_once_however_often_it_was() -> None:
    again = arrivals([("u", row, at) for at, row in enumerate([5, 2, 5, 5, 2, 3])])
    again.events["key"] = np.arange(len(again))
    batch = MicroBatch.of(group(again, Histories(keep=10)), context=4)
    assert batch.seen_rows().tolist() == [[0, 0], [5, 0], *[[5, 2]] * 4]


def test_a_long_micro_batch_is_cut_without_losing_context_or_targets() -> None:
    histories = Histories(keep=100)
    batch = take_in(histories, [("u", row, row) for row in range(1, 12)])
    assert batch.target_N.tolist() == list(range(1, 12))
    for at, target in zip(batch.at_N[1:], batch.target_N[1:], strict=True):
        assert batch.rows_E[at] == target - 1
    assert batch.lengths.max() <= 8


def test_packing_lays_every_sequence_into_one_line_whole() -> None:
    histories = Histories(keep=100)
    batch = take_in(histories, [(f"u{n}", row, row) for n in range(5) for row in range(1, n + 3)])
    lines = batch.lines
    warm = batch.at_N != COLD
    at = lines.at_N.numpy()[warm]
    assert lines.rows_BL.flatten()[at].tolist() == batch.rows_E[batch.at_N[warm]].tolist()
    for segment in range(1, len(batch.lengths) + 1):
        inside = (lines.segments_BL == segment).nonzero()
        assert len(inside) == batch.lengths[segment - 1]
        assert len(set(inside[:, 0].tolist())) <= 1


def test_histories_survive_a_checkpoint_and_move_with_their_partition() -> None:
    histories = Histories(keep=10)
    for n in range(4):
        histories.put(f"u{n}", events([n + 1, n + 2]), partition=n)
    histories.show("u1", np.array([3, 4], np.int32), partition=1)
    table = histories.to_table()
    whole = Histories.from_tables([table], keep=10)
    assert whole.to_table().equals(table)
    first, second = (Histories.from_tables([table], keep=10, rank=r, world=2) for r in (0, 1))
    assert (list(first.users()), list(second.users())) == (["u0", "u2"], ["u1", "u3"])
    again = Histories.from_tables([first.to_table(), second.to_table()], keep=10)
    assert sorted(again.users()) == sorted(whole.users())
    assert again.answer("u1") is not None


@pytest.mark.parametrize("keep", [0, -1])
def test_remembering_nothing_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="keep"):
        Histories(keep=keep)


@pytest.mark.parametrize("ordered", [True, False])
def test_replay_draws_old_windows_repeatably_and_leaves_users_out(ordered: bool) -> None:
    histories = Histories(keep=300)
    for n in range(20):
        histories.put(f"u{n}", events(range(1, 200)), partition=0)

    def drawn() -> list[tuple[str, int]]:
        news = replay.draw(
            histories,
            [3],
            sizes=histories.sizes(),
            users=8,
            window=5,
            ordered=ordered,
            leave_out={"u0", "u1"},
        )
        assert all(1 <= user.new.sum() <= 5 and user.new[-1] for user in news)
        as_they_came = all((np.diff(user.events["row"]) > 0).all() for user in news)
        assert as_they_came == ordered
        return [(user.user_id, len(user.events)) for user in news]

    assert drawn() == drawn()
    assert not {"u0", "u1"} & {user for user, _ in drawn()}


def test_users_with_few_events_are_drawn_too() -> None:
    histories = Histories(keep=100)
    for user in range(50):
        histories.put(f"u{user}", events(range(5)), partition=0)
    assert all(histories.sample(np.random.default_rng(seed), partition=0) for seed in range(100))


def test_users_who_were_only_shown_a_list_are_bounded_and_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray_jobs.histories.MOST_ONLY_SHOWN", 2_000)
    histories = Histories(keep=10)
    take_in(histories, [("active", row, row) for row in range(1, 6)])
    listed = np.arange(1, 11, dtype=np.int32)
    for number in range(2_001):
        histories.show(f"passer-by-{number}", listed, partition=0)
    assert "passer-by-0" not in histories and len(histories) == 2_001
    kept = Histories.from_tables([histories.to_table()], keep=10)
    rng = np.random.default_rng(0)
    for own in (histories, kept):
        drawn = [own.sample(rng, partition=0) for _ in range(20)]
        assert drawn == ["active"] * 20
        take_in(own, [("passer-by-7", 3, 9)])
        assert own.answer("passer-by-7") is not None
        assert own.forget("passer-by-7") and own.forget("passer-by-8")
        assert own.sizes() == {0: 1}


def test_one_pass_brings_every_event_once_the_latest_first_choice() -> None:
    histories = Histories(keep=300)
    histories.put("old", events(range(1, 8), range(7)), partition=0)
    histories.put("new", events(range(11, 18), range(100, 107)), partition=0)

    def rows(latest_events: int) -> list[int]:
        passes = replay.one_pass(
            histories, [0], users=2, window=3, ordered=True, latest_events=latest_events
        )
        return sorted(
            int(r) for news in passes for user in news for r in user.events["row"][user.new]
        )

    assert rows(100) == [*range(1, 8), *range(11, 18)]
    assert set(rows(3)) <= set(range(11, 18))


def test_a_shown_list_is_answered_by_the_next_interaction_only() -> None:
    catalog = Catalog()
    rows = catalog.add(["a", "b", "c"]).astype(np.int32)

    def batch(users: list[str], items: list[str], shown: list[Impression]) -> Received:
        n = len(users)
        return Received(
            user_ids=users,
            item_ids=items,
            types=["view"] * n,
            values=np.full(n, np.nan),
            times_ms=np.arange(n),
            arrivals_ms=np.arange(n),
            partitions=[0] * n,
            keys=np.arange(n),
            impressions=shown,
        )

    def show(user: str, items: list[str], before: int) -> Impression:
        return Impression(user_id=user, partition=0, item_ids=items, before=before)

    histories = Histories(keep=10)
    first = batch(["u", "u"], ["c", "a"], [show("u", ["a", "b"], 1), show("v", ["a"], 2)])
    assert answer_lists(first, rows[[2, 0]], histories, catalog) == (1, 1)
    second = batch(["v", "u"], ["b", "b"], [])
    assert answer_lists(second, rows[[1, 1]], histories, catalog) == (1, 0)
