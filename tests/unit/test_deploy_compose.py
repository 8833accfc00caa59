"""The image and the compose file: valid by docker's own tool, and in the code's own words."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from services import cli
from services.core.settings import Settings
from services.local.processes import LOST_NODE
from services.local.stack import USUAL_PORTS
from services.recommend.deploy import HAPROXY, proxy_environment

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy/compose"
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Every service as `docker compose config` resolves it."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "docker-compose"), "-f", "compose.yaml"),
            *("config", "--format", "json"),
        ],
        cwd=COMPOSE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


def test_settings_are_ours_and_valid(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ours(services):
        given = services[name]["environment"]
        check_settings(given, monkeypatch)
    settings = check_settings(services["gateway"]["environment"], monkeypatch)
    kafka = services["kafka"]["environment"]
    assert f"INTERNAL://{settings.kafka_bootstrap}" in kafka["KAFKA_ADVERTISED_LISTENERS"]
    assert settings.redis == "redis:6379"


def test_commands_run_what_there_is(services: dict[str, Any]) -> None:
    for name in ours(services):
        check_command(services[name]["command"])


def test_ports_are_the_codes_own(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = services["gateway"]["environment"]
    published = {int(p["published"]) for s in services.values() for p in s.get("ports", ())}
    assert published >= {
        USUAL_PORTS[part] for part in ("kafka", "ray", "gateway", "recommend", "console")
    }
    assert all(p["host_ip"] == "127.0.0.1" for s in services.values() for p in s.get("ports", ()))
    head = " ".join(services["ray-head"]["command"])
    assert env["REFLUX_RAY_ADDRESS"] == f"http://ray-head:{USUAL_PORTS['ray']}"
    assert f"--dashboard-port={USUAL_PORTS['ray']}" in head
    assert "--address=ray-head:6379" in services["ray-worker"]["command"]
    scraped = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job for job in scraped}
    assert targets["gateway"]["static_configs"][0]["targets"] == [
        f"gateway:{env['REFLUX_GATEWAY_PORT']}"
    ]
    for job, names in (("worker", ["worker"]), ("answers", ["ray-head", "ray-worker"])):
        found = targets[job]["dns_sd_configs"][0]
        assert found["names"] == names
        assert str(found["port"]) == env[f"REFLUX_{job.upper()}_METRICS_PORT"]
    console = check_settings(services["console"]["environment"], monkeypatch)
    assert targets["console"]["static_configs"][0]["targets"] == [f"console:{console.console_port}"]
    reads = {url.strip().removeprefix("http://") for url in console.metrics_urls.split(",")}
    ray_nodes = ("ray-head", "ray-worker")
    assert reads == {
        f"gateway:{console.gateway_port}",
        f"worker:{console.worker_metrics_port}",
        *(f"{node}:{console.answers_metrics_port}" for node in ray_nodes),
        *(f"{node}:{console.student_metrics_port}" for node in ray_nodes),
    }
    ray = targets["ray"]["dns_sd_configs"][0]
    for name in ray["names"]:
        assert f"--metrics-export-port={ray['port']}" in services[name]["command"]
    for name, service in services.items():
        for port in re.findall(r"127\.0\.0\.1:(\d+)", str(service.get("healthcheck", ""))):
            known = {str(p["target"]) for p in service.get("ports", ())}
            known |= {env["REFLUX_WORKER_METRICS_PORT"], "52365"}  # Ray's agent, its default
            assert port in known, name


def test_ray_is_started_for_the_proxy_that_we_use(services: dict[str, Any], tmp_path: Path) -> None:
    for name in ("ray-head", "ray-worker"):
        check_proxy(services[name]["environment"], tmp_path)


def test_every_mounted_file_is_there(services: dict[str, Any]) -> None:
    binds = [v for s in services.values() for v in s.get("volumes", ()) if v["type"] == "bind"]
    assert len(binds) == 4
    assert all(Path(bind["source"]).exists() for bind in binds)


def test_images_are_pinned_and_one_is_ours(services: dict[str, Any]) -> None:
    version = project()["version"]
    for name, service in services.items():
        image, _, tag = service["image"].partition(":")
        assert re.match(r"v?\d+\.\d+\.\d+", tag), name
        assert ("build" in service) == (image == "reflux")
        assert image != "reflux" or tag == version


def test_everything_waits_for_what_is_healthy(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            healthy = condition["condition"] == "service_healthy"
            assert healthy == ("healthcheck" in services[other]), f"{name} waits for {other}"


def test_the_image_is_pinned_small_and_not_root() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])
    assert re.search(r"^USER 1000$", DOCKERFILE, flags=re.MULTILINE)
    ignored = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def test_every_dependency_is_pinned_in_its_range() -> None:
    lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for dependency in map(Requirement, project()["dependencies"]):
        assert dependency.specifier.contains(Version(pins[dependency.name])), dependency


def test_serve_finds_haproxy_by_the_path_that_clusters_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(HAPROXY))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    with_up = proxy_environment(Settings(proxy="haproxy"), scratch=tmp_path)  # `reflux up` there
    for more in ({}, with_up):
        env = {**os.environ, **more}
        done = subprocess.run([HAPROXY, "-v"], env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("HAProxy version"), done.stderr


def ours(services: dict[str, Any]) -> list[str]:
    found = [name for name, service in services.items() if service["image"].startswith("reflux:")]
    assert len(found) == 8
    return found


def check_settings(env: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of a process with this environment; every REFLUX_ variable is one."""
    values = {k.removeprefix("REFLUX_").lower(): v for k, v in env.items() if "REFLUX_" in k}
    assert set(values) <= set(Settings.model_fields)
    with monkeypatch.context() as patched:
        patched.setenv("REFLUX_HOME", str(Path("/nonexistent")))
        return Settings.load(**values)


def check_command(command: list[str] | str) -> None:
    """`python -m module` names a module, `reflux ...` a command with its options."""
    argv = shlex.split(command) if isinstance(command, str) else command
    if argv[:2] == ["python", "-m"]:
        assert find_spec(argv[2]), argv
    elif argv[0] == "reflux":
        found = CliRunner().invoke(cli.app, [*argv[1:], "--help"])
        assert found.exit_code == 0, found.output
    else:
        assert argv[:2] == ["ray", "start"], argv


def check_proxy(env: dict[str, str], scratch: Path) -> None:
    wanted = proxy_environment(Settings(proxy="haproxy"), scratch=scratch)
    assert env.pop("RAY_SERVE_HAPROXY_BINARY_PATH") == f"/app/{HAPROXY.relative_to(ROOT)}"
    given = {name: value for name, value in env.items() if re.match("(RAY_SERVE|HAPROXY)_", name)}
    # Of one machine, where several stacks may meet and nothing listens beyond loopback.
    own = re.compile("PORT|SOCKET|LOC|STATE|NBTHREAD|BINARY|LOG_TARGET|FOR_SERVE")
    assert given == {name: value for name, value in wanted.items() if not own.search(name)}
    assert env.items() >= LOST_NODE.items()
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30, "time for a stopped job's checkpoint"


def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
