"""Answers after `rehearse`, in a process of its own: prints what they had compiled nevertheless."""

import math

from numba.core import event

from services.core import protos
from services.core.history import UserHistory
from services.core.models.sizes import StudentConfig
from services.core.models.student import Student
from services.recommend.engine import Model, rank
from services.recommend.items import Items
from services.recommend.live import rehearse
from services.recommend.schema import RecommendRequest
from tests.students import catalog, item

N_EVENTS = 200


def main() -> None:
    made = catalog()
    config = StudentConfig(dim=8, n_layers=2, n_heads=2, max_len=8, n_recent=2, teacher_dim=8)
    model = Model(
        version=1,
        teacher_version=None,
        arrivals_ms=(),
        student=Student(config, n_rows=len(made)).for_serving(),
        catalog=Items.of(made.to_table()),
    )
    history = UserHistory(
        user_id="u",
        item_ids=tuple(item(i % 30) for i in range(N_EVENTS)),
        event_types=("rating",) * N_EVENTS,
        timestamps_ms=tuple(range(N_EVENTS)),
        values=(4.0, math.nan) * (N_EVENTS // 2),
        event_keys=tuple(range(N_EVENTS)),
        n_events=N_EVENTS,
    )
    row = {name: value.SerializeToString() for name, value in protos.user_features(history).items()}
    rehearse()
    late = event.RecordingListener()
    with event.install_listener("numba:compile", late):
        for stored in (protos.peeked_history("u", row), history, None):
            for asked in (
                RecommendRequest(user_id="u"),
                RecommendRequest(recent_items=[item(40), "new"], exclude=[item(41)]),
                RecommendRequest(categories=["Comedy"], include_seen=True),
            ):
                assert rank(model, asked, stored, now_ms=1_000).rows
    print(sorted({one.data["dispatcher"].py_func.__name__ for _, one in late.buffer}))  # noqa: T201


if __name__ == "__main__":
    main()
