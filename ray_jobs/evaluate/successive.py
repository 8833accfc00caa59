"""`successive`: learn what lies before the 0.9 quantile of timestamps, predict every later event
from all before it, frozen.

The global temporal split of the "Time to Split" study (Gusak et al. 2025), whose best model,
SASRec+, has NDCG@10 .1121 and HR@10 .2062 on MovieLens-1M. Events of equal time stand there as in
the file (`--ties file`); it leaves out users without an earlier event, who count here, ranked by
what trends.
"""

from collections.abc import Mapping, Sequence

from ray_jobs.evaluate import held_out
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Job


def jobs(options: Options) -> Sequence[Job]:
    return held_out.jobs(options, "successive")


def report(options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
    title = f"{options.dataset_name}, events after the 0.9 quantile of time"
    return held_out.report(options, outcomes, command, title=title)
