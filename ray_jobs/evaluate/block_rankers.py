"""Who is ranked by the `blocks` protocol: each learns one block after the other, and is asked for
scores after each.

Who has had nothing gets what is popular. The teacher and the students are the jobs' own code:
`teacher_training.train`, `warm_up`.

Shapes: N events of all training splits, M users asked for, U users, D width, V rows known by then.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.sparse
import torch
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from ray_jobs.evaluate.block_data import Blocks, Ints, Scores, valid_recall
from ray_jobs.evaluate.judging import forward_ms
from ray_jobs.evaluate.results import Cost
from ray_jobs.evaluate.rows import peak_mb
from ray_jobs.evaluate.stream_teachers import took_s
from ray_jobs.evaluate.students import learner, load_teacher
from ray_jobs.recipes import Recipe
from services.core.models.recommender import Recommender

USERS_READ_AT_ONCE: Final = 128

# Tuned on the validation split of the first block (EXPERIMENTS.md); the factors of each block are
# the best on its validation of all these.
FACTORISATIONS: Final[tuple[dict[str, Any], ...]] = (
    {"factors": 128, "regularization": 150.0, "alpha": 40.0},
    {"factors": 128, "regularization": 250.0, "alpha": 40.0},
)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A ranker after a block, and what it has cost so far."""

    scores: Scores
    cost: Cost
    notes: Mapping[str, Any]


class Had:
    """What each user has had in training up to a block."""

    def __init__(self, blocks: Blocks, block: int, *, since: int = 0) -> None:
        at = slice(blocks.ends[since - 1] if since else 0, blocks.ends[block])
        events = blocks.events
        shape = (blocks.n_users, blocks.known_rows(block))
        ones = np.ones(at.stop - at.start, np.float32)
        table = scipy.sparse.csr_matrix((ones, (events.user_N[at], events.row_N[at])), shape=shape)
        table.data[:] = 1.0
        self.table_UV = table
        self.popularity = torch.from_numpy(np.asarray(table.sum(0))[0])

    def finished(self, scores_MV: Tensor, users: Ints) -> Tensor:
        """With popularity for who has had nothing."""
        scores_MV[torch.from_numpy(np.diff(self.table_UV[users].indptr) == 0)] = self.popularity
        return scores_MV


def popularity(blocks: Blocks) -> Iterator[Ranked]:
    """Interactions so far."""
    for block in range(len(blocks)):
        had = Had(blocks, block)

        def scores(users: Ints, had: Had = had) -> Tensor:
            return had.popularity.repeat(len(users), 1)

        yield Ranked(scores=scores, cost=Cost(peak_mb=peak_mb()), notes={})


def factorisation(
    blocks: Blocks, choices: Sequence[Mapping[str, Any]] = FACTORISATIONS
) -> Iterator[Ranked]:
    """Implicit-feedback matrix factorisation (Hu et al. 2008, the library `implicit`), fitted anew
    to each block or to all so far, whichever is better on validation, as are its settings."""
    begin_s = time.monotonic()
    for block in range(len(blocks)):
        found: list[tuple[float, Ranked]] = []
        for since in sorted({0, block}):
            for settings in choices:
                ranked = _factorised(blocks, block, since, settings)
                found.append((_validated(blocks, block, ranked.scores), ranked))
        best = max(found, key=lambda each: each[0])[1]
        yield replace(best, cost=replace(best.cost, train_s=time.monotonic() - begin_s))


def _factorised(blocks: Blocks, block: int, since: int, settings: Mapping[str, Any]) -> Ranked:
    model = AlternatingLeastSquares(**settings, num_threads=1, random_state=0)
    fitted = Had(blocks, block, since=since)
    with threadpool_limits(1):  # one core a row, as everywhere
        model.fit(fitted.table_UV, show_progress=False)
    user_UF, item_VF = map(torch.from_numpy, (model.user_factors, model.item_factors))

    def scores(users: Ints) -> Tensor:
        return fitted.finished(user_UF[torch.from_numpy(users)] @ item_VF.T, users)

    size = user_UF.numel() + item_VF.numel()
    notes = {**settings, "blocks": f"{since}..{block}"}
    return Ranked(scores=scores, cost=Cost(parameters=size, peak_mb=peak_mb()), notes=notes)


