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


def forgotten_rows(tombstones: Iterable[Tombstone]) -> pc.Expression | None:
    """Which rows (columns user_id, partition, offset) must go; None: none."""
    user, partition, offset = (pc.field(name) for name in ("user_id", "partition", "offset"))
    gone: pc.Expression | None = None
    for wish in tombstones:
        # A user has one partition; rows in another are from before their number changed.
        later = (partition == wish.partition) & (offset > wish.offset)
        rows = (user == pa.scalar(wish.user_id)) & ~later
        gone = rows if gone is None else gone | rows
    return gone
