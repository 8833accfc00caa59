"""The Kubernetes manifests: valid by schema, and in the code's own words. Both overlays."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate.utils
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_jobs import recipes
from services.core.events import EVENTS, ITEMS, dead_topic
from services.core.kafka import GROUP
from services.core.settings import Settings
from tests.kustomize import Manifest, build
from tests.unit.test_deploy_compose import check_command, check_proxy, check_settings, project

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"
SCHEMAS = yaml.safe_load((ROOT / "tests/custom_resources.yaml").read_text())
# Names that KubeRay and Strimzi give to what they make.
MADE_BY_OPERATORS = {"reflux-kafka-bootstrap"}

read_schema = functools.cache(kubernetes_validate.utils.schema_contents)


@pytest.fixture(autouse=True)
def _schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", read_schema)


@pytest.fixture(scope="module", params=["dev", "production"])
def objects(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(ROOT / "deploy/kubernetes/overlays" / request.param)


@pytest.fixture
def settings(objects: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What our processes see: the ConfigMap, and a Secret as settings.yaml says to make it."""
    secret = {"REFLUX_API_KEYS": f"produce:{'k' * 32}", "REFLUX_REDIS_PASSWORD": "p"}
    given = get(objects, "ConfigMap", "settings")["data"]
    return check_settings({**given, **secret}, monkeypatch)


def test_every_object_fits_its_schema(objects: list[Manifest]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    for one in objects:
        kind = f"{one['apiVersion']}/{one['kind']}"
        if kind in SCHEMAS:
            schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS[kind]}
            jsonschema.Draft202012Validator(schema).validate(one["spec"])
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        for template in templates(one):
            labelled = {"metadata": {"name": "x"}, "template": template}
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", **labelled}
            kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ["spec", "replica"], 1),
        ("RayService", ["spec", "rayClusterConfig", "enableAutoscaling"], True),
        ("KafkaTopic", ["spec", "partition"], 1),
        ("ScaledObject", ["spec", "maxReplicas"], 1),
    ],
)
def test_a_misspelt_field_is_noticed(
    objects: list[Manifest], kind: str, path: list[str], value: object
) -> None:
    one = yaml.safe_load(yaml.safe_dump(next(o for o in objects if o["kind"] == kind)))
    parent = one
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        test_every_object_fits_its_schema([one])


