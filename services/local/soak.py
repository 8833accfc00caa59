"""`reflux bench soak`: a stack under a steady light load for long, and what grows meanwhile.

First every user gets a history. Memory is a process's anonymous memory (from Linux), its slope that
of the least-squares line through each minute's least after the warm-up: between two trims of a heap
it goes up and down by a quarter, which is no leak, and a leak lifts the floor with it. Minutes next
to each other are much alike, so the slope's variance counts (1 + r) / (1 - r) times, r being the
residuals' correlation with the next one.
"""

import csv
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.core.events import EVENTS, ITEMS, dead_topic
from services.core.kafka import end_offsets
from services.core.settings import Settings
from services.local import daemon
from services.local.faults import commands
from services.local.load import Producer
from services.local.probe import DEADLINE_S, under_load
from services.local.processes import ray_scratch
from services.local.promises import Promise
from services.local.waiting import wait

READY_S: Final = 600.0
FILL_EVENTS: Final = 100_000  # more than 100 of even the rarest user
FILL_RATE: Final = 500.0  # events per second
FILL_S: Final = 1_200.0  # at most
EVERY_S: Final = 5.0
FLOOR_S: Final = 60.0
WARM_UP_SHARE: Final = 0.25
MIN_SHARE: Final = 0.5  # of the samples: a process that came or went meanwhile has no slope
LEAK_MB_PER_HOUR: Final = 6.0  # surely more than this is a leak
BROKER: Final = "tansu"  # keeps the log in memory, and grows with it
FOLDERS: Final = ("offline", "registry", "checkpoints", "redis", "logs")
OF_RAY: Final = "ray's session"

_Sizes = tuple[dict[str, float], dict[str, float]]  # folders in MB, topics in records


@dataclass(frozen=True, kw_only=True)
class Slope:
    """How a process's memory went after the warm-up, with the 95% interval."""

    process: str
    first_mb: float
    last_mb: float
    mb_per_hour: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """What a run has seen. Folders in MB and topics in records: after the warm-up, at the end."""

    slopes: list[Slope]
    folders: dict[str, tuple[float, float]]
    topics: dict[str, tuple[float, float]]
    acknowledged: int
    answered: int
    late: int  # requests without an answer in time

    def promises(self) -> list[Promise]:
        leaks = [one for one in self.slopes if BROKER not in one.process]
        worst = max(leaks, key=lambda one: one.low, default=None)
        dead = [self.topics[dead_topic(topic)] for topic in (EVENTS, ITEMS)]
        return [
            Promise(
                name=f"no process surely grows by more than {LEAK_MB_PER_HOUR:g} MB an hour",
                kept=worst is not None and worst.low <= LEAK_MB_PER_HOUR,
                found="none was there" if worst is None else f"{worst.process}: {worst.low:+.1f}",
            ),
            Promise(
                name="no dead letters",
                kept=all(before == after for before, after in dead),
                found=str(dead),
            ),
        ]


class Soak:
    """One run, on a stack that it starts and stops."""

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        rate: float,
        minutes: float,
        report: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._seed, self._rate, self._whole_s = seed, rate, 60 * minutes
        self._report = report

    def run(self) -> Soaked:
        with daemon.running(self._settings, report=self._report) as settings:
            return self._soak(settings)

    def _soak(self, settings: Settings) -> Soaked:
        load = under_load(settings, seed=self._seed, rate=self._rate, ready_s=READY_S)
        with load as (producer, asker, _):
            self._fill(producer)
            self._report(f"{self._whole_s / 60:g} minutes")
            slopes, before, after = self._watch(settings)
        late = sum(not one.good(DEADLINE_S) for one in asker.asked)
        folders, topics = (
            {name: (one.get(name, 0.0), other[name]) for name in other}
            for one, other in zip(before, after, strict=True)
        )
        return Soaked(
            slopes=slopes,
            folders=folders,
            topics=topics,
            acknowledged=len(producer.acknowledged),
            answered=len(asker.asked) - late,
            late=late,
        )

    def _fill(self, producer: Producer) -> None:
        """Give every user a history as long as what is learned from.

        While histories grow, so do features, micro-batches and labels, which is no leak: at the
        steady rate a rare user's would for most of a usual run.
        """
        producer.rate = FILL_RATE
        what = f"{FILL_EVENTS:,} events"
        self._report(f"{what} first")
        wait(what, lambda: len(producer.acknowledged) >= FILL_EVENTS, give_up_s=FILL_S)
        producer.rate = self._rate

    def _watch(self, settings: Settings) -> tuple[list[Slope], _Sizes, _Sizes]:
        """Slopes, steepest first, and the sizes after the warm-up and at the end."""
        began_s = time.monotonic()
        samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
        n, before = 0, None
        while (now_s := time.monotonic() - began_s) < self._whole_s:
            if now_s >= WARM_UP_SHARE * self._whole_s:
                before = before or _sizes(settings)
                n += 1
                for name, mb in _memory(settings).items():
                    samples[name].append((now_s, mb))
            time.sleep(EVERY_S)
        _write(samples, settings.home / "memory.csv")
        slopes = [slope(name, seen) for name, seen in samples.items() if len(seen) > MIN_SHARE * n]
        slopes.sort(key=lambda one: -one.mb_per_hour)
        return slopes, before or ({}, {}), _sizes(settings)


