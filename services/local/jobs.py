"""Ray jobs of ours: submit, find, stop. What `ray job submit` does, from the CLI and the stack."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.core.errors import RAY_TOKEN, RefluxError, UnauthorizedError, UnavailableError
from services.core.ray_dashboard import WithDeadline
from services.core.registry import Kind
from services.core.settings import Settings

JobKind = Kind | Literal["everyone"]

MODULES: dict[JobKind, str] = {
    "teacher": "ray_jobs.train_teacher",
    "student": "ray_jobs.distill_student",
    "everyone": "services.recommend.everyone",
}
# What a job has no use for; Ray leaves out by itself what .gitignore names.
# reflux.toml is this machine's, and may have passwords in it.
NOT_CARRIED = ["/.git", "/.venv", "/.reflux", "/.ci", "/tests", "/deploy", "/reflux.toml"]
STOP_TIMEOUT_S = 90.0  # the last checkpoint may go to an object store


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submitted job, as the Jobs API tells it."""

    kind: JobKind
    submission_id: str
    status: str
    message: str
    started_ms: int
    driver: str = ""  # Ray's own id, by which its processes can be told, once it has begun

    @property
    def active(self) -> bool:
        return self.status in ("PENDING", "RUNNING")


class Jobs:
    """The Jobs API of the Ray that `settings.ray_address` names.

    `elsewhere`: a cluster with settings of its own (its nodes' environment); a job started there
    gets those, and on top of them only what is set here.
    """

    def __init__(self, settings: Settings, *, embedded: bool, elsewhere: bool = False) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        class Client(WithDeadline, JobSubmissionClient):
            pass

        if not settings.ray_address:
            raise UnavailableError(
                "no Ray is configured or running; run `reflux up` first, or say where one is "
                "(--address http://host:8265, or REFLUX_RAY_ADDRESS)"
            )
        self.settings = settings
        self._embedded = embedded
        self._elsewhere = elsewhere
        try:
            self._client = Client(settings.ray_address)
        except ConnectionError as error:
            raise UnavailableError(
                f"ray_address={settings.ray_address!r}: the Jobs API doesn't answer; "
                f"check the address and that Ray runs ({error})"
            ) from None
        except AuthenticationError:
            raise UnauthorizedError(RAY_TOKEN.format(settings.ray_address)) from None

    def submit(self, kind: JobKind, arguments: Sequence[str] = ()) -> str:
        """Start the job and return its submission id; refuse while one of its kind is active."""
        if running := self.active(kind):
            raise RefluxError(
                f"a {kind} job is active already ({running.submission_id}, {running.status}); "
                f"wait for it or stop it first"
            )
        argv = ["-m", MODULES[kind], *arguments]
        # An embedded Ray runs our own interpreter, with this code importable; elsewhere the code
        # travels along and the cluster's `python` runs it.
        python = sys.executable if self._embedded else "python"
        env_vars = self.settings.environment(elsewhere=self._elsewhere, secrets=False)
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if not self._embedded:
            runtime_env["working_dir"] = str(Path(__file__).parents[2])
            runtime_env["excludes"] = NOT_CARRIED
        return str(
            self._client.submit_job(
                entrypoint=shlex.join([python, *argv]),
                runtime_env=runtime_env,
                metadata={"reflux": kind},
                submission_id=f"reflux-{kind}-{time.strftime('%Y%m%d-%H%M%S')}",
            )
        )

    def list(self, kind: JobKind) -> "list[Job]":
        """Jobs of this kind, oldest first, those that `ray job submit` started included."""
        found = []
        for details in self._client.list_jobs():
            if details.submission_id and MODULES[kind] in (details.entrypoint or ""):
                found.append(
                    Job(
                        kind=kind,
                        submission_id=details.submission_id,
                        status=str(details.status.value),
                        message=details.message or "",
                        started_ms=details.start_time or 0,
                        driver=details.driver_info.id if details.driver_info else "",
                    )
                )
        return sorted(found, key=lambda job: job.started_ms)

    def active(self, kind: JobKind) -> Job | None:
        return next((job for job in reversed(self.list(kind)) if job.active), None)

    def get(self, submission_id: str) -> Job:
        for kind in MODULES:
            for job in self.list(kind):
                if job.submission_id == submission_id:
                    return job
        raise RefluxError(f"submission_id={submission_id!r}: no such job")

    def logs(self, submission_id: str) -> str:
        return str(self._client.get_job_logs(submission_id))

    def stop(self, kind: Kind, *, timeout_s: float = STOP_TIMEOUT_S) -> Job | None:
        """Ask the active job to checkpoint and end; wait for it. None: nothing was active."""
        job = self.active(kind)
        if job is None:
            return None
        self._client.stop_job(job.submission_id)
        return self.wait(job.submission_id, timeout_s=timeout_s)

    def follow(self, submission_id: str, tell: Callable[[str], None]) -> None:
        """Tell each line of its log as it comes, until it has ended; RefluxError if it failed."""
        told = 0
        while True:
            job = self.get(submission_id)
            lines = self.logs(submission_id).splitlines()
            whole = lines[told : -1 if job.active else None]  # the last may still grow
            for line in whole:
                tell(line)
            told += len(whole)
            if not job.active:
                break
            time.sleep(1.0)
        if job.status != "SUCCEEDED":
            raise RefluxError(f"{submission_id} {job.status.lower()}: {job.message}")

    def wait(self, submission_id: str, *, timeout_s: float) -> Job:
        deadline = time.monotonic() + timeout_s
        while (job := self.get(submission_id)).active:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{submission_id} is still {job.status} after {timeout_s:g} s; "
                    f"see `ray job logs {submission_id}`"
                )
            time.sleep(0.5)
        return job
