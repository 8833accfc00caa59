"""The one-machine stack: what the settings don't point elsewhere, and our own processes.

`Stack.start()` brings everything up, `supervise()` restarts what dies, `stop()` leaves no process
behind. `<home>/stack.json` tells other commands where everything is, and lets `reflux down` end a
stack whose supervisor is gone.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from services.core.errors import RefluxError, UnavailableError
from services.core.settings import Settings
from services.core.stackfile import identify, is_alive, read_stack, running_stack, stack_path
from services.local import processes
from services.local.processes import Command, Process

# Where a service is looked for first; taken by someone else: any free port.
USUAL_PORTS = {
    "kafka": 9092,
    "redis": 6399,
    "ray": 8265,
    "gateway": 8080,
    "recommend": 8000,
    "console": 8090,
}
ADDRESSES = (
    *("kafka_bootstrap", "redis", "ray_address"),
    *("gateway_url", "recommend_url", "console_url"),
)

SUPERVISOR_GRACE_S = 60.0  # the last checkpoint of its distillation job included
SESSION_S = 4.0  # the embedded broker allows less than Kafka: a killed worker is back sooner

Report = Callable[[str], None]


@dataclass
class _Supervised:
    process: Process
    restarts: int = 0
    not_before: float = 0.0  # monotonic; the back-off after a crash


@dataclass
class Stack:
    """Every process of the one-machine stack. `settings` holds the real addresses once started."""

    settings: Settings
    report: Report = lambda _: None
    _children: dict[str, _Supervised] = field(default_factory=dict)
    _embedded_ray: bool = False
    _worker_metrics_ports: list[int] = field(default_factory=list)
    _ready: bool = False
    _answers_due: bool = False  # Ray is new, and has no Serve application yet

    @property
    def embedded_ray(self) -> bool:
        return self._embedded_ray

    def start(self, *, ray: bool = True, ingest: bool = True, answers: bool = True) -> None:
        """Start and wait until everything answers; on any failure, stop what was started.

        Without `ray`, `ingest` (gateway, workers) or `answers` (console too) those are left out.
        """
        with processes.one_at_a_time(self.report):
            refuse_second_stack(self.settings)
            try:
                self._start_backends(ray=ray)
                self._start_services(ingest=ingest, answers=answers)
            except BaseException:
                self.stop()
                raise

    def pid(self, name: str) -> int:
        return self._children[name].process.pid

    def stop(self) -> None:
        """End everything this stack started, the last started first.

        What fails meanwhile, as a report to a terminal that is gone, is raised once all has ended.
        """
        with processes.undisturbed(), ExitStack() as ending:
            ending.callback(stack_path(self.settings).unlink, missing_ok=True)
            ending.callback(self._children.clear)
            for name, child in self._children.items():
                ending.callback(child.process.stop)
                ending.callback(self.report, f"stopping {name}")

    def supervise(self) -> None:
        """One look: restart what died, with back-off (1, 2, 4 ... 30 s); no log grows for ever."""
        processes.rotate_logs(self.settings.logs)
        for name, child in list(self._children.items()):
            if child.process.running or time.monotonic() < child.not_before:
                continue
            child.restarts += 1
            wait_s = min(2.0 ** (child.restarts - 1), 30.0)
            child.not_before = time.monotonic() + wait_s
            self.report(f"{name} died; restart {child.restarts}, the next not before {wait_s:g} s")
            child.process = Process(child.process.command, logs=self.settings.logs)
            if name == "ray":  # its Serve application and jobs died with it
                self._answers_due = True
            self._write_stack_file()
        if self._answers_due and self._children["ray"].process.running:
            self._wait("ray")
            self.report(deploy_answers(self.settings))
            self._answers_due = False  # only now: what raised above is tried again next time

    def _start_backends(self, *, ray: bool) -> None:
        from services.recommend.deploy import proxy_environment

        settings = self.settings
        addresses: dict[str, Any] = {}
        if not settings.kafka_bootstrap:
            port = usual_port("kafka", settings.kafka_port)
            self._spawn(processes.broker(port))
            addresses["kafka_bootstrap"] = f"{processes.LOOPBACK}:{port}"
            addresses["kafka_session_s"] = min(settings.kafka_session_s, SESSION_S)
        if not settings.redis:
            port = usual_port("redis", settings.redis_port)
            self._spawn(processes.redis(port, data=settings.home.absolute() / "redis"))
            addresses["redis"] = f"{processes.LOOPBACK}:{port}"
        addresses["recommend_port"] = usual_port("recommend", settings.recommend_port)
        if ray and not settings.ray_address:
            self._embedded_ray = True
            port = usual_port("ray", settings.ray_dashboard_port)
            addresses["student_metrics_port"] = processes.free_port(settings.student_metrics_port)
            addresses["ray_address"] = f"http://{processes.LOOPBACK}:{port}"
            env = proxy_environment(settings, scratch=processes.ray_scratch(port))
            env |= settings.secrets  # its jobs' variables, which its dashboard shows, have none
            self._spawn(processes.ray_head(dashboard_port=port, cpus=settings.ray_cpus, env=env))
        addresses["gateway_port"] = usual_port("gateway", settings.gateway_port)
        addresses["gateway_url"] = f"http://{settings.host}:{addresses['gateway_port']}"
        addresses["recommend_url"] = f"http://{settings.host}:{addresses['recommend_port']}"
        addresses["console_port"] = usual_port("console", settings.console_port)
        addresses["console_url"] = f"http://{settings.host}:{addresses['console_port']}"
        self.settings = settings.model_copy(update=addresses)
        self._write_stack_file()
        for name in ("kafka", "redis"):
            self._wait(name)

    def _start_services(self, *, ingest: bool, answers: bool) -> None:
        from services.core.kafka import ensure_topics

        ensure_topics(self.settings)
        if ingest:
            self._spawn(self._service("gateway", "services.ingest.gateway", self._gateway_ready))
            for index in range(self.settings.workers):
                name = "worker" if index == 0 else f"worker-{index}"
                self._spawn(self._worker(name))
        if answers:
            self._spawn(self._service("console", "services.console", self._console_ready))
        for name in list(self._children):
            self._wait(name)
        if answers:
            self.report("deploying the answers on Ray Serve")
            self.report(deploy_answers(self.settings))
        self._ready = True
        self._write_stack_file()

    def _spawn(self, command: Command) -> None:
        self.report(f"starting {command.name}")
        self._children[command.name] = _Supervised(Process(command, logs=self.settings.logs))

    def _wait(self, name: str) -> None:
        if name in self._children:
            self._children[name].process.wait_ready()

    def _worker(self, name: str) -> Command:
        port = processes.free_port()
        self._worker_metrics_ports.append(port)
        ready = lambda: processes.listens(port, self.settings.host)  # noqa: E731
        env = {"REFLUX_WORKER_METRICS_PORT": str(port)}
        return self._service(name, "services.ingest.worker", ready, env)

    def _service(
        self, name: str, module: str, ready: Callable[[], bool], env: dict[str, str] | None = None
    ) -> Command:
        return Command(
            name=name,
            argv=[sys.executable, "-m", module],
            ready=ready,
            env={**self.settings.environment(), **(env or {})},
            ready_timeout_s=90.0,
        )

    def _gateway_ready(self) -> bool:
        return processes.listens(self.settings.gateway_port, self.settings.host)

    def _console_ready(self) -> bool:
        return processes.listens(self.settings.console_port, self.settings.host)

    def _write_stack_file(self) -> None:
        children = {name: child.process for name, child in self._children.items()}
        content = {
            "settings": {
                **{name: getattr(self.settings, name) for name in ADDRESSES},
                "gateway_port": self.settings.gateway_port,
                "recommend_port": self.settings.recommend_port,
                "console_port": self.settings.console_port,
                "student_metrics_port": self.settings.student_metrics_port,
            },
            "supervisor": identify(os.getpid()),
            "processes": {name: identify(child.pid) for name, child in children.items()},
            "restarts": {name: child.restarts for name, child in self._children.items()},
            "worker_metrics_ports": self._worker_metrics_ports,
            "embedded_ray": self._embedded_ray,
            "ready": self._ready,
        }
        path = stack_path(self.settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2))
        partial.replace(path)


def usual_port(service: str, wanted: int) -> int:
    """The configured port; else the service's usual one if it is free, else any free one."""
    if wanted:
        return processes.free_port(wanted)
    try:
        return processes.free_port(USUAL_PORTS[service])
    except UnavailableError:
        return processes.free_port()


