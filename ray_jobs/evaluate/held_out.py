"""One frozen teacher against events held out of its training: what `successive` and `leave_one_out`
share. They differ in which events those are.

Shapes: N events of the log, M of them at a time, H held out, D width, V catalog rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ray_jobs import recipes
from ray_jobs.evaluate import events, table
from ray_jobs.evaluate.events import Events, LogChoice
from ray_jobs.evaluate.judging import Past, Scores, Trending, forward_ms, walk
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Bootstrap, Cost, Outcome
from ray_jobs.evaluate.rows import Job, Say, peak_mb
from ray_jobs.recipes import TrainConfig
from ray_jobs.teacher_data import history_of
from ray_jobs.teacher_training import Trained, train
from services.core.catalog import TRENDING_HALF_LIFE_EVENTS
from services.core.models.sequences import sequences_of
from services.core.models.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a row depends on. split: `successive` or `leave-one-out`. recipe: its contents, too,
    so that a changed one is run again."""

    log: LogChoice
    split: str
    recipe: recipes.Recipe
    checkpoints: str


def jobs(options: Options, split: str) -> list[Job]:
    """A job for each row: the teacher, and what trends."""
    log = options.log(options.noise)
    given = Given(
        log=log,
        split=split,
        recipe=recipes.load(options.recipe),
        checkpoints=str(options.out / "checkpoints"),
    )
    found = [
        Job(name="popularity", run=_popularity, given=given, rows=("popularity",)),
        Job(name="teacher", run=_teacher, given=given, rows=("teacher",), cpus=0),
    ]
    return [job for job in found if not options.rows or job.name in options.rows]


def report(options: Options, outcomes: Mapping[str, Outcome], command: str, *, title: str) -> str:
    """Write table and plot."""
    lines = table.quality_lines(outcomes, Bootstrap(outcomes))
    table.plot_bars(lines, options.out / "plot.png", metric="ndcg@10", title=title)
    return table.write(lines, options.out / "table", title=title, command=command)


def split_of(given: Given) -> tuple[Events, int]:
    """The events, those held out behind all others, and where they begin."""
    log = events.load(given.log)
    if given.split == "successive":
        return log, int(np.searchsorted(log.time_ms_N, np.quantile(log.time_ms_N, 0.9), "right"))
    last_N = np.zeros(len(log), bool)
    last_N[len(log) - 1 - np.unique(log.user_N[::-1], return_index=True)[1]] = True
    order = np.argsort(last_N, kind="stable")
    columns = ("user_N", "row_N", "type_N", "value_N", "time_ms_N", "real_N")
    log = replace(log, **{name: getattr(log, name)[order] for name in columns})
    return log, int((~last_N).sum())


def _popularity(given: Given, say: Say) -> dict[str, Outcome]:
    log, first = split_of(given)
    past = Past(log.user_N, log.row_N)
    ranker = Trending(log, first, half_life_events=TRENDING_HALF_LIFE_EVENTS)
    return {"popularity": walk(ranker, log, past, first=first, last=len(log), say=say)}


def _teacher(given: Given, say: Say) -> dict[str, Outcome]:
    log, first = split_of(given)
    limits = given.recipe.train
    say(
        0.0,
        f"training on {first:,} events: {limits.max_epochs} epochs or {limits.max_train_s:.0f} s",
    )
    trained = trained_on(log, first, given)
    model = trained.model.to(device_of(given.recipe.train))
    say(0.95, f"ranking {len(log) - first:,} events")
    outcome = walk(
        Frozen(model, log, first),
        log,
        Past(log.user_N, log.row_N),
        first=first,
        last=len(log),
        say=lambda done, words: say(0.95 + 0.05 * done, words),
    )
    cost = Cost(
        parameters=model.n_parameters,
        forward_ms=forward_ms(model, context=2 * model.config.max_len),
        train_s=trained.metrics["elapsed_s"],
        peak_mb=peak_mb(),
    )
    notes = {name: trained.metrics[name] for name in ("step", "loss")}
    return {"teacher": replace(outcome, cost=cost, notes=notes)}


def trained_on(log: Events, first: int, given: Given) -> Trained:
    """A teacher of the first events, all of them learned from the start."""
    catalog = log.catalog(len(log))
    history = history_of(
        log.interactions(first),
        catalog=catalog,
        n_shards=given.recipe.train.n_shards,
        last_slice=0.0,
    )
    return train(
        given.recipe, history, parent=None, seed=given.log.seed, checkpoints=given.checkpoints
    )


def device_of(train: TrainConfig) -> str:
    """Where a teacher is judged: where it was trained."""
    return "cuda" if train.use_gpu else "cpu"


class Frozen:
    """A ranker of the events from `first` on, each from all its user had before it.

    A user's events are read once; of what lies before `first`, as much as two layers see.
    """

    def __init__(self, model: Teacher, log: Events, first: int) -> None:
        self._model, self._first = model.eval(), first
        self._device = model.bias_V.device
        with torch.no_grad():
            self.table_VD = model.encoder.item_table()
            self._hidden_HD = self._read(log)

    @torch.no_grad()
    def step(self, at: slice) -> Scores:
        scores_MV = self._model.scores(self.hidden(at), table_VD=self.table_VD)
        scores: Scores = scores_MV.cpu().numpy()
        return scores

    def hidden(self, at: slice) -> Tensor:
        """hidden_MD that predict the events there; zeros where a user had none before."""
        return self._hidden_HD[at.start - self._first : at.stop - self._first]

    def _read(self, log: Events) -> Tensor:
        order_N = np.argsort(log.user_N, kind="stable")
        sequences = sequences_of(
            log.user_N, log.row_N, log.type_N.tolist(), log.time_ms_N, log.value_N
        )
        hidden_HD = self.table_VD.new_zeros(len(log) - self._first, self.table_VD.shape[1])
        for start, end in pairwise(sequences.starts):
            # Held-out events are their user's last; the first of all has nothing before it.
            begin = max(start + int(np.searchsorted(order_N[start:end], self._first)), start + 1)
            if begin < end:
                seen = slice(max(start, begin - 2 * self._model.config.max_len), end - 1)
                features = [
                    torch.from_numpy(c[None, seen]).to(self._device) for c in sequences.features
                ]
                hidden_LD = self._model(*features, table_VD=self.table_VD)[0]
                held = torch.from_numpy(order_N[begin:end] - self._first).to(self._device)
                hidden_HD[held] = hidden_LD[begin - end :]
        return hidden_HD
