"""Reads users' histories; one within a deadline, on the event loop."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from services.core.errors import DamagedRowError, UnavailableError
from services.core.features import FeatureStore, UserHistory

COOL_DOWN_S: Final = 1.0


class Histories:
    """The online store, held at arm's length.

    After a failure nobody asks it for a second: one answer a second pays the deadline, not all.
    """

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._ask_again_at_s = 0.0

    async def read(self, user_id: str) -> UserHistory:
        """The history, empty for an unknown user; `UnavailableError` within the deadline."""
        with self._in_reach():
            return await self._store.await_user(user_id)

    def read_now(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """The histories in the order asked for, in one round trip; blocks for as long as it takes
        while the store goes on answering."""
        with self._in_reach():
            return self._store.peek_users(user_ids)

    async def close(self) -> None:
        await self._store.stop_waiting()

    @contextmanager
    def _in_reach(self) -> Iterator[None]:
        """Refused in a cool-down, which whatever fails in here begins, but for one user's row."""
        if time.monotonic() < self._ask_again_at_s:
            raise UnavailableError("the online store failed less than a second ago")
        try:
            yield
        except UnavailableError as error:
            if not isinstance(error, DamagedRowError):
                self._ask_again_at_s = time.monotonic() + COOL_DOWN_S
            raise
