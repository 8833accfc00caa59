"""Forgetting users: a tombstone first, which readers heed at once, then their rows, then itself.

    <root>/forgotten/00003-000000000041234.json      partition and log offset of the wish

In Kafka the wish is a record with the user's key and no value: it stands in order with the user's
events, so whatever comes after it is a new user's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs

from services.core.spans import filesystem, whole

FOLDER: Final = "forgotten"
NOWHERE: Final = -1  # no partition


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """Nothing of the user before log offset `offset` of `partition` may stay, nor elsewhere."""

    user_id: str
    partition: int
    offset: int


class Tombstones:
    """Those that still await the rows' removal, under `root` (a path or URI)."""

    def __init__(self, root: str) -> None:
        self._fs, path = filesystem(root)
        self._path = f"{path}/{FOLDER}"

    def add(self, tombstone: Tombstone) -> None:
        """Adding it again changes nothing."""
        with (
            whole(self._fs, self._file(tombstone)) as aside,
            self._fs.open_output_stream(aside) as stream,
        ):
            stream.write(orjson.dumps({"user_id": tombstone.user_id}))

    def pending(self) -> list[Tombstone]:
        selector = pyarrow.fs.FileSelector(self._path, allow_not_found=True)
        found = []
        for info in self._fs.get_file_info(selector):
            named = re.fullmatch(r"(\d{5})-(\d{15})\.json", PurePosixPath(info.path).name)
            if named is None:
                continue
            try:
                with self._fs.open_input_stream(info.path) as stream:
                    user_id = orjson.loads(stream.read())["user_id"]
            except FileNotFoundError:  # done with meanwhile
                continue
            found.append(Tombstone(user_id=user_id, partition=int(named[1]), offset=int(named[2])))
        return found

    def remove(self, tombstones: Iterable[Tombstone]) -> None:
        for tombstone in tombstones:
            self._fs.delete_file(self._file(tombstone))

    def _file(self, tombstone: Tombstone) -> str:
        return f"{self._path}/{tombstone.partition:05d}-{tombstone.offset:015d}.json"


class Forgotten:
    """Which rows must go, for any number of wishes (an expression of 20,000 of them crashed)."""

    def __init__(self, tombstones: Iterable[Tombstone]) -> None:
        kept: dict[str, tuple[int, int]] = {}  # where rows of the user may stay: after the offset
        for wish in tombstones:
            partition, offset = kept.get(wish.user_id, (wish.partition, wish.offset))
            # A user has one partition; rows in another are from before their number changed.
            alone = partition == wish.partition
            kept[wish.user_id] = (partition if alone else NOWHERE, max(offset, wish.offset))
        self._users = pa.array(list(kept), pa.string())
        self._partitions = pa.array([partition for partition, _ in kept.values()], pa.int32())
        self._offsets = pa.array([offset for _, offset in kept.values()], pa.int64())

    def __bool__(self) -> bool:
        return len(self._users) > 0

    def among(self, table: pa.Table) -> pa.ChunkedArray:
        """True for each row (of which `spans.KEYS` are needed) that must go."""
        wish = pc.index_in(table["user_id"], self._users)
        same = pc.equal(table["partition"], pc.take(self._partitions, wish))
        later = pc.and_(same, pc.greater(table["offset"], pc.take(self._offsets, wish)))
        return pc.fill_null(pc.invert(later), False)  # null: of a user who has no such wish
