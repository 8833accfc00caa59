"""Kafka and Redis behind TLS, with credentials; gateway and answers behind API keys."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from services.core.errors import UnavailableError
from services.core.events import EVENTS
from services.core.features import FeatureStore
from services.core.kafka import _security, end_offsets, ensure_topics
from services.core.settings import Settings
from services.local import processes
from tests.answering import serving
from tests.component.test_gateway import event, served

PRODUCER, READER, OPERATOR = ("k" * 15 + letter for letter in "pro")
KEYS = f"produce:{PRODUCER},recommend:{READER},produce+recommend+operate:{OPERATOR}"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "ca.pem")


@contextmanager
def behind_tls(authority: trustme.CA, *, backend_port: int, port: int) -> Iterator[None]:
    """What terminates TLS on `port` and passes the plain bytes on: neither of the embedded servers
    speaks TLS itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    listener = socket.create_server(("127.0.0.1", port))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                secured = context.wrap_socket(plain, server_side=True)
            except OSError:  # whoever doesn't speak TLS, or doesn't trust us
                plain.close()
                continue
            backend = socket.create_connection(("127.0.0.1", backend_port))
            for ends in ((secured, backend), (backend, secured)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_kafka_by_tls(
    settings: Settings, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    inside, outside = processes.free_port(), processes.free_port()
    broker = processes.Process(processes.broker(inside, advertised=outside), logs=tmp_path)
    try:
        broker.wait_ready()
        with behind_tls(authority, backend_port=inside, port=outside):
            secured = settings.model_copy(
                update={
                    "kafka_bootstrap": f"127.0.0.1:{outside}",
                    "kafka_security": "SSL",
                    "kafka_ca_file": ca_file,
                    "kafka_timeout_s": 3.0,
                }
            )
            with served(secured) as gateway:
                assert gateway.post("/v1/events", json=event(1)).status_code == 202
            assert sum(end_offsets(secured, EVENTS).values()) == 1
            for wrong in ({"kafka_security": "PLAINTEXT"}, {"kafka_ca_file": ""}):
                with pytest.raises(UnavailableError):
                    ensure_topics(secured.model_copy(update={**wrong, "kafka_timeout_s": 1.0}))
    finally:
        broker.stop()


def test_sasl_reaches_every_kafka_client() -> None:
    given = _security(
        Settings(kafka_security="SASL_SSL", kafka_username="reflux", kafka_password="secret")
    )
    assert given["security_protocol"] == "SASL_SSL"
    assert given["sasl_mechanism"] == "SCRAM-SHA-512"
    assert (given["sasl_plain_username"], given["sasl_plain_password"]) == ("reflux", "secret")


def test_redis_by_tls_and_password(
    settings: Settings, authority: trustme.CA, ca_file: str, tmp_path: Path
) -> None:
    inside, outside = processes.free_port(), processes.free_port()
    plain = processes.redis(inside, data=tmp_path / "redis")
    command = processes.Command(
        name="redis",
        argv=[*plain.argv, "--requirepass", "12345"],  # digits: Feast would read a number
        ready=plain.ready,
        env={},
    )
    redis = processes.Process(command, logs=tmp_path)
    try:
        redis.wait_ready()
        with behind_tls(authority, backend_port=inside, port=outside):
            secured = Settings(
                home=tmp_path / "home",
                redis=f"127.0.0.1:{outside}",
                redis_tls=True,
                redis_ca_file=ca_file,
                redis_password="12345",
            )
            FeatureStore(secured).ping()
            FeatureStore(secured).apply()
            assert (secured.home / "feature_store.yaml").stat().st_mode & 0o077 == 0
            for wrong in ({"redis_password": "54321"}, {"redis_tls": False}, {"redis_ca_file": ""}):
                other = Settings(**{**secured.model_dump(), **wrong})
                with pytest.raises(UnavailableError):
                    FeatureStore(other, timeout_s=1.0).ping()
    finally:
        redis.stop()


def test_the_gateway_and_the_answers_ask_for_keys(settings: Settings) -> None:
    keyed = Settings(**{**settings.model_dump(), "api_keys": KEYS, "serving_poll_s": 0.05})
    with served(keyed) as gateway, serving(keyed) as answers:
        for client, path, right, wrong in [
            (gateway, "/v1/events", PRODUCER, READER),
            (answers, "/v1/recommendations", READER, PRODUCER),
        ]:

            def status(key: str | None, client=client, path=path) -> int:  # type: ignore[no-untyped-def]
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                return int(client.post(path, json=event(1), headers=headers).status_code)

            assert status(None) == status("x" * 16) == 401
            assert status(wrong) == 403
            assert status(right) not in (401, 403)
            assert status(OPERATOR) not in (401, 403)
            assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
