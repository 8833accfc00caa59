"""What an application does with a running Reflux: send events, ask for answers. Over HTTP only."""

import time
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from services.core.errors import InvalidEventError, UnavailableError
from services.core.settings import Settings


def new_event(
    *, user_id: str, item_id: str, type_: str, value: float | None = None
) -> dict[str, Any]:
    """An event that happens now, with an id of its own."""
    event: dict[str, Any] = {
        "event_id": uuid.uuid4().hex,
        "user_id": user_id,
        "item_id": item_id,
        "type": type_,
        "timestamp": int(time.time() * 1000),
    }
    return event if value is None else {**event, "value": value}


class Client:
    """Talks to `settings.gateway_url` and `settings.recommend_url`; errors name the fix."""

    def __init__(self, settings: Settings, *, timeout_s: float = 30.0) -> None:
        if not settings.gateway_url or not settings.recommend_url:
            raise UnavailableError(
                "no running stack is known here: run `reflux up`, or set REFLUX_GATEWAY_URL and "
                "REFLUX_RECOMMEND_URL"
            )
        self._gateway = settings.gateway_url
        self._recommend = settings.recommend_url
        self._keys = settings.keys
        self._http = httpx.Client(timeout=timeout_s)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def send(self, body: bytes) -> dict[str, Any]:
        """Post one JSON event, an array, or NDJSON. Returns `accepted` and the `rejected` ones."""
        return self._send("/v1/events", body)

    def put_items(self, body: bytes) -> dict[str, Any]:
        """The same with items' metadata."""
        return self._send("/v1/items", body)

    def recommend(
        self,
        *,
        user_id: str | None,
        n: int = 10,
        recent_items: Sequence[str] = (),
        categories: Sequence[str] = (),
    ) -> dict[str, Any]:
        """One answer: items with scores, versions, the features' age, the fallback if any."""
        request: dict[str, Any] = {"n": n}
        if user_id is not None:
            request["user_id"] = user_id
        if recent_items:
            request["recent_items"] = list(recent_items)
        if categories:
            request["categories"] = list(categories)
        response = self._post(
            f"{self._recommend}/v1/recommendations",
            json=request,
            headers=self._keys.header("recommend"),
        )
        if response.status_code == 422:
            problem = response.json()["detail"][0]
            raise InvalidEventError(
                field=problem["field"], value=problem["value"], fix=problem["fix"]
            )
        if response.status_code != 200:
            raise UnavailableError(f"no answer ({response.status_code}): {response.text}")
        return dict(response.json())

    def _send(self, path: str, body: bytes) -> dict[str, Any]:
        response = self._post(
            f"{self._gateway}{path}",
            content=body,
            headers={
                "content-type": "application/x-ndjson" if _is_ndjson(body) else JSON,
                **self._keys.header("produce"),
            },
        )
        if response.status_code not in (202, 422):
            raise UnavailableError(f"the gateway answered {response.status_code}: {response.text}")
        return dict(response.json())

    def _post(self, url: str, **options: Any) -> httpx.Response:
        try:
            return self._http.post(url, **options)
        except httpx.TransportError as error:
            raise UnavailableError(
                f"{url} doesn't answer ({error}); `reflux status` tells what runs"
            ) from None


JSON = "application/json"


def _is_ndjson(body: bytes) -> bool:
    """Several lines, each an object of its own (pretty-printed JSON has none such)."""
    lines = body.split(b"\n", 2)
    return len(lines) > 1 and lines[0].startswith(b"{") and lines[0].rstrip().endswith(b"}")
