"""The one door to model artifacts: publish, promote, fetch, roll back, prune.

Layout, on any filesystem that pyarrow reaches (a path, file://, s3://, gs://):

    <uri>/<kind>/000042/{weights.safetensors, config.json, catalog.parquet, manifest.json}
    <uri>/<kind>/serving.json       which version serves, and which did before
    <uri>/<kind>/held.json          the same, chosen by hand: as long as it is there, it counts
    <uri>/<kind>/trial.json         which version is tried out on some users meanwhile

A version's files are written first and its manifest last; a version without a manifest does not
exist. Both pointers and manifests are written beside and then moved, so that a reader meets the
old one or the new one, whole. A crash at any point leaves at most files that nobody reads.

One process publishes a kind at a time. Promotions may come from anywhere: the last one wins. Jobs
write one pointer and operators the other, so that a job which promotes just now can't undo a hold.
"""

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import pyarrow as pa
from pyarrow import fs

from services.core.errors import (
    CorruptVersionError,
    NothingServingError,
    RegistryError,
    VersionNotFoundError,
)
from services.core.trials import Trial

Kind = Literal["teacher", "student"]

logger = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"
POINTER: Final = "serving.json"
HELD: Final = "held.json"
TRIAL: Final = "trial.json"
ROLLBACK_DEPTH: Final = 8  # versions that the pointer remembers and that prune therefore keeps
_CHUNK_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One version taking over, and why."""

    version: int
    promoted_ms: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What serves now; `history` is oldest first and ends with it.

    `held`: chosen by hand, so the learning jobs publish but don't promote until it is released.
    """

    version: int
    promoted_ms: int
    history: tuple[Promotion, ...]
    held: bool


