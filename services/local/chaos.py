"""`reflux bench chaos`: a stack under load, one thing broken after another, and an audit.

Everything happens in a home of its own. Seeded: the load, the order of the faults and the pauses
between them are the same in every run with the same seed.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import psutil

from services.core.errors import RefluxError
from services.core.settings import Settings
from services.local import daemon
from services.local.audit import answered, audit_state
from services.local.disks import SmallDisk
from services.local.faults import Fault, World
from services.local.load import Asker, Producer
from services.local.probe import DEADLINE_S, Probe, settled, under_load
from services.local.promises import Promise
from services.local.waiting import wait

ANSWERED_SHARE: Final = 0.999
BACK_WITHIN_S: Final = 15.0
GIVE_UP_S: Final = 180.0  # on a fault's recovery, on the first student, on catching up
PAUSE_S: Final = (3.0, 6.0)  # between a recovery and the next fault


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault did. `back_s` is counted from its end; None: not within `GIVE_UP_S`."""

    fault: Fault
    began_s: float  # monotonic
    ended_s: float
    back_s: float | None
    failed_requests: int = 0
    refused_batches: int = 0
    verdict: Promise | None = None

    @property
    def window(self) -> tuple[float, float]:
        """From shortly before the fault, for what was on its way, until all was well again."""
        back_s = GIVE_UP_S if self.back_s is None else self.back_s
        return self.began_s - DEADLINE_S, self.ended_s + back_s

    @property
    def in_time(self) -> Promise:
        back_s = self.back_s
        return Promise(
            name=f"{self.fault.name}: back within {BACK_WITHIN_S:g} s",
            kept=back_s is not None and back_s <= BACK_WITHIN_S,
            found="never" if back_s is None else f"{back_s:.1f} s",
        )


class Chaos:
    """One run, on a stack that it starts and stops."""

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        rate: float,
        faults: Sequence[Fault],
        report: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._random = random.Random(seed)
        self._seed, self._rate, self._faults, self._report = seed, rate, list(faults), report
        home = settings.home.absolute()
        self._disks = {name: SmallDisk(home / name) for name in ("registry", "offline")}

    def run(self) -> tuple[list[Outcome], list[Promise]]:
        """Start, break, audit, stop."""
        disks = [d for name, d in self._disks.items() if any(name in f.name for f in self._faults)]
        for disk in disks:
            disk.mount()
        try:
            with daemon.running(self._settings, report=self._report) as settings:
                return self._under_load(settings)
        finally:
            for disk in disks:
                disk.unmount()

    def _under_load(self, settings: Settings) -> tuple[list[Outcome], list[Promise]]:
        load = under_load(settings, seed=self._seed, rate=self._rate, ready_s=GIVE_UP_S)
        with load as (producer, asker, probe):
            world = World(settings=settings, producer=producer, disks=self._disks)
            outcomes = [self._break(fault, world, probe) for fault in self._order()]
        self._report("auditing")
        quiet = self._comes_to_rest(settings)
        outcomes = [_told(one, asker, producer) for one in outcomes]
        forgot = [one.window for one in outcomes if one.fault.forgets]
        proxyless = [one.window for one in outcomes if one.fault.single_proxy]
        return outcomes, [
            quiet,
            *audit_state(settings, producer.acknowledged, lost_windows=forgot),
            answered(asker.asked, deadline_s=DEADLINE_S, share=ANSWERED_SHARE, excused=proxyless),
            *(one.verdict for one in outcomes if one.verdict),
            *(one.in_time for one in outcomes),
        ]

    def _comes_to_rest(self, settings: Settings) -> Promise:
        began_s = time.monotonic()
        name = "everything read and learned in the end"
        try:
            wait(name, lambda: settled(settings), give_up_s=GIVE_UP_S)
        except RefluxError as error:
            return Promise(name=name, kept=False, found=str(error))
        return Promise(name=name, kept=True, found=f"after {time.monotonic() - began_s:.0f} s")

    def _order(self) -> list[Fault]:
        """Shuffled, the broker last: what is lost with it must not hide another fault's loss."""
        faults = [fault for fault in self._faults if not fault.forgets]
        self._random.shuffle(faults)
        return [*faults, *(fault for fault in self._faults if fault.forgets)]

    def _break(self, fault: Fault, world: World, probe: Probe) -> Outcome:
        time.sleep(self._random.uniform(*PAUSE_S))
        began_s = time.monotonic()
        try:
            struck = fault.begin(world)
        except (RefluxError, psutil.Error, OSError, RuntimeError) as error:
            self._report(f"{fault.name}: could not be done ({error})")
            return Outcome(fault=fault, began_s=began_s, ended_s=began_s, back_s=None)
        self._report(f"{fault.name}: {struck.told}")
        time.sleep(fault.hold_s)
        since = probe.since()
        struck.end()
        ended_s = time.monotonic()
        missing = set(fault.concerns)

        def back() -> bool:
            missing.difference_update([one for one in missing if probe.works(one, since)])
            return not missing and struck.back()

        back_s: float | None = None
        try:
            wait(f"{fault.name}: back", back, give_up_s=GIVE_UP_S)
            back_s = time.monotonic() - ended_s
            self._report(f"back after {back_s:.1f} s")
        except RefluxError as error:
            self._report(f"{error}; missing: {', '.join(sorted(missing)) or 'the process'}")
        verdict = struck.finish() if struck.finish else None
        return Outcome(
            fault=fault, began_s=began_s, ended_s=ended_s, back_s=back_s, verdict=verdict
        )


def show(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    faults = Table("fault", "back after", "requests failed", "batches refused", box=None)
    for one in outcomes:
        back = "never" if one.back_s is None else f"{one.back_s:.1f} s"
        faults.add_row(one.fault.name, back, str(one.failed_requests), str(one.refused_batches))
    Console().print(faults)


def _told(outcome: Outcome, asker: Asker, producer: Producer) -> Outcome:
    """With the requests that failed and the batches that were refused meanwhile."""
    begin, end = outcome.window
    failed = [one for one in asker.asked if not one.good(DEADLINE_S) and begin <= one.at_s <= end]
    refused = [one for one in producer.refused if begin <= one.at_s <= end]
    return replace(outcome, failed_requests=len(failed), refused_batches=len(refused))