def test_every_pod_is_bounded_and_not_root(objects: list[Manifest]) -> None:
    for one in objects:
        for template in templates(one):
            spec = template["spec"]
            # REFLUX_X_PORT=tcp://... of a Service named reflux-x would be a setting.
            assert spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"]
            for container in spec["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])
                assert "memory" in container["resources"]["limits"]


def test_every_container_gets_settings_and_what_it_refers_to_is_there(
    objects: list[Manifest],
) -> None:
    for one in objects:
        for container in containers(one):
            sources = [s.get("configMapRef", {}).get("name") for s in container.get("envFrom", ())]
            for name in filter(None, sources):
                get(objects, "ConfigMap", name)
            if "reflux" in container["image"]:
                assert "settings" in sources
                assert {"secretRef": {"name": "reflux"}} in container["envFrom"]
            if container["name"].startswith("ray-"):
                assert "ray" in sources
    text = yaml.safe_dump_all(objects)
    assert set(re.findall(r"configMapRef:\s+name: (\S+)", text)) == {"settings", "ray"}
    # Secrets are named, never here.
    assert not [one for one in objects if one["kind"] == "Secret"]
    assert set(re.findall(r"secretKeyRef:\s+key: (\S+)\s+name: (\S+)", text)) == {
        ("REFLUX_REDIS_PASSWORD", "reflux")
    }


def test_images_are_pinned_and_one_is_ours(objects: list[Manifest]) -> None:
    for one in objects:
        for container in containers(one):
            image, _, tag = container["image"].rpartition(":")
            if image.endswith(("reflux", "reflux-cuda")):
                assert tag == project()["version"]
            else:
                assert re.match(r"\d+\.\d+\.\d+", tag), image


def test_commands_and_ports(objects: list[Manifest], settings: Settings) -> None:
    for one in objects:
        for container in containers(one):
            if "reflux" in container["image"] and "command" in container:
                check_command(container["command"])
    assert {p["port"] for p in get(objects, "Service", "gateway")["spec"]["ports"]} == {
        settings.gateway_port
    }
    ports = {
        name: {p["name"]: p["containerPort"] for c in containers(one) for p in c["ports"]}
        for one in objects
        if (name := one["metadata"]["name"])
        in ("gateway", "worker", "answers", "student", "console")
        and one["kind"] in ("Deployment", "RayService", "RayJob")
    }
    assert ports["gateway"]["http"] == settings.gateway_port
    assert ports["console"]["http"] == settings.console_port
    assert ports["worker"]["metrics"] == settings.worker_metrics_port
    assert ports["answers"]["metrics"] == settings.answers_metrics_port
    assert ports["student"]["metrics"] == settings.student_metrics_port
    for one in objects:
        for template in templates(one):
            found = template["metadata"].get("annotations", {})
            if "prometheus.io/port" in found:
                [container] = template["spec"]["containers"]
                assert int(found["prometheus.io/port"]) in {
                    port["containerPort"] for port in container["ports"]
                }
                assert allowed(objects, template, port=int(found["prometheus.io/port"]))


def test_topics_are_those_that_the_code_makes(objects: list[Manifest], settings: Settings) -> None:
    topics = {one["metadata"]["name"]: one for one in objects if one["kind"] == "KafkaTopic"}
    wanted = {EVENTS: settings.partitions, ITEMS: settings.partitions}
    wanted |= {dead_topic(topic): 1 for topic in wanted}
    assert {name: one["spec"]["partitions"] for name, one in topics.items()} == wanted
    brokers = get(objects, "KafkaNodePool", "broker")["spec"]["replicas"]
    kafka = get(objects, "Kafka", "reflux")
    for one in topics.values():
        assert one["spec"]["replicas"] == settings.replication <= brokers
        assert one["spec"]["config"]["message.timestamp.type"] == "LogAppendTime"
        assert one["metadata"]["labels"]["strimzi.io/cluster"] == kafka["metadata"]["name"]
    config = kafka["spec"]["kafka"]["config"]
    assert config["min.insync.replicas"] == max(1, settings.replication - 1)


def test_workers_scale_by_their_own_groups_lag(objects: list[Manifest], settings: Settings) -> None:
    spec = get(objects, "ScaledObject", "worker")["spec"]
    [trigger] = spec["triggers"]
    assert trigger["metadata"]["consumerGroup"] == GROUP
    assert trigger["metadata"]["topic"] == EVENTS
    assert trigger["metadata"]["bootstrapServers"] == settings.kafka_bootstrap
    assert spec["maxReplicaCount"] <= settings.partitions
    # A worker commits when it flushes: up to that much is lag although nothing is late.
    assert int(trigger["metadata"]["lagThreshold"]) >= 1_000 * settings.log_flush_s
    get(objects, "Deployment", spec["scaleTargetRef"]["name"])


def test_addresses_lead_to_what_is_there(objects: list[Manifest], settings: Settings) -> None:
    services = {one["metadata"]["name"] for one in objects if one["kind"] == "Service"}
    for address in (settings.kafka_bootstrap, settings.redis):
        assert address.split(":")[0] in services | MADE_BY_OPERATORS
    kafka = get(objects, "Kafka", "reflux")
    [listener] = kafka["spec"]["kafka"]["listeners"]
    name = f"{kafka['metadata']['name']}-kafka-bootstrap"
    assert settings.kafka_bootstrap == f"{name}:{listener['port']}"
    for url in settings.metrics_urls.split(","):  # each leads to the pods that listen there
        name, _, port = url.removeprefix("http://").partition(":")
        spec = get(objects, "Service", name)["spec"]
        assert (spec["clusterIP"], [str(p["port"]) for p in spec["ports"]]) == ("None", [port])
        pods = [t for one in objects for t in templates(one)]
        assert any(
            selects({"matchLabels": spec["selector"]}, pod["metadata"]["labels"])
            and allowed(objects, pod, port=int(port))
            for pod in pods
        ), url
    for uri in (settings.offline, settings.registry, settings.checkpoints):
        assert uri.startswith("s3://")


def test_answers_are_deploy_serve_yaml(objects: list[Manifest], settings: Settings) -> None:
    service = get(objects, "RayService", "answers")["spec"]
    ours = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    theirs = yaml.safe_load(service["serveConfigV2"])
    ServeDeploySchema.model_validate(theirs)
    assert theirs["proxy_location"] == "EveryNode"
    assert theirs["http_options"].pop("host") == settings.host == "0.0.0.0"
    del ours["http_options"]["host"]
    [deployment] = theirs["applications"][0]["deployments"]
    assert deployment.pop("num_replicas") == "auto"
    scaling = deployment.pop("autoscaling_config")
    args, theirs["applications"][0]["args"] = theirs["applications"][0]["args"], {}
    assert args == {"replicas": scaling["min_replicas"], "max_replicas": scaling["max_replicas"]}
    theirs_env = theirs["applications"][0]["runtime_env"]["env_vars"]
    metrics = theirs_env.pop("PROMETHEUS_MULTIPROC_DIR")
    assert theirs == ours
    [group] = service["rayClusterConfig"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert metrics.startswith(container["volumeMounts"][0]["mountPath"])
    assert scaling["min_replicas"] <= cpus(container) * group["minReplicas"]
    budget = get(objects, "PodDisruptionBudget", "answers")["spec"]
    fewest = group["minReplicas"] + 1  # and the head
    assert budget["minAvailable"] == fewest - 1


def test_ray_is_what_the_code_needs(objects: list[Manifest], tmp_path: Path) -> None:
    check_proxy(get(objects, "ConfigMap", "ray")["data"], tmp_path)
    pins = (ROOT / "deploy/constraints.txt").read_text()
    for cluster in rays(objects):
        assert f"\nray=={cluster['rayVersion']}\n" in pins


@pytest.mark.parametrize("job", ["student", "teacher"])
def test_jobs_run_and_their_recipe_fits(
    objects: list[Manifest], settings: Settings, job: str
) -> None:
    recipe = recipes.load(settings.recipe)
    if job == "student":
        spec = get(objects, "RayJob", job)["spec"]
        distill = recipe.distill
        each = max(distill.label_actors, distill.label_actors_most)
        labellers = 3 * each * distill.num_workers  # the teacher now, the next one, the first one
        needs_cpus = distill.num_workers * distill.cpus_per_worker + labellers * distill.label_cpus
        needs_gpus = labellers * distill.label_gpus
    else:
        cron = get(objects, "RayCronJob", job)["spec"]
        spec, train = cron["jobTemplate"], recipe.train
        needs_cpus = train.num_workers * train.cpus_per_worker
        needs_gpus = train.num_workers * float(train.use_gpu)
        # Done before the next one starts.
        longest_s = max(train.max_train_s, train.refresh_train_s)
        assert longest_s < spec["activeDeadlineSeconds"] < period_s(cron["schedule"])
    argv = shlex.split(spec["entrypoint"])
    check_command(argv[:3])
    assert argv[3:] == []  # the recipe is the settings'
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    assert cpus(container) * group["maxReplicas"] >= needs_cpus
    gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus * group["maxReplicas"] >= needs_gpus
    assert (gpus > 0) == (needs_gpus > 0)
    assert container["image"].split(":")[0].endswith("-cuda") == (gpus > 0)
    assert job == "student" or group["minReplicas"] == 0


def test_network_policies_let_in_who_must(objects: list[Manifest]) -> None:
    kafka = get(objects, "Kafka", "reflux")["spec"]["kafka"]["listeners"][0]
    peers = [p["podSelector"] for p in kafka["networkPolicyPeers"] if "podSelector" in p]
    for one in objects:
        name = one["metadata"]["name"]
        for template in templates(one):
            labels = template["metadata"]["labels"]
            uses_kafka = name in ("gateway", "worker", "answers", "student")
            assert any(selects(peer, labels) for peer in peers) == uses_kafka, name
            assert (labels.get("redis-client") == "true") == (name in ("worker", "answers")), name
    [gateway] = templates(get(objects, "Deployment", "gateway"))
    [redis] = templates(get(objects, "StatefulSet", "redis"))
    assert allowed(objects, gateway, port=8080)
    assert allowed(objects, redis, port=6379)
    assert not allowed(objects, redis, port=22)
    [jobs] = [r for r in get(objects, "NetworkPolicy", "ray")["spec"]["ingress"] if "ports" in r]
    everywhere = [p["podSelector"] for p in jobs["from"] if p.get("namespaceSelector") == {}]
    for labels, let_in in (
        ({"app.kubernetes.io/component": "kuberay-operator"}, True),
        ({"app.kubernetes.io/component": "another"}, False),
    ):
        assert any(selects(pods, labels) for pods in everywhere) == let_in


def get(objects: list[Manifest], kind: str, name: str) -> Manifest:
    return next(o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))


def rays(part: Any) -> Iterator[dict[str, Any]]:
    """Every Ray cluster in it."""
    if isinstance(part, list):
        for item in part:
            yield from rays(item)
    elif isinstance(part, dict):
        if "headGroupSpec" in part:
            yield part
        for value in part.values():
            yield from rays(value)


def templates(one: Manifest) -> list[dict[str, Any]]:
    """Its pod templates."""
    if one["kind"] in ("Deployment", "StatefulSet"):
        return [one["spec"]["template"]]
    return [
        group["template"]
        for ray in rays(one)
        for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"])
    ]


def containers(one: Manifest) -> list[dict[str, Any]]:
    return [container for t in templates(one) for container in t["spec"]["containers"]]


def cpus(container: dict[str, Any]) -> int:
    """What Ray offers on such a pod: its limit."""
    return int(container["resources"]["limits"]["cpu"])


def period_s(schedule: str) -> int:
    minute, hour, *rest = schedule.split()
    assert minute == "0", schedule
    assert rest == ["*", "*", "*"], schedule
    return 3600 * (1 if hour == "*" else int(hour.removeprefix("*/")))


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exists = (e["key"] in labels for e in selector.get("matchExpressions", ()))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(exists)


def allowed(objects: list[Manifest], template: dict[str, Any], *, port: int) -> bool:
    """Whether some policy that selects these pods opens the port to anybody."""
    return any(
        port in (p["port"] for p in rule.get("ports", ()))
        for one in objects
        if one["kind"] == "NetworkPolicy"
        and selects(one["spec"]["podSelector"], template["metadata"]["labels"])
        for rule in one["spec"].get("ingress", ())
    )
