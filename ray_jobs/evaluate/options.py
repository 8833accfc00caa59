"""What an evaluation is asked for, and what every protocol offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

from ray_jobs import datasets
from ray_jobs.evaluate.events import LogChoice
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Job


@dataclass(frozen=True, kw_only=True)
class Options:
    """`home` and `data`: where data sets are looked for (see `ray_jobs.datasets`). `rows`: only
    these, in this order; empty: the protocol's usual ones."""

    dataset: str
    recipe: str
    seed: int
    out: Path
    home: Path
    data: str = ""
    rows: tuple[str, ...] = ()
    ties: str = "shuffled"  # or "file": events of equal time as the file has them
    noise: str = ""

    @property
    def dataset_name(self) -> str:
        return Path(self.dataset).stem

    def log(self, noise: str) -> LogChoice:
        return LogChoice(
            dataset=self.dataset,
            home=self.home,
            data=self.data,
            ties=self.ties,
            noise=noise,
            seed=self.seed,
            content=datasets.content_of(self.dataset),
        )


class Protocol(Interface):
    """A module under this package."""

    def jobs(self, options: Options) -> Sequence[Job]:
        """The rows wanted and whatever they need."""
        ...

    def report(self, options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
        """Write table and plot under `options.out`; the Markdown."""
        ...
