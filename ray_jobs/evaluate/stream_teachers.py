"""The teachers of a stream: the first trained on its first half, the others refreshed along it.

Kept by what they depend on, so that every row and every ablation of one log shares them.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_jobs import recipes
from ray_jobs.evaluate.baselines import Refreshed
from ray_jobs.evaluate.events import Events, LogChoice, load
from ray_jobs.evaluate.held_out import Frozen, device_of
from ray_jobs.evaluate.judging import STEP_EVENTS, Past, Scores, forward_ms, walk
from ray_jobs.evaluate.results import Cost, Outcome
from ray_jobs.evaluate.rows import Say, digest, peak_mb
from ray_jobs.evaluate.students import CATALOG, load_teacher, save_teacher
from ray_jobs.labels import aligned
from ray_jobs.recipes import Recipe, TrainConfig
from ray_jobs.teacher_data import history_of
from ray_jobs.teacher_training import train
from services.core import losses
from services.core.models.sizes import EncoderConfig
from services.core.models.teacher import Teacher

COST = "cost.json"
ADAPTER_RATE = 1e-3  # Adam's; chosen beforehand, not on any event of the stream


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What the teachers depend on, and `home`, where they are kept. The first is fitted at the
    half of the log, `fits` of them in all, at equal distances."""

    log: LogChoice
    recipe: str
    teacher: EncoderConfig
    train: TrainConfig
    fits: int
    home: Path

    def places(self, events: Events) -> list[int]:
        """How many events each has learned."""
        every = fit_every(events, self.fits)
        return [events.half + fit * every for fit in range(self.fits)]

    @property
    def folder(self) -> Path:
        return folder_of(self, self.home)


def folder_of(depends: Any, home: Path) -> Path:
    """Under `home`, named by all that a dataclass of plain values holds besides it."""
    return home / digest("", replace(depends, home=Path()))