def _validated(blocks: Blocks, block: int, scores: Scores) -> float:
    """What `h-mean` looks at: the block's own task and, as much again, all tasks so far."""
    recall_T = [valid_recall(blocks, task, scores) for task in range(block + 1)]
    return (recall_T[-1] + float(np.mean(recall_T))) / 2


def teacher(blocks: Blocks, folder: Path) -> Iterator[Ranked]:
    """Those that `train_along` has left in the folder, one a block."""
    spent_s = 0.0
    for block, end in enumerate(blocks.ends):
        model = load_teacher(folder / str(end))[0]
        spent_s += took_s(folder / str(end))
        yield _ranked(model, blocks, block, train_s=spent_s)


def student(blocks: Blocks, recipe: Recipe, *, folder: Path | None, seed: int) -> Iterator[Ranked]:
    """The job's student, begun anew at every block as the factorisation is: warmed up on all so
    far with the block's teacher. No folder of teachers: hard labels only.

    Without an order nothing tells the old from the new, and a student that lives on from block to
    block is left with less (EXPERIMENTS.md).
    """
    begin_s = time.monotonic()
    for block, end in enumerate(blocks.ends):
        kept = {} if folder is None else {0: folder / str(end)}
        with learner(blocks.events, recipe, kept=kept, seed=seed, first=end, last=end) as learning:
            spent_s = time.monotonic() - begin_s
            yield _ranked(learning.state.student, blocks, block, train_s=spent_s)


def _ranked(model: Recommender, blocks: Blocks, block: int, *, train_s: float) -> Ranked:
    """By all that the users have had so far."""
    had = Had(blocks, block)
    with torch.no_grad():
        table_VD, bias_V = model.encoder.item_table().clone(), model.bias_V.clone()
        hidden_UD = hidden_states(model, had.table_UV)

    def scores(users: Ints) -> Tensor:
        return had.finished(
            torch.addmm(bias_V, hidden_UD[torch.from_numpy(users)], table_VD.T), users
        )

    cost = Cost(
        parameters=model.n_parameters,
        forward_ms=forward_ms(model, context=int(had.table_UV.sum() / len(hidden_UD))),
        train_s=train_s,
        peak_mb=peak_mb(),
    )
    return Ranked(scores=scores, cost=cost, notes={})


@torch.no_grad()
def hidden_states(model: Recommender, had_UV: scipy.sparse.csr_matrix) -> Tensor:
    """hidden_UD from each user's set of items; zeros for who has none."""
    model.eval()
    table_VD = model.encoder.item_table()
    hidden_UD = torch.zeros(had_UV.shape[0], table_VD.shape[1])
    length_U: NDArray[np.int64] = np.diff(had_UV.indptr)
    order = np.argsort(length_U, kind="stable")
    order = order[length_U[order] > 0]
    for begin in range(0, len(order), USERS_READ_AT_ONCE):
        users = order[begin : begin + USERS_READ_AT_ONCE]
        length_M = length_U[users]
        rows_ML = np.zeros((len(users), length_M.max()), np.int64)
        rows_ML[np.arange(length_M.max()) < length_M[:, None]] = had_UV[users].indices
        read_ML = torch.from_numpy(rows_ML)
        ones_ML = (read_ML > 0).long()  # types and gaps, which aren't read, and segments
        hidden_MLD = model(read_ML, ones_ML, ones_ML, ones_ML, table_VD=table_VD)
        last_M = torch.from_numpy(length_M - 1)
        hidden_UD[torch.from_numpy(users)] = hidden_MLD[torch.arange(len(users)), last_M]
    return hidden_UD
