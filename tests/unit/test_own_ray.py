"""How a job's processes give way."""

import os

import pytest

from ray_jobs.own_ray import step_back


def test_stepping_back_is_never_a_step_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5

    def nice(more: int) -> int:
        nonlocal now
        assert more >= 0, "only root may"
        now += more
        return now

    monkeypatch.setattr(os, "nice", nice)
    step_back(3)
    assert now == 5
    step_back(7)
    assert now == 7
