"""Cutting the log into blocks of whole users."""

import random

import pyarrow as pa
import pyarrow.compute as pc

from services.recommend.everyone import blocks_of_users


def test_every_user_is_whole_in_one_block_and_in_order() -> None:
    users = random.Random(0).choices([f"u{number}" for number in range(9)], k=200)
    events = pa.table({"user_id": users, "event_id": list(range(200))})
    blocks = list(blocks_of_users(events, block_events=50))
    assert len(blocks) > 1
    assert all(len(block) >= 50 for block in blocks[:-1])
    found: dict[str, list[int]] = {}
    for block in blocks:
        for user_id in block["user_id"].unique().to_pylist():
            assert user_id not in found
            found[user_id] = block.filter(pc.equal(block["user_id"], user_id))[
                "event_id"
            ].to_pylist()
    assert found == {
        user_id: [number for number, user in enumerate(users) if user == user_id]
        for user_id in set(users)
    }
