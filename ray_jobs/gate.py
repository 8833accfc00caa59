"""The gate: whether a candidate student may answer. Pure: evidence in, verdict out.

A candidate is promoted if its weights are finite, its lists differ between users, and on the
latest window it ranks no worse than the newest proved version: one that was no worse itself over
`Bar.proof_events` events. Both are judged on the same events, each scored before it was learned, so
the difference is paired: its standard error is a tenth of the metric's. The window grows until it
is a proof, for a few hundred events don't show a loss of 5%: see `publish` for what happens when it
shows after a promotion.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOP = 10  # items of a list; a shorter one holds the whole catalog, the same one for all

Gains = npt.NDArray[np.float64]  # NDCG@10 of each event, in the order of the stream
Lists = npt.NDArray[np.int32]  # (users, n): the top items of some users


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a candidate.

    `gains` and `proved_gains` are of the same events; both empty where nothing serves yet.
    `lists` are the candidate's top items for users with different histories, seen items included:
    without them even a mere popularity order would differ between users.
    """

    finite: bool
    lists: Lists
    gains: Gains
    proved_gains: Gains


@dataclass(frozen=True, kw_only=True)
class Bar:
    """How good is good enough.

    worse: relative loss of NDCG@10 that is tolerated.
    sure: standard errors by which a loss must exceed `worse` before it counts.
    distinct: smallest share of (user, place) slots that must differ from the commonest item there.
    min_users: fewer lists than this say nothing about collapse.
    proof_events: a version that was no worse over so many events is what others are judged by.
    """

    worse: float = 0.02
    sure: float = 2.0
    distinct: float = 0.05
    min_users: int = 8
    proof_events: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    promoted: bool
    reason: str

    def as_manifest(self) -> dict[str, bool | str]:
        return {"promoted": self.promoted, "reason": self.reason}


def judge(evidence: Evidence, *, bar: Bar) -> Verdict:
    """Promote, or keep with the reason."""
    assert evidence.gains.shape == evidence.proved_gains.shape
    if not evidence.finite:
        return Verdict(promoted=False, reason="weights or scores are not finite")
    spread = distinctness(evidence.lists)
    enough = len(evidence.lists) >= bar.min_users
    if enough and evidence.lists.shape[1] == TOP and spread < bar.distinct:
        return Verdict(
            promoted=False,
            reason=f"collapsed: {spread:.0%} of the lists' places differ between users "
            f"(at least {bar.distinct:.0%})",
        )
    if len(evidence.gains) == 0:
        return Verdict(promoted=True, reason="nothing to compare with yet")
    if not np.isfinite(evidence.gains).all():
        return Verdict(promoted=False, reason="its scores of the latest window are not finite")
    proved = float(evidence.proved_gains.mean())
    loss = evidence.proved_gains - evidence.gains
    error = float(loss.std() / np.sqrt(len(loss)))
    compared = (
        f"NDCG@10 {float(evidence.gains.mean()):.4f} against {proved:.4f} proved, "
        f"{len(loss)} events"
    )
    if float(loss.mean()) - bar.sure * error > bar.worse * proved:
        return Verdict(promoted=False, reason=f"worse: {compared}")
    return Verdict(promoted=True, reason=compared)


def distinctness(lists: Lists) -> float:
    """Mean share of users whose item at a place isn't the commonest one there: 0 = all alike."""
    if len(lists) == 0:
        return 0.0
    common = [np.unique(place, return_counts=True)[1].max() for place in lists.T]
    return 1.0 - float(np.mean(common)) / len(lists)
