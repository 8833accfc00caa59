"""The capacity model: its document is its output, and its plans hold where they are simulated."""

from dataclasses import astuple, replace
from pathlib import Path

import pytest

from deploy import capacity

DOCUMENT = Path(__file__).parents[2] / "deploy/capacity.md"


def test_the_document_shows_what_the_script_prints() -> None:
    assert capacity.report() in DOCUMENT.read_text(), "run `python deploy/capacity.py`"


@pytest.mark.parametrize("load", capacity.LOADS, ids=lambda load: str(load.name))
def test_a_plan_holds_its_load_and_not_four_times_that(load: capacity.Load) -> None:
    plan = capacity.plan(load)
    held = capacity.simulate(load, plan)
    assert held.worker_lag_s < 2
    assert held.learn_lag_s < 2
    assert held.recovered_s < 30
    more = replace(load, events_per_s=4 * load.events_per_s, answers_per_s=4 * load.answers_per_s)
    failed = capacity.simulate(more, plan)
    assert failed.worker_lag_s > 5
    assert failed.learn_lag_s > 5
    assert failed.answer_p99_ms > 10 * held.answer_p99_ms


def test_more_of_anything_never_needs_less() -> None:
    load = capacity.LOADS[0]
    for name in ("events_per_s", "answers_per_s", "users", "items", "user_events"):
        more = replace(load, **{name: getattr(load, name) * 3})
        before, after = (astuple(capacity.plan(one)) for one in (load, more))
        assert all(a >= b for a, b in zip(after, before, strict=True)), name
        assert after != before, name


def test_what_breaks_first_comes_first() -> None:
    for load in capacity.LOADS:
        limits = [ceiling.events_per_s for ceiling in capacity.ceilings(load)]
        assert limits == sorted(limits)
