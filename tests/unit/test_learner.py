"""What is learned of one batch: its terms, whom they trust, and where a new student begins."""

import copy
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ray_jobs.histories import Histories
from ray_jobs.labels import Labels, aligned, items_of, label
from ray_jobs.learner import adam, learn, loss_terms, start_from, trust_in
from ray_jobs.microbatch import COLD, MicroBatch, absorb, group
from ray_jobs.recipes import DistillConfig
from services.core.catalog import Catalog
from services.core.models.student import Student
from services.core.models.teacher import Teacher
from tests.streams import CONFIG, STUDENT, TEACHER, Log


def labelled_batch() -> tuple[Student, MicroBatch, Teacher]:
    log, catalog = Log(60), Catalog()
    histories = Histories(keep=100)
    news = group(log.received(0, 60).arrivals(catalog), histories)
    absorb(news, histories)
    torch.manual_seed(0)
    student = Student(STUDENT, n_rows=len(catalog))
    return student, MicroBatch.of(news, context=8), Teacher(TEACHER, n_rows=len(catalog))


@pytest.mark.parametrize(
    ("off", "config"),
    [
        ("hard", replace(CONFIG, hard_weight=0.0)),
        ("soft", replace(CONFIG, soft_weight=0.0)),
        ("hidden", replace(CONFIG, hidden_weight=0.0)),
    ],
)
def test_a_weight_of_zero_switches_its_term_off(off: str, config: DistillConfig) -> None:
    student, batch, teacher = labelled_batch()
    labels = label(teacher, batch, top_k=5)
    terms = loss_terms(
        student,
        batch,
        labels,
        config=config,
        weights_N=torch.ones(len(batch)),
        trust=1.0,
    )
    assert set(terms) == {"hard", "soft", "hidden"} - {off}
    assert all(torch.isfinite(term) for term in terms.values())


def test_a_gradient_that_is_not_finite_leaves_the_student_as_it_was() -> None:
    student, batch, teacher = labelled_batch()
    labels = label(teacher, batch, top_k=5)
    labels.logits_NK[:] = np.nan
    before = copy.deepcopy(student.state_dict())
    learn(
        student,
        adam(student, CONFIG),
        batch,
        labels,
        config=CONFIG,
        weights_N=torch.ones(len(batch)),
        trust=1.0,
    )
    assert all(torch.equal(student.state_dict()[name], old) for name, old in before.items())


def test_a_teacher_out_of_trust_leaves_the_hard_label() -> None:
    student, batch, teacher = labelled_batch()
    labels = label(teacher, batch, top_k=5)
    weights_N = torch.ones(len(batch))
    terms = loss_terms(student, batch, labels, config=CONFIG, weights_N=weights_N, trust=0.0)
    assert set(terms) == {"hard"}


def test_trust_fades_with_age_and_with_being_overtaken() -> None:
    fresh = trust_in(age_events=0, half_life_events=100, teacher_ndcg=0.2, student_ndcg=0.1)
    aged = trust_in(age_events=100, half_life_events=100, teacher_ndcg=0.2, student_ndcg=0.1)
    garbage = trust_in(age_events=0, half_life_events=100, teacher_ndcg=0.01, student_ndcg=0.1)
    assert (fresh, aged) == (1.0, 0.5)
    assert garbage == pytest.approx(0.01)


def test_a_teacher_moves_to_the_jobs_rows_with_what_it_knows() -> None:
    own, to = Catalog(), Catalog()
    own.add(["a", "b", "c"])
    to.add(["c", "new", "a"])
    teacher = Teacher(TEACHER, n_rows=len(own))
    moved = aligned(teacher, own, item_ids=["c", "new", "a"], content=to.content)
    old, new = teacher.encoder.item_id.weight, moved.encoder.item_id.weight
    assert torch.equal(new[[1, 3]], old[[3, 1]])
    assert not new[2].any()


@pytest.mark.parametrize("n", [2, 3, 50])
def test_parts_of_a_batch_are_labelled_like_the_whole(n: int) -> None:
    _, batch, teacher = labelled_batch()
    how: dict[str, Any] = {"top_k": 5, "popularity": np.arange(31.0), "known_rows": 31}
    whole = label(teacher, batch, n_ranked=40, **how)
    parts = batch.parts(n)
    assert 1 < len(parts) <= n
    done, labels = 0, []
    for part in parts:
        n_ranked = min(max(40 - done, 0), len(part))
        labels.append(label(teacher, part, n_ranked=n_ranked, **how))
        done += len(part)
    joined, warm_N = Labels.joined(labels), batch.at_N != COLD
    np.testing.assert_array_equal(joined.rows_NK[warm_N], whole.rows_NK[warm_N])
    np.testing.assert_array_equal(joined.ranks, whole.ranks)
    np.testing.assert_allclose(joined.hidden_NT[warm_N], whole.hidden_NT[warm_N], atol=2e-3)


def test_a_new_student_sees_items_as_the_teacher_does() -> None:
    student, _, teacher = labelled_batch()
    start_from(student, items_of(teacher))

    def alike(model: Student | Teacher) -> torch.Tensor:
        """Cosines between all pairs of items."""
        table_VD = model.encoder.item_table()[1:].detach()
        return torch.corrcoef(table_VD - table_VD.mean(0)).flatten()

    assert torch.corrcoef(torch.stack([alike(student), alike(teacher)]))[0, 1] > 0.5
    assert not student.encoder.item_id.weight[0].any()


def test_adam_is_torchs_and_leaves_the_compiler_alone() -> None:
    script = """
import sys, torch
from ray_jobs.learner import Adam

def learned(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    return model.weight

ours = learned(Adam)
assert "torch._dynamo" not in sys.modules
assert torch.equal(ours, learned(torch.optim.AdamW))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