def _write(samples: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """For a look of one's own."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("process", "second", "mb"))
        for process, seen in samples.items():
            rows.writerows((process, round(at_s), round(mb, 2)) for at_s, mb in seen)


def slope(process: str, samples: Sequence[tuple[float, float]]) -> Slope:
    """The line through the floor of samples of (seconds, MB). Pure."""
    at_s, mb = _floor(samples).T
    hours = at_s / 3600 - np.mean(at_s / 3600)
    spread = float(np.sum(hours**2))
    rise = float(np.sum(hours * mb)) / spread
    left = mb - mb.mean() - rise * hours
    power = float(np.sum(left**2))
    r = float(np.sum(left[1:] * left[:-1])) / power if power > 0 else 0.0
    r = min(max(r, 0.0), 0.99)
    variance = power / max(1, len(mb) - 2) / spread * (1 + r) / (1 - r)
    error = 1.96 * float(np.sqrt(variance))
    return Slope(
        process=process,
        first_mb=float(mb[0]),
        last_mb=float(mb[-1]),
        mb_per_hour=rise,
        low=rise - error,
        high=rise + error,
    )


def _floor(samples: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Each `FLOOR_S`' least sample."""
    spans = groupby(samples, key=lambda sample: sample[0] // FLOOR_S)
    return np.array([min(span, key=lambda sample: sample[1]) for _, span in spans])


def _sizes(settings: Settings) -> _Sizes:
    home = settings.home.absolute()
    folders = {name: home / name for name in FOLDERS}
    folders[OF_RAY] = ray_scratch(int(settings.ray_address.rpartition(":")[2])) / "session_latest"
    topics = [name for topic in (EVENTS, ITEMS) for name in (topic, dead_topic(topic))]
    return (
        {name: _megabytes(path) for name, path in folders.items()},
        {name: float(sum(end_offsets(settings, name).values())) for name in topics},
    )


def _megabytes(folder: Path) -> float:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # gone meanwhile
                total += (Path(base) / name).lstat().st_size
    return total / 2**20


def _memory(settings: Settings) -> Mapping[str, float]:
    found = {}
    for process, command in commands(settings):
        with suppress(OSError):  # gone meanwhile
            found[f"{_short(command)} {process.pid}"] = _anonymous_mb(process.pid)
    return found


def _anonymous_mb(pid: int) -> float:
    """What a process has written itself, in memory or swapped out.

    Not what counts as its own otherwise: a library's pages, and those from before a fork, do as
    soon as nobody else has them, 20 MB at once where some other process ends.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = (line.split() for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
    return sum(int(kb) for _, kb, _ in sizes) / 1024


def _short(command: str) -> str:
    words = command.split()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return Path((scripts or words or [""])[0]).name[:40]


def show(soaked: Soaked) -> None:
    from rich.console import Console
    from rich.table import Table

    memory = Table("process", "MB after warm-up", "at the end", "MB/hour", "95%", box=None)
    for one in soaked.slopes:
        memory.add_row(
            one.process,
            *(f"{one.first_mb:.0f}", f"{one.last_mb:.0f}", f"{one.mb_per_hour:+.1f}"),
            f"{one.low:+.1f} .. {one.high:+.1f}",
        )
    sizes = Table("folder, MB; topic, records", "after warm-up", "at the end", box=None)
    for sized, form in ((soaked.folders, ",.1f"), (soaked.topics, ",.0f")):
        for name, (before, after) in sized.items():
            sizes.add_row(name, format(before, form), format(after, form))
    console = Console()
    console.print(memory)
    console.print(sizes)
    console.print(
        f"{soaked.acknowledged:,} events acknowledged, {soaked.answered:,} requests answered, "
        f"{soaked.late:,} not in time"
    )
