"""The registry: whole or not there, whatever breaks in between."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from services.core.errors import (
    CorruptVersionError,
    NothingServingError,
    RegistryError,
    VersionNotFoundError,
)
from services.core.registry import ROLLBACK_DEPTH, Registry


@pytest.fixture(params=["path", "uri"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    root = tmp_path / "with space" / "registry"
    return Registry(str(root) if request.param == "path" else root.as_uri())


def artifact(at: Path, content: str = "weights") -> Path:
    at.mkdir(parents=True, exist_ok=True)
    (at / "weights.safetensors").write_text(content)
    (at / "config.json").write_text("{}")
    return at


def test_publish_promote_and_fetch(registry: Registry, tmp_path: Path) -> None:
    source = artifact(tmp_path / "a")
    with pytest.raises(NothingServingError, match="no student has been promoted"):
        registry.serving("student")

    # Integer keys (offsets per partition) must survive the trip through JSON and the hash.
    version = registry.publish("student", source, {"offsets": {2: 5, 10: 7}})
    assert (version, registry.versions("student"), registry.latest("student")) == (1, [1], 1)
    assert registry.latest("teacher") is None
    with pytest.raises(NothingServingError):
        registry.serving("student")

    registry.promote("student", version, "first")
    serving = registry.serving("student")
    assert (serving.version, serving.history[-1].reason) == (1, "first")
    fetched = registry.fetch("student", version, tmp_path / "into")
    assert (fetched / "weights.safetensors").read_text() == "weights"
    assert json.loads((fetched / "manifest.json").read_text()) == registry.manifest("student", 1)
    assert registry.manifest("student", 1)["offsets"] == {"2": 5, "10": 7}
    assert list(fetched.parent.iterdir()) == [fetched]


def test_what_cannot_be_published_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    source = artifact(tmp_path / "a")
    with pytest.raises(ValueError, match="JSON compliant"):
        registry.publish("student", source, {"metrics": {"ndcg": float("nan")}})
    (source / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="pass the manifest"):
        registry.publish("student", source, {})
    with pytest.raises(ValueError, match="must be one of teacher, student"):
        registry.publish("pupil", artifact(tmp_path / "b"), {})  # type: ignore[arg-type]
    assert registry.versions("student") == []


def test_a_version_without_manifest_does_not_exist(registry: Registry, tmp_path: Path) -> None:
    registry.publish("student", artifact(tmp_path / "a"), {})
    directory = tmp_path / "with space/registry/student/000001"
    (directory / "manifest.json").rename(tmp_path / "aside.json")
    assert registry.versions("student") == []
    with pytest.raises(VersionNotFoundError, match="student 1"):
        registry.manifest("student", 1)
    with pytest.raises(VersionNotFoundError):
        registry.promote("student", 1, "no")
    # Its number is not given out again: somebody may have seen its files.
    assert registry.publish("student", artifact(tmp_path / "a"), {}) == 2


def test_roll_back_goes_further_each_time(registry: Registry, tmp_path: Path) -> None:
    for _ in range(3):
        registry.promote("student", registry.publish("student", artifact(tmp_path / "a"), {}), "on")
    registry.promote("student", 3, "again")  # promoting what serves adds nothing to go back to
    assert registry.roll_back("student") == 2
    assert registry.serving("student").history[-1].reason == "rolled back from 3"
    assert registry.roll_back("student") == 1
    with pytest.raises(RegistryError, match="only one"):
        registry.roll_back("student")
    assert registry.serving("student").version == 1


def test_roll_back_to_what_was_decided_whatever_was_promoted_since(
    registry: Registry, tmp_path: Path
) -> None:
    for _ in range(4):
        registry.promote("student", registry.publish("student", artifact(tmp_path / "a"), {}), "on")
    with pytest.raises(RegistryError, match="4 serves already"):
        registry.roll_back("student", 4)
    assert registry.roll_back("student", 2) == 2
    assert registry.held("student") == 2
    assert registry.roll_back("student") == 1


def test_what_is_chosen_by_hand_is_held_until_it_is_released(
    registry: Registry, tmp_path: Path
) -> None:
    for _ in range(2):
        registry.promote("student", registry.publish("student", artifact(tmp_path / "a"), {}), "on")
    assert registry.held("student") is None
    registry.roll_back("student")
    assert registry.held("student") == 1
    registry.promote("student", 2, "by hand", hold=True)
    assert registry.held("student") == 2
    registry.release("student")
    assert registry.held("student") is None
    assert registry.serving("student").version == 2


def test_prune_keeps_the_newest_and_what_serves(registry: Registry, tmp_path: Path) -> None:
    source = artifact(tmp_path / "a")
    for _ in range(4 + ROLLBACK_DEPTH):
        registry.publish("student", source, {})
    for version in range(1, 3 + ROLLBACK_DEPTH):
        registry.promote("student", version, "better")
    (tmp_path / "with space/registry/student/000002/manifest.json").unlink()  # crashed half-way
    assert registry.prune("student", keep=1) == [1, 3 + ROLLBACK_DEPTH]
    kept = [*range(3, 3 + ROLLBACK_DEPTH), 4 + ROLLBACK_DEPTH]
    assert registry.versions("student") == kept
    assert not (tmp_path / "with space/registry/student/000002").exists()
    for _ in range(ROLLBACK_DEPTH - 1):
        registry.roll_back("student")
    assert registry.serving("student").version == 3


@settings(max_examples=50)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("flip")
    registry = Registry(str(tmp_path / "registry"))
    registry.publish("student", artifact(tmp_path / "a"), {"metrics": {"ndcg": 0.25}})
    for path in sorted((tmp_path / "registry/student/000001").iterdir()):
        intact = path.read_bytes()
        flipped = bytearray(intact)
        flipped[int(position * len(intact))] ^= 1 << bit
        path.write_bytes(flipped)
        if path.name == "manifest.json" and _same_json(intact, bytes(flipped)):
            continue  # white space became another white space
        with pytest.raises(CorruptVersionError):
            registry.fetch("student", 1, tmp_path / "into")
        assert not list((tmp_path / "into").rglob("*.*"))
        path.write_bytes(intact)
    (tmp_path / "registry/student/000001/config.json").unlink()
    with pytest.raises(CorruptVersionError, match="missing"):
        registry.fetch("student", 1, tmp_path / "into")


def test_a_crash_before_any_file_operation_leaves_a_consistent_state(tmp_path: Path) -> None:
    """Publish, promote, roll back and prune, cut short at every operation in turn."""
    source = artifact(tmp_path / "a")

    def script(registry: Registry) -> None:
        for _ in range(2):
            registry.promote("student", registry.publish("student", source, {}), "on")
        registry.roll_back("student")
        registry.publish("student", source, {})
        registry.publish("student", source, {})
        registry.prune("student", keep=1)

    crashed, operations = True, 0
    while crashed:
        root = tmp_path / f"crash-{operations}"
        root.mkdir()
        crashed = _crashes(script, root, after=operations)
        registry = Registry(str(root / "registry"))
        for version in registry.versions("student"):
            registry.fetch("student", version, tmp_path / "into")
        try:
            serving = registry.serving("student")
        except NothingServingError:
            assert operations < 12
        else:
            registry.fetch("student", serving.version, tmp_path / "into")
        before = registry.versions("student")
        following = registry.publish("student", source, {})
        assert following > max(before, default=0)
        registry.promote("student", following, "life goes on")
        registry.prune("student", keep=1)
        assert following in registry.versions("student")
        operations += 1
    assert operations > 30


class CrashError(Exception):
    pass


def _crashes(script: Callable[[Registry], None], root: Path, *, after: int) -> bool:
    crashing = fs.PyFileSystem(CrashingHandler(root, after))
    try:
        script(Registry("registry", filesystem=crashing))
    except CrashError:
        return True
    return False


def _same_json(left: bytes, right: bytes) -> bool:
    try:
        return bool(json.loads(left) == json.loads(right))
    except ValueError:
        return False


class CrashingHandler(fs.FileSystemHandler):
    """A local directory whose `left` changes succeed, and of the next one nothing happens."""

    def __init__(self, root: Path, left: int) -> None:
        self.local = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())
        self.left = left

    def change(self) -> None:
        if self.left == 0:
            raise CrashError
        self.left -= 1

    def create_dir(self, path: str, recursive: bool) -> None:
        self.change()
        self.local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        # A directory goes file by file, and a crash may come between any two.
        for info in self.local.get_file_info(fs.FileSelector(path)):
            self.delete_file(info.path)
        self.change()
        self.local.delete_dir(path)

    def delete_file(self, path: str) -> None:
        self.change()
        self.local.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.change()
        self.local.move(src, dest)

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        self.change()
        return pa.PythonFile(TornFile(self, self.local.open_output_stream(path)), mode="w")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.local.open_input_stream(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return list(self.local.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return list(self.local.get_file_info(selector))

    def get_type_name(self) -> str:
        return "crashing"

    def normalize_path(self, path: str) -> str:
        return path

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError

    open_append_stream = open_input_file = copy_file
    delete_dir_contents = delete_root_dir_contents = copy_file


class TornFile:
    """Opened but, after a crash, without its content."""

    closed = False

    def __init__(self, handler: CrashingHandler, stream: pa.NativeFile) -> None:
        self.handler, self.stream = handler, stream

    def write(self, content: bytes) -> None:
        self.handler.change()
        self.stream.write(content)

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()
