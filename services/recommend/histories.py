"""Reads a user's history within a deadline, off the event loop."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from services.core.errors import UnavailableError
from services.core.features import FeatureStore, UserHistory

THREADS: Final = 8
COOL_DOWN_S: Final = 1.0


class Histories:
    """The online store, held at arm's length.

    After a failure nobody asks it for a second: one answer a second pays the deadline, not all.
    """

    def __init__(self, store: FeatureStore, *, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="histories")
        self._ask_again_at_s = 0.0

    async def read(self, user_id: str) -> UserHistory:
        """The history, empty for an unknown user; `UnavailableError` within the deadline."""
        self._refuse_in_cool_down()
        loop = asyncio.get_running_loop()
        try:
            reading = loop.run_in_executor(self._pool, self._store.peek_users, [user_id])
            return (await asyncio.wait_for(reading, self._timeout_s))[0]
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

    def _refuse_in_cool_down(self) -> None:
        if time.monotonic() < self._ask_again_at_s:
            raise UnavailableError("the online store failed less than a second ago")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
