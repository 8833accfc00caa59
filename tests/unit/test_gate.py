"""The gate: bad candidates simulated, each kept with its reason."""

import numpy as np
import pytest

from ray_jobs.gate import Bar, Evidence, Gains, Lists, distinctness, judge

BAR = Bar()
RNG = np.random.default_rng(0)
VARIED: Lists = RNG.integers(1, 500, (32, 10), dtype=np.int32)
ALIKE: Lists = np.tile(np.arange(1, 11, dtype=np.int32), (32, 1))
GAINS: Gains = RNG.choice([0.0, 0.0, 0.0, 0.4, 1.0], 4_000)
NONE: Gains = np.zeros(0)


def evidence(**changes: object) -> Evidence:
    given = {"finite": True, "lists": VARIED, "gains": GAINS, "proved_gains": GAINS}
    return Evidence(**{**given, **changes})  # type: ignore[arg-type]


def worse_by(share: float) -> Gains:
    """The same gains, but `share` of the hits are lost."""
    gains = GAINS.copy()
    hits = np.flatnonzero(gains)
    gains[hits[: round(share * len(hits))]] = 0.0
    return gains


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (evidence(finite=False), "not finite"),
        (evidence(gains=np.full_like(GAINS, np.nan)), "not finite"),
        (evidence(lists=ALIKE), "collapsed"),
        (evidence(gains=worse_by(0.05)), "worse"),
        (evidence(gains=worse_by(0.6)), "worse"),
    ],
)
def test_a_bad_candidate_is_kept_and_the_reason_says_why(bad: Evidence, reason: str) -> None:
    verdict = judge(bad, bar=BAR)
    assert not verdict.promoted
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "good",
    [
        evidence(),
        evidence(proved_gains=worse_by(0.05)),
        evidence(gains=worse_by(0.01)),  # within the tolerance
        evidence(gains=NONE, proved_gains=NONE),  # the first version
        evidence(gains=NONE, proved_gains=NONE, lists=ALIKE[:3]),  # too few users to tell
        evidence(gains=NONE, proved_gains=NONE, lists=ALIKE[:, :9]),  # the whole catalog
    ],
)
def test_an_equal_or_better_candidate_and_the_first_one_are_promoted(good: Evidence) -> None:
    assert judge(good, bar=BAR).promoted


def test_a_few_events_are_no_proof_that_a_candidate_is_worse() -> None:
    gains, serving = np.array([0.0, 0.4, 0.0]), np.array([0.4, 0.0, 0.4])
    assert judge(evidence(gains=gains, proved_gains=serving), bar=BAR).promoted


def test_distinctness_is_zero_for_one_list_for_all_and_near_one_for_unlike_ones() -> None:
    assert distinctness(ALIKE) == 0.0
    assert distinctness(VARIED) > 0.9
