"""The door to Feast against a real Redis."""

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core import wire
from services.core.errors import DamagedRowError, SettingsError, UnavailableError
from services.core.events import Item
from services.core.features import FeatureStore
from services.core.history import ItemStats, Popularity, UserHistory, event_key
from services.core.settings import Settings
from services.local import processes


def history(user_id: str, n: int) -> UserHistory:
    return UserHistory(
        user_id=user_id,
        item_ids=tuple(f"item {i}" for i in range(n)),
        event_types=("view",) * n,
        timestamps_ms=tuple(range(1_000, 1_000 + n)),
        values=tuple(float(i) for i in range(n)),
        event_keys=tuple(event_key(str(i)) for i in range(n)),
        n_events=n,
        last_arrival_ms=5_000,
        updated_ms=6_000,
        partition=3,
        offset=n,
    )


def test_users_come_back_as_written_and_unknown_ones_are_empty(settings: Settings) -> None:
    store = FeatureStore(settings)
    long, short = history("features-long", 512), history("features-short", 1)
    store.write_users([long, short])
    assert store.read_users(["features-short", "features-nobody", "features-long"]) == [
        short,
        UserHistory(user_id="features-nobody"),
        long,
    ]


def test_our_read_of_a_user_equals_feasts_own(settings: Settings) -> None:
    from feast.infra.online_stores.redis import RedisOnlineStore

    from feature_repo.definitions import user_history
    from services.core import protos

    store = FeatureStore(settings)
    user_ids = ["features-own", "features-own-nobody", "features-öwn"]
    rows = [history(user_ids[0], 70), replace(history(user_ids[2], 2), values=(math.nan, 1.5))]
    store.write_users(rows)
    keys = [protos.key("user_id", user_id) for user_id in user_ids]
    theirs = RedisOnlineStore().online_read(store._config, user_history, keys)
    expected = [
        protos.user_history(user_id, features)
        for user_id, (_, features) in zip(user_ids, theirs, strict=True)
    ]
    assert repr(store.read_users(user_ids)) == repr(expected)  # NaN is not equal to itself
    assert repr([store.read_users([user_id])[0] for user_id in user_ids]) == repr(expected)

    async def awaited() -> list[UserHistory]:
        try:
            return [await store.await_user(user_id) for user_id in user_ids]
        finally:
            await store.stop_waiting()

    peeks = (*store.peek_users(user_ids), *asyncio.run(awaited()))
    for peeked, row in zip(peeks, 2 * expected, strict=True):
        columns: dict[str, Any] = {
            **{name: tuple(getattr(peeked, name)) for name in ("item_ids", "event_types")},
            **{
                name: tuple(np.asarray(getattr(peeked, name)).tolist())
                for name in ("timestamps_ms", "values", "event_keys")
            },
        }
        assert repr(replace(peeked, **columns)) == repr(row)
    assert expected[0] == rows[0]


def test_who_asks_together_is_answered_each_for_themselves(settings: Settings) -> None:
    import redis

    store = FeatureStore(settings)
    row, damaged, strange = (history(f"features-{name}", 3) for name in ("whole", "cut", "list"))
    store.write_users([row, damaged])
    host, port = settings.redis.split(":")
    with redis.Redis(host, int(port)) as client:
        key = store._user_key(damaged.user_id)
        cut = {name: value[:-1] for name, value in client.hgetall(key).items() if len(value) > 9}
        client.hset(key, mapping=cut)
        client.rpush(store._user_key(strange.user_id), "no hash")
    user_ids = [row.user_id, damaged.user_id, strange.user_id, "features-nobody"]

    async def together() -> list[UserHistory | BaseException]:
        try:
            asked = [store.await_user(user_id) for user_id in user_ids]
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await store.stop_waiting()

    found, cut_off, no_row, nobody = asyncio.run(together())
    assert isinstance(found, UserHistory) and tuple(found.item_ids) == row.item_ids
    assert isinstance(cut_off, DamagedRowError) and "features rebuild" in str(cut_off)
    assert isinstance(no_row, UnavailableError) and "WRONGTYPE" in str(no_row)
    assert nobody == UserHistory(user_id="features-nobody")


@given(st.data())
def test_lists_are_read_as_protobuf_reads_them(data: st.DataObject) -> None:
    from feast.protos.feast.types.Value_pb2 import DoubleList, Int64List, StringList, Value

    texts = data.draw(st.lists(st.text(max_size=200), max_size=40))
    integers = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40))
    doubles = data.draw(st.lists(st.floats(), max_size=40))
    strings = Value(string_list_val=StringList(val=texts)).SerializeToString()
    whole = Value(int64_list_val=Int64List(val=integers)).SerializeToString()
    real = Value(double_list_val=DoubleList(val=doubles)).SerializeToString()
    assert list(wire.strings(strings)) == texts
    assert wire.integers(whole).tolist() == integers
    np.testing.assert_array_equal(wire.doubles(real), doubles)
    for read, value in ((wire.strings, strings), (wire.integers, whole), (wire.doubles, real)):
        for bytes_left in range(1, len(value)):
            with pytest.raises(ValueError, match="cut off"):
                read(value[:bytes_left])
        with pytest.raises(ValueError, match="more than"):
            read(value + b"\0")
        noise = data.draw(st.binary(max_size=60))
        with suppress(ValueError):
            read(noise)  # whatever it is, nothing beyond it is read


def test_a_rewrite_with_the_same_or_an_older_event_time_is_not_dropped(settings: Settings) -> None:
    store = FeatureStore(settings)
    row = history("features-rewrite", 2)
    earlier = replace(history("features-rewrite", 1), n_events=9, values=(math.pi,))
    for version in (row, replace(row, n_events=3), earlier):
        store.write_users([version])
        assert store.read_users([row.user_id]) == [version]


def test_metadata_and_popularity_of_an_item_do_not_overwrite_each_other(settings: Settings) -> None:
    store = FeatureStore(settings)
    counts = {"popularity_1d": 1, "popularity_7d": 2, "popularity_30d": 3, "n_events": 4}
    store.write_items([Item(item_id="features-a", title="A", categories=["x", "y"])])
    store.write_popularity([Popularity(item_id="features-a", **counts)])
    store.write_items([Item(item_id="features-a", title="A, again", text="long", categories=["x"])])
    assert store.read_items(["features-a", "features-none"]) == [
        ItemStats(item_id="features-a", title="A, again", categories=("x",), text="long", **counts),
        ItemStats(item_id="features-none"),
    ]


def test_a_redis_that_is_not_there_is_an_error_that_says_so_at_once(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"redis": f"127.0.0.1:{processes.free_port()}"})
    store = FeatureStore(nowhere, timeout_s=0.2)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="REFLUX_REDIS"):
        store.read_users(["anyone"])
    assert time.monotonic() - started < 1.0
    with pytest.raises(SettingsError, match="reflux up"):
        FeatureStore(settings.model_copy(update={"redis": ""}))


def test_a_hot_read_takes_less_than_a_millisecond(settings: Settings) -> None:
    store = FeatureStore(settings)
    store.write_users([history("features-hot", 512)])
    took_s = []
    for _ in range(200):
        started = time.perf_counter()
        store.read_users(["features-hot"])
        took_s.append(time.perf_counter() - started)
    assert sorted(took_s)[20] < 0.001  # the tenth percentile: other tests may run beside this one
