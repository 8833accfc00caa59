"""How surely the gate tells a slightly worse candidate, without training one.

    python -m ray_jobs.evaluate.gate_power OUT/rows/distilled.parquet

Takes the ranks of a row that an evaluation kept as those of the proved version. A candidate's are
the same, each moved by chance, and some of them far enough for its NDCG@10 to be lower by what is
asked. It is judged after every version, as `publish` does, until it would be proved; the share of
rejected ones is printed for the bar as it is and for one that looks at a single version's events.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from ray_jobs.evaluate.results import Outcome
from ray_jobs.gate import Bar, Evidence, Gains, judge
from services.core.metrics import Ranks, gains_at

STREAMS: Final = 200
LOSSES: Final = (0.02, 0.05, 0.10)
VERSION_EVENTS: Final = (100, 500, 2_500)  # between two versions
SPREAD: Final = 0.3  # of log rank
NEAR, FAR = 0.05, 0.5  # by which log rank is moved: of most, and of some


def candidate(rank_N: Ranks, *, loss: float, rng: np.random.Generator) -> Gains:
    """Gains of somebody who ranks much the same, `loss` worse on the whole."""

    def moved(by: float) -> Gains:
        log_N = np.log(np.minimum(rank_N, 10**9)) + rng.normal(by, SPREAD, len(rank_N))
        return gains_at(np.maximum(1, np.rint(np.exp(log_N))), 10)

    near_N, far_N = moved(NEAR), moved(FAR)
    wanted = (1 - loss) * gains_at(rank_N, 10).mean()
    share = np.clip((near_N.mean() - wanted) / (near_N.mean() - far_N.mean()), 0, 1)
    return np.where(rng.random(len(rank_N)) < share, far_N, near_N)


def rejected(
    gains: Gains, proved: Gains, *, bar: Bar, every: int, rng: np.random.Generator
) -> float:
    """Share of streams, each from a random event on, in which it is rejected before its proof."""
    lists = rng.integers(1, 10**6, (bar.min_users, 10), dtype=np.int32)
    n_rejected = 0
    for begin in rng.integers(0, len(gains) - bar.proof_events, STREAMS):
        for n in range(every, bar.proof_events + 1, every):
            seen = slice(begin, begin + n)
            evidence = Evidence(
                finite=True, lists=lists, gains=gains[seen], proved_gains=proved[seen]
            )
            if not judge(evidence, bar=bar).promoted:
                n_rejected += 1
                break
    return n_rejected / STREAMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", type=Path)
    rank_N = Outcome.load(parser.parse_args().row).rank_N
    proved = gains_at(rank_N, 10)
    rng = np.random.default_rng(0)
    print("| worse by | events a version | one version, 1 error | until proved |")
    print("| --- | --- | --- | --- |")
    for loss in LOSSES:
        gains = candidate(rank_N, loss=loss, rng=rng)
        for every in VERSION_EVENTS:
            shares = [
                rejected(gains, proved, bar=bar, every=every, rng=rng)
                for bar in (replace(Bar(), sure=1.0, proof_events=every), Bar())
            ]
            lost = 1 - gains.mean() / proved.mean()
            print(f"| {lost:.1%} | {every:,} | " + " | ".join(f"{s:.0%}" for s in shares) + " |")


if __name__ == "__main__":
    main()