def deploy_answers(settings: Settings) -> str:
    """Deploy the Serve application on the settings' Ray and wait until it answers; say where."""
    command = [sys.executable, "-m", "services.recommend"]
    log = settings.logs / "deploy.log"
    with log.open("ab") as out:
        environment = {**os.environ, **settings.environment()}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=out)
        out.write(done.stdout)
    if done.returncode != 0:
        raise UnavailableError(f"the answers could not be deployed; see {log}")
    return done.stdout.decode(errors="replace").strip()


def refuse_second_stack(settings: Settings) -> None:
    if running_stack(settings.home):
        raise RefluxError(
            f"a stack runs already in home={str(settings.home)!r}; `reflux down` stops it, "
            "REFLUX_HOME names another one"
        )
    stack_path(settings).unlink(missing_ok=True)


def tear_down(settings: Settings, *, report: Report) -> bool:
    """End the stack of this home, its supervisor first. False: none was there."""
    stack = read_stack(settings)
    if stack is None:
        return False
    if is_alive(stack["supervisor"]):
        report("stopping the supervisor and what it started")
        processes.stop_tree(int(stack["supervisor"]["pid"]), grace_s=SUPERVISOR_GRACE_S)
    for name, identity in reversed(stack["processes"].items()):
        if is_alive(identity):
            report(f"stopping {name}")
            processes.stop_tree(int(identity["pid"]), grace_s=10.0)
    stack_path(settings).unlink(missing_ok=True)
    return True
