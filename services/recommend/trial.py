"""The version that is tried out, beside the one that answers: noticed, loaded, ended live."""

import logging
from dataclasses import dataclass

from services.core.registry import Registry
from services.core.trials import Trial
from services.recommend.engine import Model
from services.recommend.live import load_apart, warm_up
from services.recommend.polling import Attempts, Polling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A trial and its version, loaded."""

    trial: Trial
    model: Model


class LiveTrial:
    """`running` follows the registry's trial; a thread of its own keeps it up to date.

    A version that can't be taken is tried again after a while; meanwhile `running` is None, and all
    answers come from what serves.
    """

    def __init__(self, registry: Registry, *, poll_s: float, exact_items: int) -> None:
        self.running: Running | None = None
        self._registry = registry
        self._exact_items = exact_items
        self._attempts = Attempts()
        self._complaint = ""
        polling = Polling(self.look, poll_s=poll_s, name="live-trial")
        self.start, self.stop = polling.start, polling.stop

    def look(self) -> None:
        """Take over what the registry says is tried out."""
        try:
            trial, running = self._registry.trial("student"), self.running
            if trial is not None and (running is None or trial.version != running.trial.version):
                if not self._attempts.begin(trial):
                    return
                self.running = None
                self.running = Running(trial, self._load(trial.version))
                log.info("student %d is tried out: %s", trial.version, trial.mark)
            else:
                self.running = Running(trial, running.model) if trial and running else None
            self._attempts.succeed()
            self._complaint = ""
        except Exception as error:  # whatever a broken artifact or file system comes up with
            complaint = f"{type(error).__name__}: {error}"
            if complaint != self._complaint:
                tried = f"student {self.running.trial.version}" if self.running else "nothing"
                log.warning("%s is tried out: %s", tried, complaint)
                self._complaint = complaint

    def _load(self, version: int) -> Model:
        model = load_apart(self._registry, version, exact_items=self._exact_items)
        warm_up(model)
        return model
