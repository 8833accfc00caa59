"""What every model must keep to, whatever its size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ray_jobs.spectral import start_items
from services.core.losses import full_softmax
from services.core.metrics import ndcg_at, ranks_of
from services.core.models.recommender import WEIGHTS, Recommender
from services.core.models.sequences import Layout, Packed, Sequences, sequences_of
from services.core.models.sizes import EncoderConfig, StudentConfig
from services.core.models.student import Student
from services.core.models.teacher import Teacher

N_ROWS, N_CONTENT = 40, 16
TEACHER = EncoderConfig(dim=32, n_layers=2, n_heads=2, max_len=16, n_recent=3)
STUDENT = StudentConfig(dim=16, n_layers=1, n_heads=2, max_len=16, n_recent=3, teacher_dim=32)


def content(n_rows: int = N_ROWS) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, 2**31 - 1, (500, N_CONTENT)).astype(np.int32)
    tokens[0] = 0
    return tokens[:n_rows]


@pytest.fixture(params=["teacher", "student"])
def model(request: pytest.FixtureRequest) -> Recommender:
    torch.manual_seed(0)
    made: Recommender = (
        Teacher(TEACHER, n_rows=N_ROWS)
        if request.param == "teacher"
        else Student(STUDENT, n_rows=N_ROWS)
    )
    made.describe(content())
    assert made.encoder.recent is not None
    nn.init.normal_(made.encoder.recent.weight_KD)
    return made.eval()


def histories(n_users: int, length: int, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(n_users), length)
    times = np.cumsum(rng.integers(0, 50_000, n_users * length))
    rows = np.concatenate([1 + rng.permutation(N_ROWS - 1)[:length] for _ in range(n_users)])
    return sequences_of(users, rows, ["rating"] * len(rows), times, rng.uniform(1, 5, len(rows)))


def packed(sequences: Sequences, length: int) -> Packed:
    layout = Layout(sequences, length=length)
    return layout.lines(np.arange(layout.n_lines))


def inputs(sequences: Sequences, length: int) -> list[torch.Tensor]:
    lines = packed(sequences, length)
    return [torch.from_numpy(a) for a in (*lines.features, lines.segments)]


def test_overfits_ten_users(model: Recommender) -> None:
    lines = packed(histories(10, 12), 120)
    rows, types, gaps, segments, targets = (
        torch.from_numpy(a) for a in (*lines.features, lines.segments, lines.targets)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(150):
        hidden_ND = model(rows, types, gaps, segments)[targets > 0]
        table_VD = model.encoder.item_table()
        loss = full_softmax(hidden_ND, table_VD, model.bias_V, targets[targets > 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ranks = ranks_of(model.scores(hidden_ND).detach(), targets[targets > 0]).numpy()
    assert ndcg_at(ranks, 10) > 0.95


def test_a_later_event_changes_no_earlier_output(model: Recommender) -> None:
    rows, types, gaps, _ = inputs(histories(1, 30), 30)
    before = model(rows, types, gaps)
    rows[0, 20], types[0, 20], gaps[0, 20] = 7, 1, 9
    after = model(rows, types, gaps)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


def test_packed_and_alone_give_the_same(model: Recommender) -> None:
    sequences = histories(4, 10)
    together = model(*inputs(sequences, 40)).view(4, 10, -1)
    alone = model(*inputs(sequences, 10)[:3])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_positions_are_relative(model: Recommender) -> None:
    """With as many events as one layer sees, where the history was cut makes no difference."""
    model = type(model)(
        model.config_type(**{**vars(model.config), "n_layers": 1}),
        n_rows=N_ROWS,
    ).eval()
    rows, types, gaps, _ = inputs(histories(1, 36), 36)
    whole = model(rows, types, gaps)[:, -1]
    cut = model(rows[:, -16:], types[:, -16:], gaps[:, -16:])[:, -1]
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=1e-5)


def test_growing_keeps_old_outputs_and_training_goes_on(model: Recommender) -> None:
    rows, types, gaps, segments = inputs(histories(4, 10), 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        hidden = model(rows, types, gaps, segments)[0]
        table_VD = model.encoder.item_table()
        full_softmax(hidden[:-1], table_VD, model.bias_V, rows[0, 1:]).backward()
        optimizer.step()

    step()
    before = model.scores(model(rows, types, gaps, segments)[0])
    model.grow(content(N_ROWS + 9), optimizer=optimizer)
    after = model.scores(model(rows, types, gaps, segments)[0])
    torch.testing.assert_close(after[:, :N_ROWS], before)
    assert after.shape[1] == N_ROWS + 9
    assert after[:, N_ROWS:].std() > 0  # scored by its content
    grown = model.encoder.item_id.weight
    step()
    assert grown[N_ROWS:].abs().sum() > 0  # the optimizer knows the new rows
    with pytest.raises(ValueError, match="never shrinks"):
        model.grow(content(N_ROWS))


def test_saved_and_loaded_give_the_same(model: Recommender, tmp_path: Path) -> None:
    rows, types, gaps, _ = inputs(histories(2, 8), 8)
    model.save(tmp_path)
    loaded = type(model).load(tmp_path)
    assert torch.equal(
        loaded.scores(loaded(rows, types, gaps)[:, -1]),
        model.scores(model(rows, types, gaps)[:, -1]),
    )


def a_set_student() -> Student:
    torch.manual_seed(0)
    config = replace(STUDENT, n_layers=0, n_recent=0, ordered=False)
    student = Student(config, n_rows=N_ROWS).eval()
    student.describe(content())
    assert student.encoder.weight_V is not None
    nn.init.normal_(student.encoder.weight_V)
    return student


def test_a_set_has_no_order_and_users_in_one_line_stay_apart() -> None:
    student, sequences = a_set_student(), histories(4, 10)
    together = student(*inputs(sequences, 40)).view(4, 10, -1)
    alone = student(*inputs(sequences, 10)[:3])
    torch.testing.assert_close(together, alone)
    shuffled = student(*inputs(sequences.shuffled(np.random.default_rng(0)), 10)[:3])
    torch.testing.assert_close(shuffled[:, -1], alone[:, -1])
    assert not torch.allclose(shuffled[:, -2], alone[:, -2])  # of the first nine: others


@pytest.mark.parametrize("n_events", [1, 2, STUDENT.max_len, 2 * STUDENT.max_len])
def test_serving_scores_a_set_as_training_does(n_events: int) -> None:
    student = a_set_student()
    rows, types, gaps, _ = inputs(histories(1, n_events), n_events)
    served = student.for_serving().score_next(*(one[0].numpy() for one in (rows, types, gaps)))
    trained = student.scores(student(rows, types, gaps)[:, -1])[0]
    torch.testing.assert_close(torch.from_numpy(served), trained)


def test_weights_of_other_shapes_are_not_served(tmp_path: Path) -> None:
    student = Student(STUDENT, n_rows=N_ROWS)
    student.save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    Student.load_for_serving(tmp_path)
    for name in ("bias_V", "encoder.gap.weight", "encoder.blocks.0.up.bias"):
        save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=name):
            Student.load_for_serving(tmp_path)


def test_items_begin_beside_those_they_are_had_with() -> None:
    """Half of the users have odd items only, half even ones only."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 6)
    had = [1 + 2 * rng.permutation(20)[:6] + user % 2 for user in range(200)]
    rows, times = np.concatenate(had), np.arange(len(users))
    sequences = sequences_of(users, rows, ["rating"] * len(rows), times, np.ones(len(rows)))
    torch.manual_seed(0)
    model = Teacher(EncoderConfig(dim=8, n_layers=1, n_heads=1, max_len=16), n_rows=42)
    start_items(model, [sequences])
    table_VD = nn.functional.normalize(model.encoder.item_id.weight[1:41].detach())
    cosine_VV = table_VD @ table_VD.T
    same_VV = torch.arange(40)[:, None] % 2 == torch.arange(40) % 2
    assert cosine_VV[same_VV].mean() > cosine_VV[~same_VV].mean() + 0.2
    assert model.encoder.item_id.weight[0].abs().sum() == 0


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("n_events", [1, 2, STUDENT.max_len + 1, 2 * STUDENT.max_len])
def test_serving_scores_as_training_does(n_events: int, n_layers: int) -> None:
    torch.manual_seed(0)
    student = Student(replace(STUDENT, n_layers=n_layers), n_rows=N_ROWS).eval()
    student.describe(content())
    assert student.encoder.recent is not None
    nn.init.normal_(student.encoder.recent.weight_KD)
    for parameter in student.parameters():  # norms, too, away from where they begin
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    rows, types, gaps, _ = inputs(histories(1, n_events), n_events)
    served = student.for_serving().score_next(*(one[0].numpy() for one in (rows, types, gaps)))
    trained = student.scores(student(rows, types, gaps)[:, -1])[0]
    torch.testing.assert_close(torch.from_numpy(served), trained, atol=1e-5, rtol=1e-5)
    assert served[0] == -torch.inf