class Registry:
    """Model artifacts under `uri`. Holds no state: any number of processes may read at once.

    `filesystem` replaces the one that the URI names (an S3 with an endpoint of its own, ...);
    `uri` is then a path on it. Filesystem trouble is raised as `OSError`.
    """

    def __init__(self, uri: str, *, filesystem: fs.FileSystem | None = None) -> None:
        self.uri = uri
        if filesystem is not None:
            self._fs, self._root = filesystem, uri
        elif "://" in uri:
            try:
                self._fs, self._root = fs.FileSystem.from_uri(uri)
            except pa.ArrowInvalid as error:
                raise RegistryError(
                    f"registry {uri!r}: {error}; use a path, file://, s3:// or gs://"
                ) from None
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(uri).absolute())

    def publish(self, kind: Kind, directory: Path, manifest: Mapping[str, Any]) -> int:
        """Store the files in `directory` as the next version of `kind`; return its number.

        The stored manifest is the given one (JSON, finite numbers) with `kind`, `version`,
        `created_ms` and the size and SHA-256 of every file. Publishing does not promote.
        """
        given = json.loads(json.dumps(dict(manifest), allow_nan=False))  # as it will be read back
        sources = sorted(directory.iterdir())
        if not sources or not all(path.is_file() for path in sources):
            raise ValueError(f"{directory}: an artifact is a directory of one or more plain files")
        if any(path.name == MANIFEST for path in sources):
            raise ValueError(f"{directory / MANIFEST}: pass the manifest, don't write it")
        version = max(self._directories(kind), default=0) + 1
        home = self._version_path(kind, version)
        self._fs.create_dir(home, recursive=True)
        files = {path.name: self._upload(path, f"{home}/{path.name}") for path in sources}
        stored = {
            **given,
            "kind": kind,
            "version": version,
            "created_ms": _now_ms(),
            "files": files,
        }
        stored["sha256"] = _digest(stored)
        self._write_json(f"{home}/{MANIFEST}", stored)
        return version

    def versions(self, kind: Kind) -> list[int]:
        """Every version that exists, ascending."""
        return sorted(v for v, names in self._directories(kind).items() if MANIFEST in names)

    def latest(self, kind: Kind) -> int | None:
        """The newest version, promoted or not."""
        return max(self.versions(kind), default=None)

    def manifest(self, kind: Kind, version: int) -> dict[str, Any]:
        """A version's manifest, verified by its own hash."""
        path = f"{self._version_path(kind, version)}/{MANIFEST}"
        try:
            stored = json.loads(self._read(path))
            intact = stored["sha256"] == _digest(stored)
        except FileNotFoundError:
            raise VersionNotFoundError(
                f"{kind} {version} is not in {self.uri}; there are {self.versions(kind)}"
            ) from None
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CorruptVersionError(f"{path} doesn't match its own hash; publish it again")
        return dict(stored)

    def fetch(self, kind: Kind, version: int, into: Path) -> Path:
        """Copy a version to `into/<kind>/<version>` and return that directory.

        It is complete and matches the manifest's hashes, or `CorruptVersionError` is raised and
        nothing is there. `into` belongs to the caller alone.
        """
        manifest = self.manifest(kind, version)
        target = into / kind / f"{version:06d}"
        staging = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        staging.mkdir(parents=True)
        try:
            for name, expected in manifest["files"].items():
                if Path(name).name != name:
                    raise CorruptVersionError(f"{kind} {version}: {name!r} is no plain file's name")
                source = f"{self._version_path(kind, version)}/{name}"
                found = self._download(source, staging / name)
                if found != expected:
                    raise CorruptVersionError(f"{source}: {found}, its manifest says {expected}")
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
        except FileNotFoundError as error:
            # A prune took the version away meanwhile (its manifest went first), or a file is lost.
            if version not in self.versions(kind):
                raise VersionNotFoundError(f"{kind} {version} was pruned while read") from error
            raise CorruptVersionError(f"{kind} {version}: a file is missing: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def promote(self, kind: Kind, version: int, reason: str, *, hold: bool = False) -> None:
        """Make an existing version the one that serves; `hold` it against the learning jobs."""
        self.manifest(kind, version)
        entry = Promotion(version=version, promoted_ms=_now_ms(), reason=reason)
        try:
            history = (hold and self._history(kind, HELD)) or self._history(kind, POINTER)
        except RegistryError as error:  # which this mends
            logger.error("%s; what served before %d is forgotten", error, version)
            history = ()
        self._point(kind, HELD if hold else POINTER, (*history, entry))

    def held(self, kind: Kind) -> int | None:
        """The version that was chosen by hand and stays until `release`; None: jobs may promote."""
        held = self._history(kind, HELD)
        return held[-1].version if held else None

    def release(self, kind: Kind) -> None:
        """Let the learning jobs promote again; until one does, what was held serves."""
        if held := self._history(kind, HELD):
            self._point(kind, POINTER, held)
            self._fs.delete_file(f"{self._root}/{kind}/{HELD}")

    def serving(self, kind: Kind) -> Serving:
        """What serves now; `NothingServingError` before the first promotion."""
        held = self._history(kind, HELD)
        history = held or self._history(kind, POINTER)
        if not history:
            raise NothingServingError(f"no {kind} has been promoted in {self.uri} yet")
        now = history[-1]
        return Serving(
            version=now.version, promoted_ms=now.promoted_ms, history=history, held=bool(held)
        )

    def roll_back(self, kind: Kind, to: int | None = None) -> int:
        """Hold the version that served before and return it; call again to go further back.

        With `to`, hold that one, whatever the learning jobs have promoted since.
        """
        history = self.serving(kind).history
        undone = history[-1].version
        earlier = [entry for entry in history if entry.version != undone]
        if to == undone:
            raise RegistryError(f"{kind} {undone} serves already; name an earlier one")
        if to is None and not earlier:
            raise RegistryError(f"{kind} {undone} is the only one that has served; promote another")
        to = earlier[-1].version if to is None else to
        while earlier and earlier[-1].version != to:
            earlier.pop()
        self.manifest(kind, to)
        entry = Promotion(version=to, promoted_ms=_now_ms(), reason=f"rolled back from {undone}")
        self._point(kind, HELD, (*earlier[:-1], entry))
        return to

    def trial(self, kind: Kind) -> Trial | None:
        """What is tried out now."""
        path = f"{self._root}/{_checked(kind)}/{TRIAL}"
        try:
            return Trial(**json.loads(self._read(path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise RegistryError(f"{path} is unreadable ({error!r}); end the trial") from None

    def begin_trial(self, kind: Kind, trial: Trial) -> None:
        """Try a published version out; replaces the trial before it."""
        self.manifest(kind, trial.version)
        self._write_json(f"{self._root}/{_checked(kind)}/{TRIAL}", asdict(trial))

    def end_trial(self, kind: Kind) -> None:
        """From now on what serves answers everybody, alone; nothing happens where none runs."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._root}/{_checked(kind)}/{TRIAL}")

    def prune(self, kind: Kind, keep: int) -> list[int]:
        """Delete all but the newest `keep` versions, what the pointer remembers, what is tried.

        Also deletes what crashed publications left behind. Returns the versions deleted.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        directories, existing = self._directories(kind), self.versions(kind)
        remembered = (*self._history(kind, POINTER), *self._history(kind, HELD))
        kept = {*existing[-keep:], *(entry.version for entry in remembered)}
        # A directory above the newest version may be a publication under way.
        if trial := self.trial(kind):
            kept.add(trial.version)
        doomed = [v for v in sorted(directories) if v not in kept and v < max(existing, default=0)]
        for version in doomed:
            path = self._version_path(kind, version)
            if version in existing:
                self._fs.delete_file(f"{path}/{MANIFEST}")  # from here on it doesn't exist
            self._fs.delete_dir(path)
        return [version for version in doomed if version in existing]

    def _directories(self, kind: Kind) -> dict[int, set[str]]:
        """Version directory -> the names in it; one listing, however many versions."""
        root = f"{self._root}/{_checked(kind)}"
        selector = fs.FileSelector(root, allow_not_found=True, recursive=True)
        found: dict[int, set[str]] = {}
        for info in self._fs.get_file_info(selector):
            first, _, rest = info.path[len(root) + 1 :].partition("/")
            if first.isdecimal():
                found.setdefault(int(first), set()).add(rest)
        return found

    def _version_path(self, kind: Kind, version: int) -> str:
        return f"{self._root}/{_checked(kind)}/{version:06d}"

    def _history(self, kind: Kind, pointer: str) -> tuple[Promotion, ...]:
        """Every promotion that this pointer remembers; none where it isn't there."""
        path = f"{self._root}/{_checked(kind)}/{pointer}"
        try:
            content = json.loads(self._read(path))
            return tuple(Promotion(**entry) for entry in content["history"])
        except FileNotFoundError:
            return ()
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{path} is unreadable ({error!r}); promote a version, or delete it"
            ) from None

    def _point(self, kind: Kind, pointer: str, history: tuple[Promotion, ...]) -> None:
        entries = [asdict(entry) for entry in history[-ROLLBACK_DEPTH:]]
        self._write_json(f"{self._root}/{_checked(kind)}/{pointer}", {"history": entries})

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _write_json(self, path: str, content: Mapping[str, Any]) -> None:
        """Replace a file whole: object stores, too, move by one atomic copy."""
        aside = f"{path}.{uuid.uuid4().hex}.tmp"
        with self._fs.open_output_stream(aside) as stream:
            stream.write(json.dumps(content, indent=1, allow_nan=False).encode())
        self._fs.move(aside, path)

    def _upload(self, source: Path, path: str) -> dict[str, Any]:
        with source.open("rb") as stream, self._fs.open_output_stream(path) as out:
            return _copy(iter(lambda: stream.read(_CHUNK_BYTES), b""), out)

    def _download(self, path: str, target: Path) -> dict[str, Any]:
        with self._fs.open_input_stream(path) as stream, target.open("wb") as out:
            return _copy(iter(lambda: stream.read(_CHUNK_BYTES), b""), out)


def _copy(chunks: Iterator[bytes], out: Any) -> dict[str, Any]:
    """Write the chunks; say what they were."""
    digest, n_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        out.write(chunk)
        digest.update(chunk)
        n_bytes += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": n_bytes}


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON without its own hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(kind: Kind) -> Kind:
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(get_args(Kind))}")
    return kind


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
