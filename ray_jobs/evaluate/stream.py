"""The `stream` protocol: a real log in time order, its first half known, its second half predicted
event by event and then learned.

Every ranker orders the whole catalog without what the user has had; a user's first event is
ranked by what trends. Whoever is fitted or refreshed is so `FITS` times, at the same places.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ray_jobs import recipes
from ray_jobs.evaluate import baselines, table
from ray_jobs.evaluate.events import LogChoice, load
from ray_jobs.evaluate.judging import Past, walk
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Bootstrap, Cost, Outcome
from ray_jobs.evaluate.rows import Job, Say, peak_mb
from ray_jobs.evaluate.stream_teachers import (
    Chain,
    judge_chain,
    judge_recalibrated,
    kept_teachers,
    train_chain,
)
from ray_jobs.evaluate.students import distil
from ray_jobs.recipes import Recipe

FITS: Final = 10
TEACHERS: Final = "teachers"  # the job that trains them, without a row of its own

BASELINES: Final = ("popularity", "ease", "markov", "factorisation")
USUAL: Final = (*BASELINES, "stale-teacher", "teacher", "frozen", "hard", "distilled")
RECALIBRATED: Final = "recalibrated-stale-teacher"
NOISY: Final = ("popularity", "markov", "teacher", "hard", "distilled")


def _with(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, distill=replace(recipe.distill, **changes))


def _longer(recipe: Recipe) -> Recipe:
    return _with(warm_up_epochs=2 * recipe.distill.warm_up_epochs)(recipe)


# What each row of the ablation leaves out of `distilled`, or does otherwise.
ABLATIONS: Final[dict[str, Callable[[Recipe], Recipe]]] = {
    "no-soft": _with(soft_weight=0.0),
    "no-hidden": _with(hidden_weight=0.0),
    "start-only": _with(soft_weight=0.0, hidden_weight=0.0),
    "no-start": _with(start_from_teacher=False),
    "no-tower": _with(soft_tower=False),
    "temperature-1": _with(temperature=1.0),
    "temperature-2": _with(temperature=2.0),
    "temperature-4": _with(temperature=4.0),
    "top-16": _with(top_k=16),
    "top-256": _with(top_k=256),
    "seen-rivals": _with(mask_seen=False),
    "no-replay": _with(replay_users=0),
    "replay-8": _with(replay_users=8),
    "ageless-teacher": _with(teacher_half_life_events=10**12),
    "half-the-rate": _with(learning_rate=1e-3),
    "twice-the-rate": _with(learning_rate=4e-3),
    "every-step-labelled": _with(warm_up_label_every=1),
    "every-other-step-labelled": _with(warm_up_label_every=2),
    "twice-the-warm-up": _longer,
    "hard-twice-the-warm-up": _longer,
}


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a row depends on."""

    log: LogChoice
    ranker: str
    settings: Mapping[str, Any] | None = None  # of a baseline
    chain: Chain | None = None  # of a row that has met a teacher
    recipe: Recipe | None = None  # of a student


def jobs(options: Options) -> list[Job]:
    """The rows asked for, the usual ones by default; with noise each also on the clean log."""
    rows = options.rows or (NOISY if options.noise else USUAL)
    known = (*USUAL, RECALIBRATED, *ABLATIONS)
    if unknown := [row for row in rows if row not in known]:
        raise ValueError(f"--rows {','.join(unknown)}: choose of {', '.join(known)}")
    recipe = recipes.load(options.recipe)
    found: dict[str, Job] = {}
    for noise in _noises(options):
        log = options.log(noise)
        for row in rows:
            for job in _jobs_of(row, log, recipe, options.out / TEACHERS):
                found.setdefault(job.name, job)
    return list(found.values())


def _jobs_of(row: str, log: LogChoice, recipe: Recipe, home: Path) -> list[Job]:
    """The job that gives the row, behind the one that trains the teachers where it needs them."""
    given = Given(log=log, ranker=row)
    if row in BASELINES:
        return [_job(replace(given, settings=baselines.SETTINGS[row]), _baseline)]
    chain = Chain(
        log=log,
        recipe=recipe.name,
        teacher=recipe.teacher,
        train=recipe.train,
        fits=FITS,
        home=home,
    )
    train = Job(name=_named(TEACHERS, log.noise), run=train_chain, given=chain, rows=(), cpus=0)
    if row.endswith("teacher"):
        return [train, _job(replace(given, chain=chain), _teacher, needs=train)]
    if row in ("frozen", "distilled"):
        given = replace(given, ranker="distilled", chain=chain, recipe=recipe)
        return [train, _job(given, _student, more=("frozen",), needs=train)]
    given = replace(given, recipe=ABLATIONS[row](recipe) if row in ABLATIONS else recipe)
    if row.startswith("hard"):
        return [_job(given, _student)]
    return [train, _job(replace(given, chain=chain), _student, needs=train)]


def _job(
    given: Given,
    run: Callable[[Given, Say], Mapping[str, Outcome]],
    *,
    more: Sequence[str] = (),
    needs: Job | None = None,
) -> Job:
    name = _named(given.ranker, given.log.noise)
    return Job(
        name=name,
        run=run,
        given=given,
        rows=(name, *(_named(row, given.log.noise) for row in more)),
        needs=(needs.name,) if needs else (),
    )


