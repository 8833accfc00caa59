"""The page and its API: `/`, `/api/status`, `/api/state`, `/api/history`, `/api/stream`, and what
`trying` and `operating` add."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.console import operating, trying
from services.console.aside import Aside
from services.console.guard import Guard, SecureHeaders
from services.console.store import Store
from services.console.watch import Metrics, Watcher
from services.core.errors import (
    AccessError,
    ForbiddenError,
    RefluxError,
    UnauthorizedError,
    VersionNotFoundError,
    shown,
)
from services.core.settings import Settings

STATIC: Final = Path(__file__).parent / "static"
STORE: Final = "console.sqlite"
MAX_HISTORY_S: Final = 30 * 86_400


def create_app(settings: Settings) -> FastAPI:
    """The application. It looks at the system from its start on."""
    metrics = Metrics()
    guard = Guard(settings)
    store = Store(settings.home.absolute() / STORE)
    watcher = Watcher(settings, store, metrics)
    doors, ray = trying.Doors(settings), operating.Ray(settings)
    aside = Aside(settings.environment())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        try:
            yield
        finally:
            watcher.stop()
            await aside.close()
            await doors.close()
            await ray.close()
            store.close()

    app = FastAPI(title="Reflux: console", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(SecureHeaders)
    app.include_router(trying.router(guard, doors, aside))
    app.include_router(operating.router(guard, settings, watcher, ray))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")

    @app.get("/api/status")
    def status(request: Request) -> Response:
        """How things stand; what `reflux status --json` prints."""
        guard.enter(request.headers)
        return _json(watcher.look())

    @app.get("/api/state")
    def state(request: Request) -> Response:
        """What a page needs to begin: how things stand, all versions, what the caller may do."""
        roles = guard.enter(request.headers)
        return _json(
            {
                "status": watcher.look(),
                "versions": watcher.versions(),
                "roles": sorted(roles),
                "keys": bool(settings.keys.roles_of),
            }
        )

    @app.get("/api/history")
    def history(request: Request, seconds: int = Query(900, ge=60, le=MAX_HISTORY_S)) -> Response:
        """Every series of the last `seconds`, in columns."""
        guard.enter(request.headers)
        now_ms = time.time_ns() // 1_000_000
        return _json(store.history(since_ms=now_ms - 1000 * seconds, until_ms=now_ms))

    @app.get("/api/stream")
    async def stream(request: Request) -> StreamingResponse:
        """Server-sent events: `look` every two seconds, `versions` when there are new ones."""
        guard.enter(request.headers)
        return StreamingResponse(watcher.follow(), media_type="text/event-stream")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(AccessError)
    async def refused(_: Request, error: AccessError) -> JSONResponse:
        if isinstance(error, ForbiddenError):
            return JSONResponse({"detail": str(error)}, status_code=403)
        assert isinstance(error, UnauthorizedError)
        headers = {"www-authenticate": "Bearer"}
        return JSONResponse({"detail": str(error)}, status_code=401, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # FastAPI's own answer repeats what was sent, and breaks down where no JSON can say it.
        wrong = [
            {"loc": one["loc"], "msg": one["msg"], "input": shown(one["input"])}
            for one in error.errors()
        ]
        content = json.dumps({"detail": wrong})
        return Response(content, media_type="application/json", status_code=422)

    @app.exception_handler(OSError)
    async def unreachable(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"detail": f"the registry can't be read: {error}"}, status_code=503)

    @app.exception_handler(RefluxError)
    async def failed(_: Request, error: RefluxError) -> JSONResponse:
        status = 503
        if isinstance(error, operating.ChangedError):
            status = 409
        elif isinstance(error, VersionNotFoundError | operating.NoSuchThingError):
            status = 404
        elif isinstance(error, trying.RefusedError):
            status = error.status
        return JSONResponse({"detail": str(error)}, status_code=status)

    return app


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
