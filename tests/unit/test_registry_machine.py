"""Jobs, operators, readers and crashes around one registry, in any order that hypothesis finds."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pyarrow import fs

from services.core.errors import NothingServingError, RegistryError, VersionNotFoundError
from services.core.registry import ROLLBACK_DEPTH, Registry
from tests.unit.test_registry import CrashError, CrashingHandler, artifact

KEEP = 2
NEVER = 10**9


class RegistryMachine(RuleBasedStateMachine):
    """What must hold: the last word of an operator stands until an operator takes it back, what
    serves can be fetched whole, and a crash leaves either the state before or the one after.

    A job looks whether a version is held and promotes later: anything may happen in between.
    """

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.handler = CrashingHandler(self.root, NEVER)
        self.registry = Registry("registry", filesystem=fs.PyFileSystem(self.handler))
        self.source = artifact(self.root / "source")
        self.held: set[int | None] = {None}  # the words that may stand: two of them after a crash
        self.decided: int | None = None  # what a job is about to promote

    def teardown(self) -> None:
        for version in self.registry.versions("student"):
            self.registry.fetch("student", version, self.root / "into")
        self.folder.cleanup()

    @rule(crash_after=st.none() | st.integers(0, 8))
    def publish(self, crash_after: int | None) -> None:
        self.attempt(lambda: self.registry.publish("student", self.source, {}), crash_after)

    @precondition(lambda self: self.registry.versions("student"))
    @rule()
    def job_decides(self) -> None:
        if self.registry.held("student") is None:
            self.decided = self.registry.latest("student")

    @precondition(lambda self: self.decided is not None)
    @rule(crash_after=st.none() | st.integers(0, 3))
    def job_promotes(self, crash_after: int | None) -> None:
        version, self.decided = self.decided, None
        assert version is not None
        self.attempt(lambda: self.registry.promote("student", version, "job"), crash_after)

    @precondition(lambda self: self.registry.versions("student"))
    @rule(data=st.data(), crash_after=st.none() | st.integers(0, 3))
    def operator_holds(self, data: st.DataObject, crash_after: int | None) -> None:
        version = data.draw(st.sampled_from(self.registry.versions("student")))
        self.word(
            lambda: self.registry.promote("student", version, "hand", hold=True),
            crash_after,
            after=version,
        )

    @rule(crash_after=st.none() | st.integers(0, 3))
    def operator_rolls_back(self, crash_after: int | None) -> None:
        before = self.history()
        undone = before[-1] if before else None
        earlier = [version for version in before if version != undone]
        if earlier:
            self.word(lambda: self.registry.roll_back("student"), crash_after, after=earlier[-1])
        else:
            self.refused(lambda: self.registry.roll_back("student"))

    @rule(crash_after=st.none() | st.integers(0, 4))
    def operator_releases(self, crash_after: int | None) -> None:
        serving = self.history()[-1:]
        self.word(lambda: self.registry.release("student"), crash_after, after=None)
        assert self.history()[-1:] == serving  # until a job promotes

    @rule(crash_after=st.none() | st.integers(0, 12))
    def prune(self, crash_after: int | None) -> None:
        self.attempt(lambda: self.registry.prune("student", KEEP), crash_after)
        if crash_after is None:
            assert len(self.registry.versions("student")) <= KEEP + 2 * ROLLBACK_DEPTH

    @invariant()
    def the_operators_word_stands(self) -> None:
        if hasattr(self, "registry"):
            held = self.registry.held("student")
            assert held in self.held
            self.held = {held}  # whichever it was after a crash, it is that one from now on
            if held is not None:
                assert self.registry.serving("student").version == held

    @invariant()
    def what_serves_is_whole(self) -> None:
        if hasattr(self, "registry"):
            for version in self.history():
                self.registry.manifest("student", version)
            for version in self.history()[-1:]:
                self.registry.fetch("student", version, self.root / "into")

    def history(self) -> list[int]:
        try:
            return [entry.version for entry in self.registry.serving("student").history]
        except NothingServingError:
            return []

    def word(
        self, action: Callable[[], object], crash_after: int | None, *, after: int | None
    ) -> None:
        self.held = {after} if self.attempt(action, crash_after) else {*self.held, after}

    def attempt(self, action: Callable[[], object], crash_after: int | None) -> bool:
        """Whether it went through; a crash stops it before a change."""
        self.handler.left = NEVER if crash_after is None else crash_after
        try:
            action()
            return True
        except CrashError:
            return False
        except VersionNotFoundError:  # decided on, and pruned meanwhile
            return False
        finally:
            self.handler.left = NEVER

    def refused(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RegistryError:
            return
        raise AssertionError("should have been refused")


RegistryMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=20)
TestRegistry = RegistryMachine.TestCase
