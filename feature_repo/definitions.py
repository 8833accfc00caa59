"""What Reflux keeps in Feast. Imports none of Reflux: `feast apply` executes this file.

user_history, by user_id: the latest interactions, oldest first, by (event time, arrival).
item_stats, by item_id: metadata and how often the item was chosen lately.

A row is valid from one millisecond after its newest event, so that the features as of an event's
own time never contain that event.
"""

import os
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Float64, Int64, String

OFFLINE = os.environ.get("REFLUX_OFFLINE_URI") or str(
    Path(os.environ.get("REFLUX_HOME") or Path(__file__).resolve().parents[1] / ".reflux")
    / "offline"
)
FOREVER = timedelta(0)  # Feast's zero: no row is too old


def _source(name: str) -> FileSource:
    return FileSource(
        name=name,
        path=f"{OFFLINE}/{name}/*.parquet",
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )


user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)

user_history = FeatureView(
    name="user_history",
    entities=[user],
    ttl=FOREVER,
    source=_source("user_history"),
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="item_ids", dtype=Array(String)),
        Field(name="event_types", dtype=Array(String)),
        Field(name="timestamps", dtype=Array(Int64), description="event time, UTC milliseconds"),
        Field(name="values", dtype=Array(Float64), description="rating, price; NaN: none"),
        Field(name="event_keys", dtype=Array(Int64), description="hashes of the event ids"),
        Field(name="n_events", dtype=Int64, description="interactions ever"),
        Field(name="last_arrival_ms", dtype=Int64),
        Field(name="updated_ms", dtype=Int64, description="when this row was written"),
        Field(name="partition", dtype=Int64, description="of the last event applied"),
        Field(name="offset", dtype=Int64, description="of the last event applied"),
    ],
)

item_stats = FeatureView(
    name="item_stats",
    entities=[item],
    ttl=FOREVER,
    source=_source("item_stats"),
    schema=[
        Field(name="item_id", dtype=String),
        Field(name="title", dtype=String),
        Field(name="categories", dtype=Array(String)),
        Field(name="text", dtype=String),
        Field(
            name="popularity_1d",
            dtype=Int64,
            description="interactions in the hour of the log's newest event and the 23 before it",
        ),
        Field(name="popularity_7d", dtype=Int64),
        Field(name="popularity_30d", dtype=Int64),
        Field(name="n_events", dtype=Int64, description="interactions ever"),
    ],
)

recommender_v1 = FeatureService(name="recommender_v1", features=[user_history])
catalog_v1 = FeatureService(name="catalog_v1", features=[item_stats])
