"""The `blocks` protocol: data that comes in blocks, without an order inside them; each block is
learned, then looked at again together with all before it.

The six Yelp blocks and the rules of CCD (Lee et al., KDD 2024; see `block_data`). Of Recall@20 on
the test splits: LA, how well each block was learned; RA, what is retained of all; their H-mean.

    reflux evaluate --protocol blocks --dataset PATH --recipe blocks_cpu
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ray_jobs import recipes
from ray_jobs.evaluate import block_rankers, table
from ray_jobs.evaluate.block_data import (
    Blocks,
    averages,
    load,
    parts,
    ranks,
    recalls,
    valid_recall,
)
from ray_jobs.evaluate.block_rankers import FACTORISATIONS, Ranked
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import LEVEL, SAMPLES, Outcome
from ray_jobs.evaluate.rows import Job, Say
from ray_jobs.evaluate.stream_teachers import folder_of, train_along
from ray_jobs.recipes import Recipe, TrainConfig
from services.core.models.sizes import EncoderConfig

TEACHERS: Final = "teachers"  # the job that trains them, without a row of its own
ROWS: Final = ("popularity", "factorisation", "teacher", "hard", "distilled")


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """What the teachers depend on, and `home`, where they are kept."""

    dataset: str
    seed: int
    recipe: str
    teacher: EncoderConfig
    train: TrainConfig
    home: Path

    @property
    def folder(self) -> Path:
        return folder_of(self, self.home)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a row depends on."""

    dataset: str
    seed: int
    ranker: str
    settings: tuple[Mapping[str, Any], ...] = ()  # of the factorisation
    teachers: Teachers | None = None  # of a row that has met one
    recipe: Recipe | None = None  # of a student


def jobs(options: Options) -> list[Job]:
    """The rows asked for, all by default."""
    rows = options.rows or ROWS
    if unknown := [row for row in rows if row not in ROWS]:
        raise ValueError(f"--rows {','.join(unknown)}: choose of {', '.join(ROWS)}")
    recipe = recipes.load(options.recipe)
    if recipe.teacher.ordered or recipe.student.ordered:
        raise ValueError(f"--recipe {recipe.name} reads an order, blocks have none: blocks_cpu")
    given = Given(dataset=str(Path(options.dataset).absolute()), seed=options.seed, ranker="")
    teachers = Teachers(
        dataset=given.dataset,
        seed=options.seed,
        recipe=recipe.name,
        teacher=recipe.teacher,
        train=recipe.train,
        home=options.out / TEACHERS,
    )
    changes: dict[str, dict[str, Any]] = {
        "popularity": {},
        "factorisation": {"settings": FACTORISATIONS},
        "teacher": {"teachers": teachers},
        "hard": {"recipe": recipe},
        "distilled": {"recipe": recipe, "teachers": teachers},
    }
    found = [Job(name=TEACHERS, run=_train, given=teachers, rows=(), cpus=0)]
    for row in rows:
        needs = (TEACHERS,) if "teachers" in changes[row] else ()
        row_given = replace(given, ranker=row, **changes[row])
        found.append(Job(name=row, run=_row, given=row_given, rows=(row,), needs=needs))
    return found


def _train(given: Teachers, say: Say) -> dict[str, Outcome]:
    blocks = load(given.dataset, seed=given.seed)
    recipe = replace(recipes.load(given.recipe), teacher=given.teacher, train=given.train)
    train_along(blocks.events, blocks.ends, recipe, given.folder, seed=given.seed, say=say)
    return {}


def _row(given: Given, say: Say) -> dict[str, Outcome]:
    blocks = load(given.dataset, seed=given.seed)
    return {given.ranker: judged(_ranker(given, blocks), blocks, say=say)}


def _ranker(given: Given, blocks: Blocks) -> Iterator[Ranked]:
    if given.ranker == "popularity":
        return block_rankers.popularity(blocks)
    if given.ranker == "factorisation":
        return block_rankers.factorisation(blocks, given.settings)
    folder = given.teachers.folder if given.teachers else None
    if given.recipe is not None:
        return block_rankers.student(blocks, given.recipe, folder=folder, seed=given.seed)
    assert folder is not None
    return block_rankers.teacher(blocks, folder)


