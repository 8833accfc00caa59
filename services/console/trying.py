"""Try it: ask as a user would, at the real doors, and take the time.

Whoever looks at the page does so with a key of their own, which is passed on to those doors.
"""

import asyncio
import time
import uuid
from typing import Annotated, Any, Final
from urllib.parse import quote

import httpx
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from services.console.aside import Aside
from services.console.guard import Guard
from services.core.errors import RefluxError, UnavailableError
from services.core.events import Event, EventType, Id, encode
from services.core.settings import Settings

KNOWN_WITHIN_S: Final = 15.0
LOOK_AGAIN_S: Final = 0.01
HISTORY: Final = 512  # events a teacher is told
SHOWN_EVENTS: Final = 24
USERS_EVERY_S: Final = 30.0
NEWEST_EVERY_S: Final = 30.0


class Whom(BaseModel):
    """A user, or a session without a name: what was seen in it, oldest first."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = None
    recent_items: list[Id] = Field(default_factory=list, max_length=1_000)
    n: int = Field(10, ge=1, le=50)


class Click(BaseModel):
    """What a user does with an item."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id
    item_id: Id
    type: EventType = EventType.CLICK
    n: int = Field(10, ge=1, le=50)


class RefusedError(RefluxError):
    """A door doesn't want what it was asked; `status` is its own."""

    def __init__(self, said: str, *, status: int) -> None:
        self.status = status
        super().__init__(said)


class Doors:
    """Gateway and answers, by HTTP. Errors say which door, and what it said."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._http = httpx.AsyncClient(timeout=10.0)

    async def close(self) -> None:
        await self._http.aclose()

    async def recommend(self, whom: Whom, *, key: str | None) -> dict[str, Any]:
        """An answer, and the milliseconds that it took from here."""
        began_s = time.perf_counter()
        request = whom.model_dump(exclude_none=True)
        url = f"{self._settings.recommend_url}/v1/recommendations"
        found = await self._ask("POST", url, key, json=request)
        return {**found, "ms": 1000 * (time.perf_counter() - began_s)}

    async def trending(self, n: int, *, key: str | None) -> dict[str, Any]:
        return await self.recommend(Whom(n=n), key=key)

    async def history(self, user_id: str, *, n: int, key: str | None) -> dict[str, Any]:
        """The user's latest events, newest first."""
        url = f"{self._settings.recommend_url}/v1/users/{quote(user_id, safe='')}"
        return await self._ask("GET", url, key, params={"n": n})

    async def history_in_reach(
        self, user_id: str, *, n: int, key: str | None
    ) -> dict[str, Any] | None:
        """The same; None while the online store can't be read: answers come without it, too."""
        try:
            return await self.history(user_id, n=n, key=key)
        except UnavailableError:
            return None

    async def send(self, event: Event, *, key: str | None) -> None:
        url = f"{self._settings.gateway_url}/v1/events"
        headers = {"content-type": "application/json"}
        await self._ask("POST", url, key, content=encode(event), headers=headers)

    async def _ask(self, method: str, url: str, key: str | None, **options: Any) -> dict[str, Any]:
        if url.startswith("/"):
            raise UnavailableError("set REFLUX_GATEWAY_URL and REFLUX_RECOMMEND_URL")
        headers = options.pop("headers", {})
        if key:
            headers = {**headers, "authorization": key.encode("latin-1")}  # byte for byte
        try:
            response = await self._http.request(method, url, headers=headers, **options)
        except httpx.TransportError as error:
            raise UnavailableError(f"{url} doesn't answer ({type(error).__name__})") from None
        if response.status_code >= 400:
            said = f"{url} answered {response.status_code}: {response.text[:500]}"
            if response.status_code < 500:
                raise RefusedError(said, status=response.status_code)
            raise UnavailableError(said)
        return dict(response.json())


def router(guard: Guard, doors: Doors, aside: Aside) -> APIRouter:
    """`/api/try/...`"""

    def entered(http: Request) -> str | None:
        guard.change(http.headers)
        return http.headers.get("authorization")

    def read(http: Request) -> None:
        guard.enter(http.headers)

    key_of_caller = Annotated[str | None, Depends(entered)]
    routes = APIRouter(prefix="/api/try")

    @routes.get("/users", dependencies=[Depends(read)])
    async def users() -> dict[str, Any]:
        """Who was here lately."""
        return await aside.ask_sometimes("users", every_s=USERS_EVERY_S, n=40)

    @routes.get("/newest", dependencies=[Depends(read)])
    async def newest() -> dict[str, Any]:
        """The items that the student learned of last."""
        return await aside.ask_sometimes("newest", every_s=NEWEST_EVERY_S, n=8)

    @routes.post("/answers")
    async def answers(whom: Whom, key: key_of_caller) -> dict[str, Any]:
        """What the student says, what is trending, and what is known of the user."""
        student, trending, history = await asyncio.gather(
            doors.recommend(whom, key=key), doors.trending(whom.n, key=key), _history(whom, key)
        )
        return {"student": student, "trending": trending, "history": history}

    @routes.post("/teacher")
    async def teacher(whom: Whom, key: key_of_caller) -> dict[str, Any]:
        """What the teacher would say; it is loaded for the first one."""
        known: dict[str, Any] = {"events": []}
        if whom.user_id is not None:
            known = await doors.history(whom.user_id, n=HISTORY, key=key)
        return await aside.ask(
            "teacher", events=known["events"][::-1], recent_items=whom.recent_items, n=whom.n
        )

    @routes.post("/click")
    async def click(clicked: Click, key: key_of_caller) -> dict[str, Any]:
        """Send the event, wait until answers know it, and give the one that does.

        Milliseconds since the click: `accepted_ms` (Kafka has it), `known_ms` (features have it;
        None: not within `KNOWN_WITHIN_S`), `answered_ms` (the answer is here).
        """
        began_s = time.perf_counter()
        event = Event(
            event_id=uuid.uuid4().hex,
            user_id=clicked.user_id,
            item_id=clicked.item_id,
            type=clicked.type,
            timestamp=time.time_ns() // 1_000_000,
        )

        def since_ms() -> float:
            return 1000 * (time.perf_counter() - began_s)

        await doors.send(event, key=key)
        accepted_ms = since_ms()
        known: dict[str, Any] | None = None
        known_ms: float | None = None
        # Features that are late or out of reach are no error: whoever gets one clicks again, and
        # the event is in Kafka already.
        while since_ms() < 1000 * KNOWN_WITHIN_S:
            known = await doors.history_in_reach(clicked.user_id, n=SHOWN_EVENTS, key=key)
            if known and any(
                (seen["item_id"], seen["timestamp"]) == (event.item_id, event.timestamp)
                for seen in known["events"]
            ):
                known_ms = since_ms()
                break
            await asyncio.sleep(LOOK_AGAIN_S)
        student = await doors.recommend(Whom(user_id=clicked.user_id, n=clicked.n), key=key)
        return {
            "accepted_ms": accepted_ms,
            "known_ms": known_ms,
            "answered_ms": since_ms(),
            "student": student,
            "history": known,
        }

    async def _history(whom: Whom, key: str | None) -> dict[str, Any] | None:
        if whom.user_id is None:
            return None
        return await doors.history_in_reach(whom.user_id, n=SHOWN_EVENTS, key=key)

    return routes
