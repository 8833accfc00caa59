"""Old events learned again, so that the student doesn't forget: windows of remembered histories.

The buffer is `Histories` itself. What is drawn is a user's events up to some time with the last
few marked new, so it is packed, labelled and learned by the same code as what has just arrived;
the teacher labels it in the same pass, for a stored label would be an older teacher's.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from ray_jobs.histories import Histories
from ray_jobs.microbatch import UserNews
from ray_jobs.peers import ALONE, Peers


def draw(
    histories: Histories,
    seed: Sequence[int],
    *,
    sizes: Mapping[int, int],
    users: int,
    window: int,
    ordered: bool,
    leave_out: Collection[str] = (),
) -> list[UserNews]:
    """One random window of `window` events of each of `users` random users: of those, ours.

    sizes: users by partition, of all workers. Which users are drawn depends on these and on `seed`
    alone, not on how many workers share the partitions.
    ordered: False shuffles a user's events first, for a student that reads them as a set.
    leave_out: users who are in the same step with their newest events.
    """
    partitions = sorted(sizes)
    share = np.array([sizes[partition] for partition in partitions], float)
    if not share.sum():
        return []
    picked = np.random.default_rng(seed).choice(partitions, users, p=share / share.sum())
    news: dict[str, UserNews] = {}
    for i, partition in enumerate(picked):
        rng = np.random.default_rng([*seed, i])
        user_id = histories.sample(rng, partition=int(partition))
        if user_id is None or user_id in leave_out or user_id in news:
            continue
        n_events = len(histories.of(user_id))
        end = min(n_events, int(rng.integers(1, n_events + window)))
        news[user_id] = _window(histories, user_id, end, window, None if ordered else rng)
    return list(news.values())


def one_pass(
    histories: Histories,
    seed: Sequence[int],
    *,
    users: int,
    window: int,
    ordered: bool,
    latest_events: int,
    peers: Peers = ALONE,
) -> Iterator[list[UserNews]]:
    """Every event of the `latest_events` last ones once, as windows in random order, `users` of
    them at a time over all workers, of which each gets its own. The order is the same for any
    number of workers; all of them must go through it together.

    Shuffled (`ordered` false), an event of a user with several windows comes once on average.
    """
    ends = windows(histories, window=window, latest_events=latest_events, peers=peers)
    order = np.random.default_rng(seed).permutation(len(ends))
    for first in range(0, len(order), users):
        yield [
            _window(
                *(histories, ends[i][0], ends[i][1], window),
                None if ordered else np.random.default_rng([*seed, int(i)]),
            )
            for i in order[first : first + users]
            if ends[i][0] in histories
        ]


def windows(
    histories: Histories, *, window: int, latest_events: int, peers: Peers = ALONE
) -> list[tuple[str, int]]:
    """Where the windows of the `latest_events` last events end: (user, end), of all workers."""
    own: list[tuple[int, str, int]] = []  # time of the last event, user, end
    for user_id in histories.users():
        events = histories.of(user_id)
        for end in range(len(events), 0, -window):
            own.append((int(events["time_ms"][end - 1]), user_id, end))
    parts = peers.gather(_latest(own, window, latest_events))
    ends = _latest([one for part in parts for one in part], window, latest_events)
    return [(user_id, end) for _, user_id, end in ends]


def _latest(
    ends: list[tuple[int, str, int]], window: int, n_events: int
) -> list[tuple[int, str, int]]:
    """The newest first, as many as it takes to have `n_events`."""
    ends = sorted(ends, reverse=True)
    sizes = np.array([min(end, window) for _, _, end in ends])
    return ends[: int(np.searchsorted(np.cumsum(sizes), n_events)) + 1]


def _window(
    histories: Histories, user_id: str, end: int, window: int, shuffle: np.random.Generator | None
) -> UserNews:
    """The user's first `end` events, the last `window` of them marked new."""
    events = histories.of(user_id)
    if shuffle is not None:
        events = shuffle.permutation(events)
    new = np.zeros(end, bool)
    new[max(0, end - window) :] = True
    return UserNews(
        user_id=user_id,
        partition=histories.partition_of(user_id),
        events=events[:end],
        new=new,
    )
