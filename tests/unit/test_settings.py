import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from services.core.errors import SettingsError
from services.core.settings import Settings
from services.core.stackfile import identify
from services.recommend.deploy import config


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_bad_value_names_itself_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLUX_PROXY", "nginx")
    monkeypatch.setenv("REFLUX_PARTITIONS", "0")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    message = str(caught.value)
    assert "REFLUX_PROXY='nginx'" in message
    assert "'haproxy' or 'python'" in message
    assert "REFLUX_PARTITIONS='0'" in message
    assert "greater than or equal to 1" in message


def test_environment_beats_file_beats_running_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    running = {"redis": "stack:1", "kafka_bootstrap": "stack:2", "gateway_url": "http://stack:3"}
    written = {"settings": running, "supervisor": identify(os.getpid()), "processes": {}}
    (home / "stack.json").write_text(json.dumps(written))
    (tmp_path / "reflux.toml").write_text(
        'home = "elsewhere"\nredis = "file:1"\nkafka_bootstrap = "file:2"\n'
    )
    monkeypatch.setenv("REFLUX_REDIS", "environment:1")
    settings = Settings.load()
    assert settings.redis == "environment:1"
    assert settings.kafka_bootstrap == "file:2"
    assert settings.gateway_url == "http://stack:3"


@pytest.mark.parametrize("killed", ["whole", "cut short"])
def test_a_stack_that_was_killed_configures_nothing(tmp_path: Path, killed: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    written = {
        "settings": {"redis": "stack:1"},
        "supervisor": identify(ended.pid),
        "processes": {},
    }
    ended.wait()
    text = json.dumps(written)
    (tmp_path / "stack.json").write_text(text if killed == "whole" else "")
    assert Settings.load(home=tmp_path).redis == ""


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reflux.toml").write_text("partition = 4\n")
    with pytest.raises(SettingsError, match=r"partition: no such setting.*partitions"):
        Settings.load()


def test_a_typo_in_the_file_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "reflux.toml").write_text('seed = 1\nrecipe = "tiny\n')
    with pytest.raises(SettingsError, match=r"reflux\.toml: .*line 2"):
        Settings.load()


def test_what_a_child_process_gets_is_what_we_have(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.load(partitions=7, impressions=False, home=Path("here"))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    again = Settings.load()
    assert again == settings.model_copy(update={"home": Path("here").absolute()})


def test_secrets_are_not_told_to_ray() -> None:
    settings = Settings.load(api_keys="produce:kkkkkkkkkkkkkkkk", redis_password="word")
    for told in (
        settings.environment(secrets=False),
        settings.environment(elsewhere=True, secrets=False),
        config(settings)["applications"][0]["runtime_env"]["env_vars"],
    ):
        assert not any(secret in str(told) for secret in ("kkkkkkkkkkkkkkkk", "word"))
    assert settings.secrets == {
        "REFLUX_API_KEYS": "produce:kkkkkkkkkkkkkkkk",
        "REFLUX_REDIS_PASSWORD": "word",
    }


def test_a_cluster_with_settings_of_its_own_gets_only_what_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REFLUX_HOME", "/here")
    monkeypatch.setenv("REFLUX_RECIPE", "one_gpu")
    settings = Settings.load(ray_address="http://there:8265")
    assert settings.environment(elsewhere=True) == {
        "REFLUX_RAY_ADDRESS": "http://there:8265",
        "REFLUX_RECIPE": "one_gpu",
    }


def test_serve_is_told_of_replicas_queue_and_deadline() -> None:
    def told(settings: Settings) -> dict[str, Any]:
        wanted = config(settings)
        ServeDeploySchema.model_validate(wanted)
        [deployment] = wanted["applications"][0]["deployments"]
        return {**deployment, **wanted["http_options"]}

    fixed = told(Settings.load(replicas=3, answer_queue=7, answer_timeout_s=2.5))
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    assert (fixed["max_queued_requests"], fixed["request_timeout_s"]) == (7, 2.5)
    scaled = told(Settings.load(replicas=2, max_replicas=5))["autoscaling_config"]
    assert (scaled["min_replicas"], scaled["max_replicas"]) == (2, 5)
