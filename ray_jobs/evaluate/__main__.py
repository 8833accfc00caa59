"""Measure quality by a protocol: one command a table, one Ray job a row.

    python -m ray_jobs.evaluate --protocol stream --dataset ml-100k --recipe tiny_cpu --seed 0

Rows are kept in `--out` and not run again; the same command after a stop goes on with the rest.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Final, cast

from ray_jobs import recipes
from ray_jobs.evaluate.options import Options, Protocol
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import run_jobs
from services.core.errors import RefluxError
from services.core.settings import Settings

PROTOCOLS: Final = {  # by name, the module that knows it
    "stream": "stream",
    "successive": "successive",
    "leave-one-out": "leave_one_out",
    "blocks": "blocks",
    "gate": "gate_trials",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reflux evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default="stream")
    parser.add_argument("--dataset", default="ml-1m", help="ml-1m, ml-100k, or a log's path")
    parser.add_argument("--recipe", default="tiny_cpu", choices=recipes.RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default="", help="only these, separated by commas")
    parser.add_argument("--ties", choices=("shuffled", "file"), default="shuffled")
    noises = "random:SHARE, duplicates:SHARE or bot; of stream several, separated by commas"
    parser.add_argument("--noise", default="", help=noises)
    parser.add_argument("--out", type=Path, help="default: in <home>/evaluate")
    given = parser.parse_args(argv)
    command = "reflux evaluate " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        print(evaluate(given, Settings.load(), command=command))
    except (RefluxError, ValueError) as error:
        sys.exit(f"reflux evaluate: {error}")


def evaluate(given: argparse.Namespace, settings: Settings, *, command: str) -> str:
    """Run the protocol's rows and write its table; the Markdown."""
    name = f"{given.protocol}-{Path(given.dataset).stem}-{given.recipe}-{given.ties}-{given.seed}"
    options = Options(
        dataset=given.dataset,
        recipe=given.recipe,
        seed=given.seed,
        out=(given.out or settings.home / "evaluate" / name).absolute(),
        home=settings.home.absolute(),
        data=settings.data,
        rows=tuple(row for row in given.rows.split(",") if row),
        ties=given.ties,
        noise=given.noise,
    )
    protocol = cast(
        Protocol, importlib.import_module(f"ray_jobs.evaluate.{PROTOCOLS[given.protocol]}")
    )
    files = run_jobs(protocol.jobs(options), options.out)
    outcomes = {row: Outcome.load(path) for row, path in files.items()}
    return protocol.report(options, outcomes, command)


if __name__ == "__main__":
    main()
