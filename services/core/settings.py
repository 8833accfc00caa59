"""Frozen, typed settings. Entry points build them once and pass them on.

Sources, first wins: environment (`REFLUX_KAFKA_BOOTSTRAP`, ...), the TOML file that
`REFLUX_CONFIG` names (default `reflux.toml`), what a running one-machine stack wrote to
`<home>/stack.json`, the defaults below.
"""

import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from services.core.access import Keys
from services.core.errors import SettingsError
from services.core.stackfile import running_stack

CONFIG_FILE = "REFLUX_CONFIG"  # the variable that names it
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """Everything that can be set. Read-only; `Settings.load()` turns bad values into one error."""

    model_config = SettingsConfigDict(env_prefix="REFLUX_", frozen=True, extra="forbid")

    # Where things are. Empty addresses mean: `reflux up` starts an embedded one.
    home: Path = Field(Path(".reflux"), description="logs, pids and the embedded stack's state")
    data: str = Field("", description="folder that holds ml-1m/ or ml-100k/; empty: fetched")
    kafka_bootstrap: str = Field("", description="host:port[,host:port]; empty: embedded broker")
    redis: str = Field("", description="host:port[,host:port]; empty: embedded Redis")
    ray_address: str = Field("", description="dashboard URL (http://host:8265); empty: embedded")
    offline_uri: str = Field("", description="root of the offline log; default <home>/offline")
    registry_uri: str = Field("", description="root of model artifacts; default <home>/registry")
    checkpoint_uri: str = Field("", description="training checkpoints; default <home>/checkpoints")
    gateway_url: str = Field("", description="where events are posted; set by `reflux up`")
    recommend_url: str = Field("", description="where answers are served; set by `reflux up`")
    console_url: str = Field("", description="where the page is; set by `reflux up`")
    metrics_urls: str = Field(
        "",
        description="http://host:port[,...] whose /metrics the console reads, every address of a "
        "name; empty: the one-machine stack's",
    )

    # Who is let in, and how others let us in.
    api_keys: SecretStr = Field(
        SecretStr(""), description="role[+role]:key[,...]; roles: produce, recommend, operate"
    )
    allow_open: bool = Field(False, description="listen beyond loopback without api_keys")
    kafka_security: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_ca_file: str = Field("", description="PEM of who signed the brokers; empty: system's")
    kafka_cert_file: str = Field("", description="PEM of our own certificate, for mutual TLS")
    kafka_key_file: str = Field("", description="PEM of its key")
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    kafka_username: str = ""
    kafka_password: SecretStr = SecretStr("")
    redis_tls: bool = False
    redis_ca_file: str = Field("", description="PEM of who signed Redis; empty: system's")
    redis_username: str = ""
    redis_password: SecretStr = SecretStr("")

    # What the one-machine stack binds. 0: any free port.
    host: str = Field("127.0.0.1", description="address that gateway, answers and console bind")
    gateway_port: int = Field(0, ge=0, le=65535)
    recommend_port: int = Field(0, ge=0, le=65535)
    console_port: int = Field(0, ge=0, le=65535)
    ray_dashboard_port: int = Field(0, ge=0, le=65535)
    kafka_port: int = Field(0, ge=0, le=65535, description="of the embedded broker")
    redis_port: int = Field(0, ge=0, le=65535, description="of the embedded Redis")
    ray_cpus: int = Field(
        16, ge=4, description="logical CPUs of the embedded Ray node; not cores: jobs share these"
    )

    # Events and features.
    partitions: int = Field(4, ge=1, le=1024, description="of the topics `events` and `items`")
    replication: int = Field(1, ge=1, le=9, description="of every topic")
    workers: int = Field(1, ge=1, le=64, description="feature workers on one machine")
    worker_metrics_port: int = Field(
        0, ge=0, le=65535, description="where a feature worker serves /metrics; 0: nowhere"
    )
    history_events: int = Field(512, ge=16, le=4096, description="events kept online per user")
    log_flush_s: float = Field(
        2.0, gt=0, le=600, description="at most this long until a Parquet file"
    )
    log_flush_events: int = Field(20_000, ge=1, description="at most this many events per file")
    popularity_every_s: float = Field(
        30.0, gt=0, description="between two item popularity roll-ups"
    )
    max_future_s: float = Field(
        300.0, ge=0, description="event time may run ahead of arrival by this"
    )
    max_batch_events: int = Field(10_000, ge=1, description="of one POST /v1/events")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="of one request body")
    max_held_bytes: int = Field(
        64 * 2**20, ge=2**16, description="of all requests that wait for Kafka; beyond: 429"
    )
    kafka_timeout_s: float = Field(10.0, gt=0, description="until an unacknowledged event is a 503")
    kafka_session_s: float = Field(
        6.0,
        gt=0,
        description="until a silent worker's partitions go to others; Kafka: >= 6",
    )

    # Learning.
    learn: bool = Field(True, description="`reflux up` starts the jobs; else submit them by hand")
    recipe: str = Field("tiny_cpu", description="a name in ray_jobs/recipes.py")
    seed: int = 0
    student_workers: int = Field(0, ge=0, le=1024, description="that distil; 0: the recipe's")
    teacher_workers: int = Field(0, ge=0, le=1024, description="that train it; 0: the recipe's")
    teacher_every_minutes: float = Field(30.0, ge=0, description="refresh the teacher; 0: never")
    teacher_every_events: int = Field(50_000, ge=0, description="or after this many; 0: never")
    teacher_first_events: int = Field(1_000, ge=1, description="events before the first teacher")
    publish_every_s: float = Field(5.0, gt=0, description="between two student versions")
    checkpoint_every_s: float = Field(
        30.0, gt=0, description="between two distillation checkpoints"
    )
    student_metrics_port: int = Field(
        0, ge=0, le=65535, description="where the distillation job serves /metrics; 0: nowhere"
    )
    keep_versions: int = Field(50, ge=3, description="artifacts kept beside those in use")

    # Answers.
    replicas: int = Field(1, ge=1, le=64, description="that answer, at least")
    max_replicas: int = Field(
        0, ge=0, le=64, description="above `replicas`: Serve starts up to as many as load needs"
    )
    answer_queue: int = Field(
        128, ge=1, description="requests that may wait for one replica; beyond: 503 at once"
    )
    answer_timeout_s: float = Field(10.0, gt=0, description="until an answer is given up")
    exact_items: int = Field(
        100_000, ge=1, description="catalogs of more are searched approximately, recall@100 >= .99"
    )
    serving_poll_s: float = Field(0.5, gt=0, le=60, description="between two looks at the pointer")
    feature_timeout_s: float = Field(0.25, gt=0, description="online store's share of an answer")
    answers_metrics_port: int = Field(
        0, ge=0, le=65535, description="where a node's replicas serve /metrics as one; 0: nowhere"
    )
    impressions: bool = Field(True, description="send what was shown back as impression events")
    proxy: Literal["haproxy", "python"] = Field("haproxy", description="Ray Serve's HTTP proxy")

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line")

    @model_validator(mode="after")
    def _closed(self) -> Self:
        closed = self.keys.roles_of or self.allow_open
        if self.host not in LOOPBACK and not closed:
            raise SettingsError(
                f"REFLUX_HOST={self.host!r} lets others in: set REFLUX_API_KEYS, or "
                "REFLUX_ALLOW_OPEN=true where something else keeps strangers out"
            )
        return self

    @classmethod
    def load(cls, **overrides: Any) -> "Settings":
        """Read every source once; `SettingsError` names each bad value and what is allowed."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            lines = [_explain(e["loc"], e.get("input"), e["msg"]) for e in error.errors()]
            raise SettingsError("\n".join(lines)) from None
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{_config_file()}: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = _config_file()
        if CONFIG_FILE in os.environ and not config.exists():
            raise SettingsError(
                f"{CONFIG_FILE}={config}: no such file; unset it or create the file"
            )
        given = (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, toml_file=config),
        )
        return (*given, InitSettingsSource(settings_cls, _stack_addresses(*given)))

    @property
    def offline(self) -> str:
        return self.offline_uri or str(self.home.absolute() / "offline")

    @property
    def registry(self) -> str:
        return self.registry_uri or str(self.home.absolute() / "registry")

    @property
    def checkpoints(self) -> str:
        return self.checkpoint_uri or str(self.home.absolute() / "checkpoints")

    @property
    def keys(self) -> Keys:
        return Keys.parse(self.api_keys.get_secret_value())

    @property
    def secrets(self) -> dict[str, str]:
        """Those passwords and keys that are set, by the variables that carry them."""
        public = self.environment(secrets=False)
        return {k: v for k, v in self.environment().items() if v and k not in public}

    @property
    def logs(self) -> Path:
        return self.home.absolute() / "logs"

    def environment(self, *, elsewhere: bool = False, secrets: bool = True) -> dict[str, str]:
        """These settings as environment variables, for the processes and Ray jobs we start.

        `secrets`: passwords and keys too, in the clear. Not for what Ray is told: its dashboard
        shows a job's variables to whoever looks; its nodes' own environment has the secrets.
        `elsewhere`: for a cluster that has settings of its own. Only what somebody set, no
        defaults that would hide the cluster's, and no `home`, which is a folder of this machine.
        """
        values = self.model_dump(exclude_unset=elsewhere)
        if not secrets:
            values = {k: v for k, v in values.items() if not isinstance(v, SecretStr)}
        if elsewhere:
            values.pop("home", None)
        else:
            values["home"] = self.home.absolute()
        return {f"REFLUX_{name.upper()}": _as_env(value) for name, value in values.items()}


def _config_file() -> Path:
    return Path(os.environ.get(CONFIG_FILE, "reflux.toml"))


def _stack_addresses(*sources: PydanticBaseSettingsSource) -> dict[str, Any]:
    """What a running stack in `home` wrote about itself; nothing where none runs."""
    home = next((s()["home"] for s in sources if s().get("home")), ".reflux")
    stack = running_stack(Path(home))
    return dict(stack["settings"]) if stack else {}


def _as_env(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(loc: tuple[int | str, ...], value: object, problem: str) -> str:
    name = ".".join(str(part) for part in loc)
    if name not in Settings.model_fields:
        known = ", ".join(sorted(Settings.model_fields))
        return f"{name}: no such setting; the settings are {known}"
    about = Settings.model_fields[name].description
    hint = f" ({about})" if about else ""
    secret = Settings.model_fields[name].annotation is SecretStr
    return f"REFLUX_{name.upper()}={'***' if secret else repr(value)}: {problem}{hint}"
