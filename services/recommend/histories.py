"""Reads users' histories; one within a deadline, on the event loop."""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from services.core.errors import UnavailableError
from services.core.features import FeatureStore, UserHistory

COOL_DOWN_S: Final = 1.0


class Histories:
    """The online store, held at arm's length.

    After a failure nobody asks it for a second: one answer a second pays the deadline, not all.
    """

    def __init__(self, store: FeatureStore, *, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._ask_again_at_s = 0.0

    async def read(self, user_id: str) -> UserHistory:
        """The history, empty for an unknown user; `UnavailableError` within the deadline."""
        self._refuse_in_cool_down()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._store.await_user(user_id)
        except (UnavailableError, TimeoutError) as error:
            self._ask_again_at_s = time.monotonic() + COOL_DOWN_S
            why = str(error) or f"the online store took longer than {self._timeout_s:g} s"
            raise UnavailableError(why) from None

    def read_now(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """The histories in the order asked for, in one round trip; blocks for as long as it takes
        while the store goes on answering."""
        self._refuse_in_cool_down()
        try:
            return self._store.peek_users(user_ids)
        except UnavailableError:
            self._ask_again_at_s = time.monotonic() + COOL_DOWN_S
            raise

    async def close(self) -> None:
        await self._store.stop_waiting()

    def _refuse_in_cool_down(self) -> None:
        if time.monotonic() < self._ask_again_at_s:
            raise UnavailableError("the online store failed less than a second ago")