def judged(ranker: Iterator[Ranked], blocks: Blocks, *, say: Say) -> Outcome:
    """After each block the ranks of the test pairs of all blocks so far.

    An event is a test pair's place among those of all blocks, its part the place in `parts`.
    """
    held = blocks.splits["test"]
    begins = np.cumsum([0, *(len(pairs) for pairs in held)])
    event, user, rank, part, valid, notes = [], [], [], [], [], []
    n_parts = 0
    for block in range(len(blocks)):
        say(block / len(blocks), f"block {block}")
        ranked = next(ranker)
        valid.append(valid_recall(blocks, block, ranked.scores))
        notes.append(dict(ranked.notes))
        for task in range(block + 1):
            rank.append(ranks(blocks, task, ranked.scores))
            event.append(np.arange(begins[task], begins[task + 1]))
            user.append(held[task].user_M)
            part.append(np.full(len(held[task]), n_parts))
            n_parts += 1
    return Outcome(
        event_N=np.concatenate(event),
        user_N=np.concatenate(user),
        rank_N=np.concatenate(rank),
        part_N=np.concatenate(part),
        cost=ranked.cost,
        notes={"valid": valid, "blocks": notes},
    )


def report(options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
    """Two tables, the averages after each block and the last ones with their costs, and a plot."""
    blocks = load(str(Path(options.dataset).absolute()), seed=options.seed)
    recall = {row: _recalls(blocks, outcome) for row, outcome in outcomes.items()}
    found = {
        row: averages(np.nanmean(recall_TU, 1), len(blocks)) for row, recall_TU in recall.items()
    }
    intervals = _intervals(recall, len(blocks))
    title = f"blocks, {options.dataset_name}, {options.recipe}, Recall@20"
    last = [
        {
            "row": row,
            "la": float(found[row]["la"][-1]),
            "ra": float(found[row]["ra"][-1]),
            "h-mean": float(found[row]["h-mean"][-1]),
            "interval": intervals[row],
            **vars(outcome.cost),
        }
        for row, outcome in outcomes.items()
    ]
    each = [
        {"row": f"{row}, {name}"}
        | {f"block {block}": float(value) for block, value in enumerate(found[row][name])}
        for name in ("own", "ra", "la", "h-mean")
        for row in outcomes
    ]
    _plot({row: found[row]["h-mean"] for row in outcomes}, options.out / "plot.png", title=title)
    text = table.write(last, options.out / "table", title=title, command=command)
    return text + "\n" + table.write(each, options.out / "blocks", title=title, command=command)


def _recalls(blocks: Blocks, outcome: Outcome) -> NDArray[np.float64]:
    """recall_TU of each part."""
    assert outcome.part_N is not None
    return np.stack(
        [
            recalls(blocks, task, outcome.rank_N[outcome.part_N == part])
            for part, (_, task) in enumerate(parts(len(blocks)))
        ]
    )


def _intervals(
    recall: Mapping[str, NDArray[np.float64]], n_blocks: int
) -> dict[str, tuple[float, float]]:
    """Of the last H-mean, by users drawn anew, the same for all rows."""
    n_users = next(iter(recall.values())).shape[1]
    rng = np.random.default_rng(0)
    weight_SU = rng.multinomial(n_users, np.full(n_users, 1 / n_users), SAMPLES).astype(np.float32)
    found = {}
    for row, recall_TU in recall.items():
        there_UT = np.isfinite(recall_TU).T.astype(np.float32)
        sum_ST = weight_SU @ np.nan_to_num(recall_TU).T.astype(np.float32)
        h_mean_S = averages(sum_ST / (weight_SU @ there_UT), n_blocks)["h-mean"][:, -1]
        low, high = np.quantile(h_mean_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[row] = (float(low), float(high))
    return found


def _plot(h_mean: Mapping[str, NDArray[np.float64]], path: Path, *, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row, value_B in h_mean.items():
        axes.plot(range(len(value_B)), value_B, marker="o", label=row)
    axes.set_xlabel("block just learned")
    axes.set_ylabel("H-mean")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
