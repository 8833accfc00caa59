"""What an operator does from the page: promote, roll back, release; and what logs say."""

import asyncio
import time
from pathlib import Path
from typing import Any, Final, Literal

import httpx
from fastapi import APIRouter, Depends, Request
from fastapi import Path as PathOf
from pydantic import BaseModel, ConfigDict, Field

from services.console.guard import Guard
from services.console.watch import Watcher
from services.core.errors import RefluxError, RegistryError, UnavailableError
from services.core.ray_dashboard import ray_headers
from services.core.registry import Kind, Registry
from services.core.settings import Settings

TAIL_BYTES: Final = 64 * 1024
MAX_VERSION: Final = 10**9  # a longer number is no folder's name
JOBS_EVERY_S: Final = 5.0
MODULES: Final = ("ray_jobs.train_teacher", "ray_jobs.distill_student")


class ChangedError(RefluxError):
    """Another operator has decided meanwhile, or there is nothing to change."""


class NoSuchThingError(RefluxError):
    """No log and no job of that name."""


class Change(BaseModel):
    """What to do with which model.

    `held`: what an operator held when this was decided, for two operators not to undo each other.
    What the learning jobs promote meanwhile doesn't matter: they may do so every few seconds.
    """

    model_config = ConfigDict(extra="forbid")

    action: Literal["promote", "roll_back", "release"]
    kind: Kind
    version: int | None = Field(
        None, description="to promote, or to roll back to", ge=1, le=MAX_VERSION
    )
    held: int | None = Field(ge=1, le=MAX_VERSION)
    reason: str = Field("by hand, from the console", max_length=200)


class Ray:
    """Our jobs, as Ray's dashboard tells; asked at most every few seconds."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.ray_address.rstrip("/")
        self._http = httpx.AsyncClient(timeout=5.0)
        self._lock = asyncio.Lock()
        self._asked_s = -JOBS_EVERY_S
        self._jobs: list[dict[str, Any]] = []
        self._trouble = ""

    async def jobs(self) -> list[dict[str, Any]]:
        """The newest job of each kind; `UnavailableError` where Ray doesn't say."""
        async with self._lock:
            if self._url and time.monotonic() - self._asked_s >= JOBS_EVERY_S:
                self._asked_s, self._trouble = time.monotonic(), ""
                try:
                    self._jobs = await self._newest_of_each()
                except UnavailableError as error:
                    self._trouble = str(error)
            if self._trouble:
                raise UnavailableError(self._trouble)
            return self._jobs

    async def log(self, submission_id: str) -> str:
        response = await self._get(f"/api/jobs/{submission_id}/logs")
        return str(response.json()["logs"])[-TAIL_BYTES:]

    async def close(self) -> None:
        await self._http.aclose()

    async def _newest_of_each(self) -> list[dict[str, Any]]:
        found = (await self._get("/api/jobs/")).json()
        newest: dict[str, dict[str, Any]] = {}
        for job in sorted(found, key=lambda job: job.get("start_time") or 0):
            for module in MODULES:
                if job.get("submission_id") and module in (job.get("entrypoint") or ""):
                    newest[module] = {
                        "name": module.partition(".")[2],
                        "id": job["submission_id"],
                        "status": job["status"],
                        "message": job.get("message") or "",
                        "started_ms": job.get("start_time"),
                    }
        return list(newest.values())

    async def _get(self, path: str) -> httpx.Response:
        try:
            response = await self._http.get(f"{self._url}{path}", headers=ray_headers())
        except httpx.TransportError as error:
            raise UnavailableError(f"Ray at {self._url!r} doesn't answer ({error})") from None
        if response.status_code != 200:
            raise UnavailableError(f"Ray answered {response.status_code}: {response.text[:200]}")
        return response


def router(guard: Guard, settings: Settings, watcher: Watcher, ray: Ray) -> APIRouter:
    """`/api/versions`, `/api/logs`, `/api/jobs`."""
    registry = Registry(settings.registry)
    routes = APIRouter(prefix="/api")

    def read(http: Request) -> None:
        guard.enter(http.headers)

    def operate(http: Request) -> None:
        guard.enter(http.headers, "operate")

    def change_it(http: Request) -> None:
        guard.change(http.headers, "operate")

    @routes.get("/versions/{kind}/{version}", dependencies=[Depends(read)])
    def version(kind: Kind, version: int = PathOf(ge=1, le=MAX_VERSION)) -> dict[str, Any]:
        """One version's whole manifest."""
        return registry.manifest(kind, version)

    @routes.post("/versions", dependencies=[Depends(change_it)])
    def change(wanted: Change) -> dict[str, Any]:
        """Promote and hold, roll back and hold, or release what is held."""
        kind, version = wanted.kind, wanted.version
        try:
            held = registry.held(kind)
        except RegistryError:  # nobody can tell: promoting mends that
            held = None
        if held != wanted.held:
            raise ChangedError(f"{_held(kind, held)} now: look again")
        if wanted.action == "release":
            if held is None:
                raise ChangedError(f"{_held(kind, held)}: there is nothing to release")
            registry.release(kind)
        elif version is None:
            raise ChangedError(f"{wanted.action}: say which version")
        elif wanted.action == "promote":
            registry.promote(kind, version, wanted.reason, hold=True)
        else:
            try:
                registry.roll_back(kind, version)
            except RegistryError as error:  # nothing serves, or it does already, or is gone
                raise ChangedError(str(error)) from None
        watcher.changed()
        return {"version": registry.serving(wanted.kind).version}

    @routes.get("/jobs", dependencies=[Depends(read)])
    async def jobs() -> list[dict[str, Any]]:
        return await ray.jobs()

    @routes.get("/logs", dependencies=[Depends(read)])
    def logs() -> list[str]:
        """Names of the logs of this machine's processes."""
        return sorted(path.stem for path in settings.logs.glob("*.log"))

    @routes.get("/logs/{name}", dependencies=[Depends(operate)])
    def log(name: str) -> dict[str, str]:
        """A process's newest lines."""
        return {"name": name, "text": _tail(settings.logs, name)}

    @routes.get("/jobs/{submission_id}/log", dependencies=[Depends(operate)])
    async def job_log(submission_id: str) -> dict[str, str]:
        known = {job["id"] for job in await ray.jobs()}
        if submission_id not in known:
            raise NoSuchThingError(f"no such job: {submission_id!r}")
        return {"name": submission_id, "text": await ray.log(submission_id)}

    return routes


def _held(kind: Kind, version: int | None) -> str:
    return f"no {kind} is held" if version is None else f"{kind} {version} is held"


def _tail(directory: Path, name: str) -> str:
    path = next((path for path in directory.glob("*.log") if path.stem == name), None)
    if path is None:
        raise NoSuchThingError(f"no log of that name: {name!r}")
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = log.read().decode(errors="replace")
    return text if len(text) < TAIL_BYTES else text.partition("\n")[2]