def fit_every(events: Events, fits: int) -> int:
    """Events of the stream between two fits."""
    return -(-(len(events) - events.half) // fits)


def train_chain(chain: Chain, say: Say) -> dict[str, Outcome]:
    """Train those that aren't kept yet, each from the one before."""
    events = load(chain.log)
    recipe = replace(recipes.load(chain.recipe), teacher=chain.teacher, train=chain.train)
    train_along(events, chain.places(events), recipe, chain.folder, seed=chain.log.seed, say=say)
    return {}


def train_along(
    events: Events, places: Sequence[int], recipe: Recipe, folder: Path, *, seed: int, say: Say
) -> None:
    """A teacher of all before each place, under that name in the folder, each refreshed from the
    one before; those that are there already aren't trained again."""
    parent, learned = None, 0
    for fit, until in enumerate(places):
        say(fit / len(places), f"{'refreshing' if fit else 'training'} on {until:,} events")
        directory = folder / str(until)
        if not (directory / CATALOG).exists():
            history = history_of(
                events.interactions(until),
                catalog=events.catalog(until),
                n_shards=recipe.train.n_shards,
                last_slice=recipe.train.last_slice,
                unseen_E=np.arange(until) >= learned,
            )
            trained = train(
                recipe,
                history,
                parent=parent,
                seed=seed,
                checkpoints=str(folder / "checkpoints"),
            )
            directory.mkdir(parents=True, exist_ok=True)
            took = {name: trained.metrics[name] for name in ("elapsed_s", "step")}
            (directory / COST).write_text(json.dumps(took))
            save_teacher(trained.model, history.catalog, directory)
        parent, learned = load_teacher(directory)[0], until


def took_s(directory: Path) -> float:
    """Seconds that a kept teacher was trained."""
    return float(json.loads((directory / COST).read_text())["elapsed_s"])


def kept_teachers(chain: Chain, events: Events) -> dict[int, Path]:
    """By place, once `train_chain` has run."""
    return {until: chain.folder / str(until) for until in chain.places(events)}


class Recalibrated:
    """A frozen teacher behind a small adapter that learns every event at once, from what happened:
    hidden + hidden W, and a bias for each row."""

    def __init__(self, model: Teacher, events: Events, past: Past, first: int) -> None:
        self._frozen = Frozen(model, events, first)
        self._events, self._past = events, past
        self._bias_V = torch.nn.Parameter(model.bias_V.detach().clone())
        dim = model.config.dim
        self._turn_DD = torch.nn.Parameter(torch.zeros(dim, dim, device=self._bias_V.device))
        self._optimizer = torch.optim.AdamW([self._turn_DD, self._bias_V], lr=ADAPTER_RATE)

    def step(self, at: slice) -> Scores:
        table_VD, hidden_MD = self._frozen.table_VD, self._frozen.hidden(at)
        moved_MD = hidden_MD + hidden_MD @ self._turn_DD
        scores: Scores = torch.addmm(self._bias_V, moved_MD, table_VD.T).detach().cpu().numpy()
        lasts = [self._past.of(event) for event in range(at.start, at.stop)]
        seen_ML = np.zeros((len(lasts), max(map(len, lasts)) + 1), np.int64)
        for place, rows in enumerate(lasts):
            seen_ML[place, : len(rows)] = rows
        target_M = torch.from_numpy(self._events.row_N[at]).to(moved_MD.device)
        weight_M = torch.from_numpy(self._past.place_N[at] > 0).to(moved_MD)
        loss = losses.full_softmax(
            moved_MD,
            table_VD,
            self._bias_V,
            target_M,
            weight_M,
            seen_NL=torch.from_numpy(seen_ML).to(moved_MD.device),
        )
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return scores


def judge_recalibrated(chain: Chain, events: Events, *, say: Say) -> Outcome:
    """The first teacher's ranks of all events, `Recalibrated`."""
    first = events.half
    catalog = events.catalog(len(events))
    ids = catalog.ids(range(1, len(catalog)))
    model = aligned(
        *load_teacher(kept_teachers(chain, events)[first]), item_ids=ids, content=catalog.content
    )
    past = Past(events.user_N, events.row_N)
    begin_s = time.monotonic()
    ranker = Recalibrated(model.to(device_of(chain.train)), events, past, first)
    outcome = walk(ranker, events, past, first=first, last=len(events), say=say)
    cost = Cost(
        parameters=model.n_parameters + model.config.dim**2,
        train_s=time.monotonic() - begin_s,
        peak_mb=peak_mb(),
    )
    return replace(outcome, cost=cost)


def judge_chain(chain: Chain, events: Events, *, stale: bool, say: Say) -> Outcome:
    """The teachers' ranks, each of the events until the next one; `stale`: the first one's of all.

    They read as much of each user's past as two of their layers reach.
    """
    kept = kept_teachers(chain, events)
    first, every = events.half, fit_every(events, chain.fits)
    catalog = events.catalog(len(events))
    ids = catalog.ids(range(1, len(catalog)))

    def fit(at: int) -> Callable[[slice], Scores]:
        teacher, own = load_teacher(kept[first if stale else max(p for p in kept if p <= at)])
        model = aligned(teacher, own, item_ids=ids, content=catalog.content)
        model.to(device_of(chain.train))
        segment = events.until(at + every + STEP_EVENTS)  # steps don't end where fits are due
        return Frozen(model, segment, at).step

    outcome = walk(
        Refreshed(fit, first=first, every=every),
        events,
        Past(events.user_N, events.row_N),
        first=first,
        last=len(events),
        say=say,
    )
    teacher, _ = load_teacher(kept[first])
    took = [json.loads((kept[place] / COST).read_text()) for place in kept]
    cost = Cost(
        parameters=teacher.n_parameters,
        forward_ms=forward_ms(teacher, context=2 * teacher.config.max_len),
        train_s=sum(each["elapsed_s"] for each in took[: 1 if stale else None]),
        peak_mb=peak_mb(),
    )
    return replace(outcome, cost=cost, notes={"fits": took})
