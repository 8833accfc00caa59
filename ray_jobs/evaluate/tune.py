"""Search the baselines' settings on the warm-up half: fit on its first 80%, judge on what follows.

    python -m ray_jobs.evaluate.tune --dataset ml-1m

No event of the second half is looked at. Prints a line per setting; the best of each baseline
belongs into `baselines.SETTINGS`.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any, Final

from ray_jobs.evaluate import baselines
from ray_jobs.evaluate.events import LogChoice, load
from ray_jobs.evaluate.judging import Past, walk
from services.core.settings import Settings

FITTED_SHARE: Final = 0.8  # of the half
JUDGED_SHARE: Final = 0.08

GRIDS: Final[dict[str, dict[str, list[Any]]]] = {
    "popularity": {"half_life_events": [2e3, 1e4, 5e4, 2e5, 1e9]},
    "markov": {"reach": [5, 10, 20], "fading": [0.5, 0.75, 1.0], "norm": [0.0, 0.5, 0.75, 1.0]},
    "ease": {"last": [5, 10, 20], "regularisation": [100.0, 500.0, 1000.0, 2000.0, 5000.0]},
    "factorisation": {
        "factors": [32, 64, 128],
        "last": [5, 10, 20, 50],
        "regularisation": [0.01, 1.0, 10.0, 30.0],
        "alpha": [0.3, 1.0, 10.0, 40.0],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="ml-1m")
    parser.add_argument("--rows", default=",".join(GRIDS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    settings = Settings.load()
    choice = LogChoice(
        dataset=given.dataset,
        home=Path(settings.home),
        data=settings.data,
        ties="shuffled",
        noise="",
        seed=given.seed,
    )
    events = load(choice)
    past = Past(events.user_N, events.row_N)
    first = round(FITTED_SHARE * events.half)
    last = first + round(JUDGED_SHARE * events.half)
    for name in given.rows.split(","):
        grid = GRIDS[name]
        for values in product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            ranker = baselines.make(name, events, past, first=first, every=len(events), **chosen)
            outcome = walk(
                ranker, events, past, first=first, last=last, say=lambda done, words: None
            )
            print(f"{name} {chosen}: NDCG@10 {outcome.metrics()['ndcg@10']:.4f}", flush=True)


if __name__ == "__main__":
    main()
