"""Old events learned again, so that the student doesn't forget: windows of remembered histories.

The buffer is `Histories` itself. What is drawn is a user's events up to some time with the last
few marked new, so it is packed, labelled and learned by the same code as what has just arrived;
the teacher labels it in the same pass, for a stored label would be an older teacher's.
"""

from collections.abc import Collection, Iterator

import numpy as np

from ray_jobs.histories import Histories
from ray_jobs.microbatch import UserNews


def draw(
    histories: Histories,
    rng: np.random.Generator,
    *,
    users: int,
    window: int,
    ordered: bool,
    leave_out: Collection[str] = (),
) -> list[UserNews]:
    """One random window of `window` events of each of `users` random users.

    ordered: False shuffles a user's events first, for a student that reads them as a set.
    leave_out: users who are in the same step with their newest events.
    """
    news = []
    for user_id in histories.sample(rng, users):
        n_events = len(histories.of(user_id))
        end = min(n_events, int(rng.integers(1, n_events + window)))
        if user_id not in leave_out:
            news.append(_window(histories, user_id, end, window, None if ordered else rng))
    return news


def one_pass(
    histories: Histories,
    rng: np.random.Generator,
    *,
    users: int,
    window: int,
    ordered: bool,
    latest_events: int,
) -> Iterator[list[UserNews]]:
    """Every event of the `latest_events` last ones once, as windows in random order, `users` of
    them at a time. Windows begin anywhere, so that each pass cuts histories elsewhere.

    Shuffled (`ordered` false), an event of a user with several windows comes once on average.
    """
    shuffle = None if ordered else rng
    ends: list[tuple[str, int, int]] = []  # user, end, time of the last event
    for user_id in histories.users():
        events = histories.of(user_id)
        for end in range(len(events), 0, -window):
            ends.append((user_id, end, int(events["time_ms"][end - 1])))
    ends.sort(key=lambda at: at[2], reverse=True)
    sizes = np.array([min(end, window) for _, end, _ in ends])
    ends = ends[: int(np.searchsorted(np.cumsum(sizes), latest_events)) + 1]
    order = rng.permutation(len(ends))
    for first in range(0, len(order), users):
        picked = [ends[i] for i in order[first : first + users]]
        yield [_window(histories, user, end, window, shuffle) for user, end, _ in picked]


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
