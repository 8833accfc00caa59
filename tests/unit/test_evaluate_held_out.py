"""Which events a protocol holds out, and that each is predicted from all before it alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch

from ray_jobs import recipes
from ray_jobs.evaluate.events import LogChoice
from ray_jobs.evaluate.held_out import Frozen, Given, split_of
from ray_jobs.evaluate.judging import Past
from ray_jobs.evaluate.stream_teachers import Recalibrated
from services.core.models.sequences import features_of
from services.core.models.sizes import EncoderConfig
from services.core.models.teacher import Teacher

N_USERS, N_EVENTS, N_ITEMS = 7, 200, 50


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Users come one after the other, so the last of them are met in the held-out tenth only."""
    random = np.random.default_rng(0)
    events = pa.table(
        {
            "user_id": [f"u{e * N_USERS // N_EVENTS}" for e in range(N_EVENTS)],
            "item_id": [f"i{i}" for i in random.integers(0, N_ITEMS, N_EVENTS)],
            "timestamp": np.arange(N_EVENTS) * 60,
            "value": random.integers(1, 6, N_EVENTS).astype(float),
        }
    )
    pyarrow.csv.write_csv(events, tmp_path / "log.csv")
    return tmp_path / "log.csv"


def given(path: Path, split: str) -> Given:
    log = LogChoice(dataset=str(path), home=path.parent, data="", ties="file", noise="", seed=0)
    return Given(log=log, split=split, recipe=recipes.load("smoke_cpu"), checkpoints="")


def test_successive_holds_the_last_tenth_out(path: Path) -> None:
    log, first = split_of(given(path, "successive"))
    assert first == 180
    assert log.time_ms_N[:first].max() <= np.quantile(log.time_ms_N, 0.9) < log.time_ms_N[first]


def test_leave_one_out_holds_every_users_last_event_out(path: Path) -> None:
    log, first = split_of(given(path, "leave-one-out"))
    assert len(log) - first == N_USERS
    assert sorted(log.user_N[first:]) == list(range(N_USERS))
    for user, time_ms in zip(log.user_N[first:], log.time_ms_N[first:], strict=True):
        assert (log.time_ms_N[:first][log.user_N[:first] == user] < time_ms).all()


@pytest.mark.parametrize("split", ["successive", "leave-one-out"])
def test_each_is_predicted_from_all_before_it(path: Path, split: str) -> None:
    log, first = split_of(given(path, split))
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, n_layers=2, n_heads=2, max_len=64, n_recent=2)
    model = Teacher(config, n_rows=len(log.item_ids)).eval()
    scores_HV = Frozen(model, log, first).step(slice(first, len(log)))
    for event in range(first, len(log)):
        before = np.flatnonzero(log.user_N[:event] == log.user_N[event])
        if not len(before):
            continue
        features = features_of(
            log.row_N[before],
            log.type_N[before].tolist(),
            log.time_ms_N[before],
            log.value_N[before],
        )
        with torch.no_grad():
            hidden_1LD = model(*(torch.from_numpy(column[None]) for column in features))
            expected_V = model.scores(hidden_1LD[:, -1])[0]
        np.testing.assert_allclose(scores_HV[event - first], expected_V, atol=1e-5)


def test_an_adapter_predicts_as_the_frozen_teacher_does_and_learns_only_then(path: Path) -> None:
    log, first = split_of(given(path, "successive"))
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, n_layers=1, n_heads=2, max_len=64)
    model = Teacher(config, n_rows=len(log.item_ids)).eval()
    frozen = Frozen(model, log, first)
    past = Past(log.user_N, log.row_N)
    adapted = Recalibrated(model, log, past, first)
    at = slice(first, len(log))
    place = np.flatnonzero(past.place_N[at] > 0)
    target = log.row_N[at][place]
    before_HV = adapted.step(at)
    np.testing.assert_allclose(before_HV[:, 1:], frozen.step(at)[:, 1:], rtol=1e-4, atol=1e-4)
    for _ in range(30):
        after_HV = adapted.step(at)
    gained = after_HV[place, target] - after_HV[place].mean(1)
    had = before_HV[place, target] - before_HV[place].mean(1)
    assert gained.mean() > had.mean() + 0.01
