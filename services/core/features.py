"""The one door to Feast: write features, read them online, read them as of a time.

Values travel by Feast's own online-store interface with its protobufs: 20,000 rows/s against 5,000
by `push`, and a third of a millisecond for one user. Importing Feast takes seconds, so it happens
when a `FeatureStore` is made.
"""

import copy
import json
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from services.core.awaited import AwaitedRows
from services.core.errors import DamagedRowError, SettingsError, UnavailableError
from services.core.eventlog import EventLog
from services.core.events import EVENTS, Item
from services.core.history import ItemStats, Popularity, UserHistory, histories_as_of
from services.core.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureView

    from services.core import protos

__all__ = ["FeatureStore", "ItemStats", "Popularity", "UserHistory"]

REPOSITORY: Final = Path(__file__).resolve().parents[2] / "feature_repo"
_LENGTH: Final = struct.Struct("<I")
WRITE_BATCH_ROWS: Final = 100  # measured: larger batches are no faster and keep readers waiting


class FeatureStore:
    """Feast at the settings' addresses. Reads and writes need no registry, only Redis.

    Every method raises `UnavailableError` when Redis doesn't answer within `timeout_s`.
    """

    def __init__(self, settings: Settings, *, timeout_s: float = 5.0) -> None:
        if not settings.redis:
            raise SettingsError(
                "REFLUX_REDIS is empty and no stack runs here; set it to host:port, "
                "or start the embedded Redis with `reflux up`"
            )
        with _light():
            from feast import RepoConfig
            from feast.infra.key_encoding_utils import serialize_entity_key
            from feast.infra.online_stores.redis import RedisOnlineStore
        from redis.asyncio.retry import Retry as AsyncRetry
        from redis.backoff import NoBackoff
        from redis.exceptions import ConnectionError, RedisError
        from redis.retry import Retry

        from feature_repo import definitions
        from services.core import protos

        self._settings = settings
        self._definitions = definitions
        self._protos = protos
        self._redis_error = RedisError
        timeouts = f",socket_timeout={timeout_s:g},socket_connect_timeout={timeout_s:g}"
        self._config = RepoConfig(
            repo_path=REPOSITORY, **_repository(settings, redis=connection(settings) + timeouts)
        )
        self._online = RedisOnlineStore()
        # A key is all this, the id's length, the id and the project; Feast takes 20 us for it.
        version = self._config.entity_key_serialization_version
        self._key_head = serialize_entity_key(protos.key("user_id", ""), version)[: -_LENGTH.size]
        self._project = self._config.project.encode()
        # The client's default is three retries with seconds between them. One, at once, is for
        # a connection that a restarted Redis has closed.
        client = self._client()
        client.set_retry(Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)))
        self._retry = AsyncRetry(NoBackoff(), 1, supported_errors=(ConnectionError,))
        names, fields = self._online._generate_hset_keys_for_features(definitions.user_history)
        self._user_features = names[:-1]  # the last one is Feast's timestamp, which nobody reads
        self._user_fields = fields[:-1]
        self._awaited = AwaitedRows(self._connect_to_wait, self._user_fields, timeout_s=timeout_s)

    def apply(self) -> None:
        """`feast apply` for the settings' addresses; doing it again changes nothing.

        Leaves `<home>/feature_store.yaml`, with which plain Feast finds the same features.
        """
        from feast import FeatureStore as Feast

        home = self._settings.home.absolute()
        home.mkdir(parents=True, exist_ok=True)
        described = home / "feature_store.yaml"
        described.touch(mode=0o600)  # Redis's password is in it
        described.write_text(yaml.safe_dump(_repository(self._settings)))
        d = self._definitions
        views = [copy.deepcopy(view) for view in (d.user_history, d.item_stats)]
        for view in views:
            view.batch_source.file_options.uri = f"{self._settings.offline}/{view.name}/*.parquet"
        Feast(config=self._config).apply([d.user, d.item, *views, d.recommender_v1, d.catalog_v1])

    def ping(self) -> None:
        """Raise `UnavailableError` unless Redis answers."""
        self._read(self._definitions.user_history, [self._protos.key("user_id", "")])

    def write_users(self, rows: Sequence[UserHistory]) -> None:
        """Replace these users' rows online.

        A user has one writer, the worker of its partition. Feast's own order check is off: it
        would drop late events, and the second of two in one millisecond.
        """
        p = self._protos
        self._write(
            self._definitions.user_history,
            (
                p.row(p.key("user_id", row.user_id), p.user_features(row), row.valid_from_ms)
                for row in rows
            ),
        )

    def read_users(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """Rows in the order asked for, empty histories for unknown users; one round trip."""
        return self._histories(user_ids, self._protos.stored_history)

    def peek_users(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """The same for answers, which wait for it: the columns are packed strings and arrays, to be
        read and not compared."""
        return self._histories(user_ids, self._peeked)

    async def await_user(self, user_id: str) -> UserHistory:
        """`peek_users` for one user, on the event loop: a third of the CPU of a thread's."""
        try:
            row = await self._awaited.read(self._user_key(user_id))
        except (self._redis_error, TimeoutError) as error:
            raise self._unavailable(error) from None
        return self._peeked(user_id, dict(zip(self._user_features, row, strict=True)))

    async def stop_waiting(self) -> None:
        """Close what `await_user` opened."""
        await self._awaited.close()

    async def _connect_to_wait(self) -> Any:
        address = connection(self._settings)  # without deadlines
        client = await self._online._get_client_async(
            self._config.online_store.model_copy(update={"connection_string": address})
        )
        client.set_retry(self._retry)
        return client

    def _peeked(self, user_id: str, stored: Mapping[str, bytes | None]) -> UserHistory:
        try:
            return self._protos.peeked_history(user_id, stored)
        except ValueError as error:
            raise DamagedRowError(
                f"this user's history in Redis can't be read ({error}); `reflux features rebuild` "
                "makes it anew from the log"
            ) from None

    def _histories(
        self, user_ids: Sequence[str], read: Callable[[str, dict[str, bytes | None]], UserHistory]
    ) -> list[UserHistory]:
        """What Feast wrote, found by its keys; its own way of reading makes more of it."""
        keys, fields = [self._user_key(user_id) for user_id in user_ids], self._user_fields
        try:
            client = self._client()
            if len(keys) == 1:
                found = [client.hmget(keys[0], fields)]
            else:
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.hmget(key, fields)
                    found = pipe.execute()
        except self._redis_error as error:
            raise self._unavailable(error) from None
        names = self._user_features
        return [
            read(user_id, dict(zip(names, row, strict=True)))
            for user_id, row in zip(user_ids, found, strict=True)
        ]

    def unfilled(self, topic: str, partitions: Iterable[int]) -> dict[int, int]:
        """Partitions of which this store may lack logged records, and from which log offset on.

        From 0 where it is new or has lost everything. One that has been restarted or failed over
        may have come back as it was minutes ago (Redis answers before what was written is safe),
        and its marks with it: from where they say.
        """
        try:
            incarnation, client = self.incarnation(), self._client()
            marks = {p: _parsed(client.get(self._mark(topic, p))) for p in partitions}
        except self._redis_error as error:
            raise self._unavailable(error) from None
        return {p: offset for p, (offset, of) in marks.items() if of != incarnation}

    def mark_filled(
        self, topic: str, offsets: Mapping[int, int], incarnation: bytes | None = None
    ) -> None:
        """Say that this incarnation has all that the log has of these partitions, and that what
        comes before these offsets will survive it; nothing where it has ended meanwhile.

        None: whichever a partition's mark names.
        """

        def change(pipe: Any, key: str, offset: int) -> None:
            # A restart from now on breaks the connection, and with it the transaction: what a
            # store that has come back old says of itself must not be overwritten.
            of = incarnation or _parsed(pipe.get(key))[1]
            if of == self.incarnation():
                pipe.multi()
                pipe.set(key, b"%d %b" % (offset, of))

        try:
            for partition, offset in offsets.items():
                key = self._mark(topic, partition)
                self._client().transaction(partial(change, key=key, offset=offset), key)
        except self._redis_error as error:
            raise self._unavailable(error) from None

    def mark_unfilled(self) -> None:
        """Let the workers rebuild the store from the log."""
        try:
            client = self._client()
            for key in client.scan_iter(match=self._mark("*", "*")):
                client.delete(key)
        except self._redis_error as error:
            raise self._unavailable(error) from None

    def _client(self) -> Any:
        return self._online._get_client(self._config.online_store)

    def incarnation(self) -> bytes:
        """Another one after each start of Redis, or of one of its cluster's primaries."""
        client = self._client()
        cluster = hasattr(client, "get_primaries")
        try:
            found = client.info("server", **({"target_nodes": "primaries"} if cluster else {}))
        except self._redis_error as error:
            raise self._unavailable(error) from None
        nodes = [found] if "run_id" in found else found.values()
        return ",".join(sorted(str(node["run_id"]) for node in nodes)).encode()

    def _mark(self, topic: str, partition: int | str) -> str:
        return f"{self._config.project}:filled_until:{topic}:{partition}"

    def forget_users(self, user_ids: Sequence[str]) -> None:
        """Delete these users' rows online."""
        client = self._client()
        try:
            for user_id in user_ids:
                client.delete(self._user_key(user_id))
        except self._redis_error as error:
            raise self._unavailable(error) from None

    def _user_key(self, user_id: str) -> bytes:
        """Where Feast keeps this user's row in Redis."""
        name = user_id.encode()
        return b"".join((self._key_head, _LENGTH.pack(len(name)), name, self._project))

    def purge(self) -> None:
        """Have Redis write its append-only file anew, without what has been deleted, where it has
        one and lets us."""
        with suppress(self._redis_error):
            self._client().bgrewriteaof()

    def write_items(self, items: Iterable[Item]) -> None:
        """Replace these items' metadata online; their popularity stays."""
        p = self._protos
        now_ms = time.time_ns() // 1_000_000
        self._write(
            self._definitions.item_stats,
            (p.row(p.key("item_id", i.item_id), p.item_metadata(i), now_ms) for i in items),
        )

    def write_popularity(self, rows: Iterable[Popularity]) -> None:
        """Replace these items' popularity online; their metadata stays."""
        p = self._protos
        now_ms = time.time_ns() // 1_000_000
        self._write(
            self._definitions.item_stats,
            (p.row(p.key("item_id", r.item_id), p.item_popularity(r), now_ms) for r in rows),
        )

    def read_items(self, item_ids: Sequence[str]) -> list[ItemStats]:
        """Rows in the order asked for, empty ones for unknown items; one round trip."""
        keys = [self._protos.key("item_id", item_id) for item_id in item_ids]
        found = self._read(self._definitions.item_stats, keys)
        return [
            ItemStats(item_id=item_id, **self._protos.item_features(features))
            for item_id, features in zip(item_ids, found, strict=True)
        ]

    def as_of(self, user_ids: Sequence[str], timestamps_ms: Sequence[int]) -> list[UserHistory]:
        """Exact histories strictly before each time, from the event log."""
        events = EventLog(self._settings.offline, EVENTS).read()
        return histories_as_of(events, user_ids, timestamps_ms, limit=self._settings.history_events)

    def _write(self, view: "FeatureView", rows: Iterable["protos.Row"]) -> None:
        rows = iter(rows)
        try:
            while batch := list(islice(rows, WRITE_BATCH_ROWS)):
                self._online.online_write_batch(self._config, view, batch, progress=None)
        except self._redis_error as error:
            raise self._unavailable(error) from None

    def _read(self, view: "FeatureView", keys: Sequence[Any]) -> list[dict[str, Any] | None]:
        try:
            rows = self._online.online_read(self._config, view, list(keys))
        except self._redis_error as error:
            raise self._unavailable(error) from None
        return [features for _, features in rows]

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"Redis at {self._settings.redis.split(',')[0]} doesn't answer ({error}); check that "
            "it runs and is reachable, and REFLUX_REDIS"
        )


def _parsed(mark: bytes | None) -> tuple[int, bytes]:
    """A mark's offset and incarnation; (0, b"") for none."""
    offset, _, incarnation = (mark or b"0").partition(b" ")
    return int(offset), incarnation


@contextmanager
def _light() -> Iterator[None]:
    """Import Feast in 1.2 s, not 5.6 (of one core), and with half the memory.

    It would import torch if it found it (1.6 s), and let typeguard rewrite its own functions so
    that they check their arguments (2.8 s). Every worker and replica waits for it as it starts.
    """
    import typeguard

    checked, torch = typeguard.typechecked, sys.modules.get("torch")
    unchecked: Any = lambda target=None, **_: target or (lambda again: again)  # noqa: E731
    typeguard.typechecked = unchecked
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        typeguard.typechecked = checked
        if torch is None:
            del sys.modules["torch"]


def connection(settings: Settings) -> str:
    """Redis's address, TLS and credentials, as Feast writes them."""
    options: dict[str, object] = {}
    if settings.redis_tls:
        options["ssl"] = True
        if settings.redis_ca_file:
            options["ssl_ca_certs"] = settings.redis_ca_file
    if settings.redis_username:
        options["username"] = settings.redis_username
    if password := settings.redis_password.get_secret_value():
        options["password"] = password
    if any("," in str(value) for value in options.values()):
        raise SettingsError("REFLUX_REDIS_*: Feast can't take a comma in any of them")
    return ",".join(
        [settings.redis, *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    )


def _repository(settings: Settings, *, redis: str = "") -> dict[str, Any]:
    """feature_store.yaml with the settings' addresses in place of its own."""
    repository: dict[str, Any] = yaml.safe_load((REPOSITORY / "feature_store.yaml").read_text())
    repository["registry"] = str(settings.home.absolute() / "feast.db")
    repository["online_store"]["connection_string"] = redis or connection(settings)
    hosts = [part for part in settings.redis.split(",") if "=" not in part]
    repository["online_store"]["redis_type"] = "redis_cluster" if len(hosts) > 1 else "redis"
    return repository
