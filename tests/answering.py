"""The answers' app under a real server, and a client's ways with it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from services.core.features import FeatureStore, UserHistory
from services.core.settings import Settings
from services.local import processes
from services.recommend.app import create_app


@contextmanager
def serving(settings: Settings) -> Iterator[httpx.Client]:
    """The app under a real server, on a port of its own."""
    port = processes.free_port()
    config = uvicorn.Config(create_app(settings), port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], Any], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def write_history(settings: Settings, user_id: str, *item_ids: str) -> None:
    now_ms = time.time_ns() // 1_000_000
    row = UserHistory(
        user_id=user_id,
        item_ids=item_ids,
        event_types=("view",) * len(item_ids),
        timestamps_ms=tuple(now_ms - 1_000 + at for at in range(len(item_ids))),
        values=(float("nan"),) * len(item_ids),
        event_keys=tuple(range(len(item_ids))),
        n_events=len(item_ids),
        last_arrival_ms=now_ms,
        updated_ms=now_ms,
    )
    FeatureStore(settings).write_users([row])


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post("/v1/recommendations", json=request)
    assert response.status_code == 200, response.text
    return dict(response.json())


def ids(answer: dict[str, Any]) -> list[str]:
    return [shown["item_id"] for shown in answer["items"]]