def _named(row: str, noise: str) -> str:
    return f"{row}@{noise}" if noise else row


def _noises(options: Options) -> tuple[str, ...]:
    return ("", *filter(None, options.noise.split(",")))


def _baseline(given: Given, say: Say) -> dict[str, Outcome]:
    begin_s = time.monotonic()
    events = load(given.log)
    past, first = Past(events.user_N, events.row_N), events.half
    ranker = baselines.make(
        given.ranker,
        events,
        past,
        first=first,
        every=-(-(len(events) - first) // FITS),
        **(given.settings or {}),
    )
    outcome = walk(ranker, events, past, first=first, last=len(events), say=say)
    cost = Cost(train_s=time.monotonic() - begin_s, peak_mb=peak_mb())
    return {_named(given.ranker, given.log.noise): replace(outcome, cost=cost)}


def _teacher(given: Given, say: Say) -> dict[str, Outcome]:
    """The teacher with all the context that it can use, refreshed or as the stream began."""
    assert given.chain is not None
    events = load(given.log)
    if given.ranker == RECALIBRATED:
        outcome = judge_recalibrated(given.chain, events, say=say)
    else:
        stale = given.ranker == "stale-teacher"
        outcome = judge_chain(given.chain, events, stale=stale, say=say)
    return {_named(given.ranker, given.log.noise): outcome}


def _student(given: Given, say: Say) -> dict[str, Outcome]:
    assert given.recipe is not None
    events = load(given.log)
    kept = kept_teachers(given.chain, events) if given.chain else {}
    done = distil(events, given.recipe, kept=kept, seed=given.log.seed, say=say)
    outcomes = {_named(given.ranker, given.log.noise): done.student}
    if given.ranker == "distilled":
        outcomes[_named("frozen", given.log.noise)] = done.frozen
    return outcomes


def report(options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
    """The table, what of the teacher arrives, and the plots; or what noise costs."""
    title = f"stream, {options.dataset_name}, ties {options.ties}, {options.recipe}"
    bootstrap = Bootstrap(outcomes)
    name = "robustness" if options.noise else "table"
    lines = table.quality_lines(outcomes, bootstrap)
    text = table.write(lines, options.out / name, title=title, command=command)
    if options.noise:
        compared = noise_lines(outcomes, bootstrap)
    else:
        compared = comparison_lines(bootstrap)
        table.plot_bars(lines, options.out / "plot.png", metric="ndcg@10", title=title)
        table.plot_over(outcomes, options.out / "over_the_stream.png", title=title)
    if not compared:
        return text
    path = options.out / f"{name}-compared"
    return text + "\n" + table.write(compared, path, title="compared", command=command)


# Each a statistic of the rows' means of NDCG@10.
COMPARISONS: Final[dict[str, Callable[[Any], Any]]] = {
    "retention: distilled / teacher": lambda m: m["distilled"] / m["teacher"],
    "transferability: (distilled - hard) / (teacher - hard)": lambda m: (
        (m["distilled"] - m["hard"]) / (m["teacher"] - m["hard"])
    ),
    "teacher - hard": lambda m: m["teacher"] - m["hard"],
    "distilled / hard - 1": lambda m: m["distilled"] / m["hard"] - 1,
    "distilled / frozen - 1": lambda m: m["distilled"] / m["frozen"] - 1,
    "teacher / stale-teacher - 1": lambda m: m["teacher"] / m["stale-teacher"] - 1,
    "recalibrated-stale-teacher / stale-teacher - 1": lambda m: (
        m[RECALIBRATED] / m["stale-teacher"] - 1
    ),
    "distilled - markov": lambda m: m["distilled"] - m["markov"],
}


def comparison_lines(bootstrap: Bootstrap) -> list[table.Line]:
    """What can be said of the rows that there are."""
    lines: list[table.Line] = []
    for what, statistic in COMPARISONS.items():
        try:
            value = float(statistic(bootstrap.mean))
        except KeyError:
            continue  # speaks of a row that wasn't asked for
        lines.append({"compared": what, "value": value, "95%": bootstrap.interval(statistic)})
    for row in ABLATIONS:
        against = "hard" if row.startswith("hard") else "distilled"
        if {row, against} <= set(bootstrap.mean):
            lines.append(_ratio(bootstrap, f"{row} / {against} - 1", row, against))
    return lines


def noise_lines(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[table.Line]:
    """Of each row with noise, what it lost against the clean log."""
    noisy = [row for row in outcomes if "@" in row]
    return [_ratio(bootstrap, f"{row} / clean - 1", row, row.split("@")[0]) for row in noisy]


def _ratio(bootstrap: Bootstrap, what: str, row: str, against: str) -> table.Line:
    def statistic(mean: Any) -> Any:
        return mean[row] / mean[against] - 1

    value = float(statistic(bootstrap.mean))
    return {"compared": what, "value": value, "95%": bootstrap.interval(statistic)}
