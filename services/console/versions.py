"""Published versions as the page shows them, read from the registry once each."""

from collections.abc import Mapping
from typing import Any, Final, get_args

from services.console.store import KEPT_VERSIONS
from services.core.errors import RegistryError
from services.core.registry import Kind, Registry

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
ROLLING_EVENTS: Final = 10_000  # one version's few hundred events are mostly noise
SHOWN: Final = (
    *("window.student.ndcg@10", "window.teacher.ndcg@10"),
    *("slice.teacher.ndcg@10", "slice.parent.ndcg@10"),
)

Row = dict[str, Any]


class Versions:
    """Follows the registry. `rows` by (kind, version), newest last; of many pruned ones, too."""

    def __init__(self, registry: Registry, known: list[Row]) -> None:
        self._registry = registry
        self.rows: dict[tuple[str, int], Row] = {(r["kind"], r["version"]): r for r in known}
        self.serving: dict[str, dict[str, Any]] = {}
        self._windows: list[tuple[float, Mapping[str, float]]] = []  # events, NDCG by model
        self._caught_up = False  # `_windows` knows the registry's newest

    def refresh(self) -> tuple[list[Row], bool]:
        """What is new, oldest first, and whether anything else serves."""
        fresh: list[Row] = []
        for kind in KINDS:
            there = self._registry.versions(kind)
            if max(self._known(kind), default=0) > max(there, default=0):
                self._forget(kind)  # a registry that was begun anew
            for version in there:
                if (kind, version) in self.rows and (kind == "teacher" or self._caught_up):
                    continue
                try:
                    manifest = self._registry.manifest(kind, version)
                except RegistryError:  # pruned meanwhile, or broken: others say so
                    continue
                if kind == "student":
                    self._take_window(manifest.get("metrics", {}))
                if (kind, version) not in self.rows:
                    row = self.rows[kind, version] = _row(manifest)
                    fresh.append(row)
            for version in self._known(kind)[:-KEPT_VERSIONS]:
                if version not in there:  # else it would be read anew at each look
                    del self.rows[kind, version]
        self._caught_up = True
        serving: dict[str, dict[str, Any]] = {
            kind: found for kind in KINDS if (found := self._serves(kind))
        }
        changed, self.serving = serving != self.serving, serving
        return sorted(fresh, key=lambda row: row["created_ms"]), changed

    def quality(self) -> dict[str, float]:
        """NDCG@10 by model over the newest `ROLLING_EVENTS` or so of the stream."""
        sums: dict[str, list[float]] = {}
        for events, ndcg in self._windows:
            for model, value in ndcg.items():
                total = sums.setdefault(model, [0.0, 0.0])
                total[0] += events * value
                total[1] += events
        return {model: total / events for model, (total, events) in sums.items()}

    def latest(self, kind: Kind) -> int | None:
        """The newest version; None before the first."""
        return max(self._known(kind), default=None)

    def newest(self, kind: str, n: int) -> list[Row]:
        """The newest `n`, oldest first."""
        return [row for (of_kind, _), row in self.rows.items() if of_kind == kind][-n:]

    def _known(self, kind: Kind) -> list[int]:
        return [version for of_kind, version in self.rows if of_kind == kind]

    def _forget(self, kind: Kind) -> None:
        self.rows = {key: row for key, row in self.rows.items() if key[0] != kind}
        if kind == "student":
            self._windows, self._caught_up = [], False

    def _take_window(self, metrics: Mapping[str, float]) -> None:
        events = metrics.get("window.events", 0)
        if events:
            self._windows.append((events, _of_models(metrics, "window")))
        while sum(n for n, _ in self._windows[1:]) >= ROLLING_EVENTS:
            self._windows.pop(0)

    def _serves(self, kind: Kind) -> dict[str, Any] | None:
        try:
            found = self._registry.serving(kind)
        except RegistryError:
            return None
        history = [
            {"version": one.version, "promoted_ms": one.promoted_ms, "reason": one.reason}
            for one in found.history
        ]
        return {"version": found.version, "held": found.held, "history": history}


def _of_models(metrics: Mapping[str, float], span: str) -> dict[str, float]:
    """NDCG@10 by model: `window.student.ndcg@10` is `student`'s."""
    return {
        name.split(".")[1]: value
        for name, value in metrics.items()
        if name.startswith(f"{span}.") and name.endswith(".ndcg@10")
    }


def _row(manifest: Mapping[str, Any]) -> Row:
    gate, metrics = manifest.get("gate") or {}, manifest.get("metrics", {})
    return {
        "kind": manifest["kind"],
        "version": manifest["version"],
        "created_ms": manifest["created_ms"],
        "parent": manifest.get("parent"),
        "teacher": manifest.get("teacher_version"),
        "promoted": bool(gate.get("promoted")),
        "reason": gate.get("reason", ""),
        "events": metrics.get("window.events") or metrics.get("slice.events"),
        **{name: metrics[name] for name in SHOWN if name in metrics},
    }
