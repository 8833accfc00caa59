"""Reads users' histories; one within a deadline, on the event loop."""

import time
from collections.abc import Sequence
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
        self._refuse_in_cool_down()
        try:
            return await self._store.await_user(user_id)
        except DamagedRowError:  # that user's alone
            raise
        except UnavailableError:
            self._ask_again_at_s = time.monotonic() + COOL_DOWN_S
            raise

    def read_now(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """The histories in the order asked for, in one round trip; blocks for as long as it takes
        while the store goes on answering."""
        self._refuse_in_cool_down()
        try:
            return self._store.peek_users(user_ids)
        except DamagedRowError:
            raise
        except UnavailableError:
            self._ask_again_at_s = time.monotonic() + COOL_DOWN_S
            raise

    async def close(self) -> None:
        await self._store.stop_waiting()

    def _refuse_in_cool_down(self) -> None:
        if time.monotonic() < self._ask_again_at_s:
            raise UnavailableError("the online store failed less than a second ago")
