"""`leave-one-out`: learn all but every user's last event, predict that one.

Published on MovieLens-1M, full ranking: NDCG@10 .1893 by HSTU-large (Zhai et al. 2024), .1858 by
SASRec+, .1726 by gSASRec; events of equal time stand there as in the file (`--ties file`). Others'
later events are learned, too: a protocol for comparisons, not for what will happen in production.
"""

from collections.abc import Mapping, Sequence

from ray_jobs.evaluate import held_out
from ray_jobs.evaluate.options import Options
from ray_jobs.evaluate.results import Outcome
from ray_jobs.evaluate.rows import Job


def jobs(options: Options) -> Sequence[Job]:
    return held_out.jobs(options, "leave-one-out")


def report(options: Options, outcomes: Mapping[str, Outcome], command: str) -> str:
    title = f"{options.dataset_name}, every user's last event"
    return held_out.report(options, outcomes, command, title=title)
