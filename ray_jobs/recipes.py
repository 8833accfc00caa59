"""Named, typed runs: what to train, how long, on what. `load("tiny_cpu")` gives a `Recipe`.

Add a recipe by adding a plain function to `RECIPES`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from ray_jobs.gate import Bar
from services.core.models.sizes import EncoderConfig, StudentConfig
from services.core.settings import Settings

Placement = Literal["PACK", "SPREAD"]  # workers on as few nodes as can be, or on as many


CHECKPOINTS_KEPT: Final = 2  # by the distillation job


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the teacher is trained. Training ends at `max_epochs` or `max_train_s`, whichever is
    first, and the learning rate comes down over whichever is nearer."""

    num_workers: int = 1
    shards: int = 0  # of users, equal numbers to each worker; 0: one a worker
    fsdp: bool = False  # each worker holds a part of the teacher, not all of it
    placement: Placement = "PACK"
    use_gpu: bool = False
    gpu_share: float = 1.0  # of one GPU for each worker; less leaves room for who labels there
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    niceness: int = 0  # > 0 where answers are served from the same cores
    max_epochs: float
    max_train_s: float
    refresh_epochs: float  # when a previous teacher is at hand to start from
    refresh_train_s: float
    line_events: int  # events per packed line: the longest context in training
    batch_lines: int  # packed lines per step and shard
    learning_rate: float
    refresh_learning_rate: float
    muon_factor: float = 3.3  # Muon's learning rate (the blocks' matrices) over AdamW's (the rest)
    warm_up: float = 0.05  # share of the run over which the learning rate rises
    weight_decay: float = 0.01
    spectral_start: bool = False  # items begin as co-occurrence places them, not at random
    sampled_negatives: int = 0  # 0: full softmax
    mask_seen: bool = True  # in the full softmax: what the user has had is no rival of the target
    last_slice: float = 0.02  # newest share of the log, judged before it is learned
    max_worse: float = 0.05  # a refresh this much worse there than its parent isn't promoted
    bf16: bool = False  # the encoder's products in bfloat16, on hardware that has it
    checkpoint_every_s: float = 30.0
    max_failures: int = 3  # killed workers survived

    def __post_init__(self) -> None:
        if self.n_shards % self.num_workers:
            raise ValueError(
                f"shards={self.shards}: must be a multiple of num_workers={self.num_workers}"
            )

    @property
    def n_shards(self) -> int:
        return self.shards or self.num_workers


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the student learns, for ever. A weight of 0 switches its term off."""

    num_workers: int = 1
    placement: Placement = "PACK"
    cpus_per_worker: float = 1.0
    threads_per_worker: int = 1
    niceness: int = 0  # > 0 where answers are served from the same cores
    label_actors: int = 1  # that share the labelling of each worker's micro-batches, at least
    label_actors_most: int = 1  # while the student waits for labels
    label_cpus: float = 1.0  # of each such actor
    label_gpus: float = 0.0  # the same, a fraction too; above 0 it labels on the GPU
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    hard_weight: float = 1.0
    soft_weight: float = 2.0
    hidden_weight: float = 1.0
    mask_seen: bool = True  # what the user has had is no rival of a hard label
    soft_tower: bool = True  # soft labels go to a tower of their own, not to the head that serves
    start_from_teacher: bool = True  # items begin as the first teacher sees them
    temperature: float = 2.0
    top_k: int = 64  # teacher candidates per event
    context_events: int = 50  # before the new events of a sequence
    keep_events: int = 2048  # remembered per user: context, what was seen, replay
    replay_weight: float = 1.0  # of a replayed event, against 1 for a new one
    replay_users: int = 2  # per micro-batch, each with a window of `context_events`
    teacher_half_life_events: int = 300_000  # trust in a teacher halves as it ages
    stale_teacher: bool = True  # keep scoring the first teacher, to show what ageing costs
    warm_up_s: float = 40.0  # on the log, before the first version
    warm_up_epochs: float = 4.0  # whichever ends first
    warm_up_events: int = 1_000_000  # the latest of the log
    warm_up_users: int = 8  # windows per step
    warm_up_label_every: int = 4  # steps; a teacher takes that much longer than the student
    warm_up_learning_rate: float = 1e-2
    poll_s: float = 0.5
    max_events: int = 2_000  # of one micro-batch
    bar: Bar = field(default_factory=Bar)
    failures_until_reset: int = 3  # rejections in a row until the job goes back to what serves

    def __post_init__(self) -> None:
        for name in ("hard_weight", "soft_weight", "hidden_weight", "replay_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: a weight is 0 (off) or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0")

    @property
    def needs_labels(self) -> bool:
        return self.soft_weight > 0 or self.hidden_weight > 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    teacher: EncoderConfig
    student: StudentConfig
    train: TrainConfig
    distill: DistillConfig = field(default_factory=DistillConfig)


def tiny_cpu() -> Recipe:
    """Two cores, a million events: teacher in 100 s, refreshes in less, a 1 ms student.

    A log of 50,000 events has its epochs before its seconds are over, at every refresh again, and
    without dropout the teacher knows it by heart (EXPERIMENTS.md).
    """
    teacher = EncoderConfig(
        dim=128, n_layers=2, n_heads=4, max_len=128, n_recent=4, dropout=0.2, content_buckets=2048
    )
    return Recipe(
        name="tiny_cpu",
        teacher=teacher,
        student=StudentConfig(
            dim=24,
            n_layers=1,
            n_heads=2,
            max_len=64,
            n_recent=4,
            content_buckets=256,
            teacher_dim=teacher.dim,
        ),
        train=TrainConfig(
            num_workers=2,
            niceness=15,
            max_epochs=6,
            max_train_s=100,
            refresh_epochs=1,
            refresh_train_s=45,
            line_events=256,
            batch_lines=2,
            learning_rate=6e-3,
            refresh_learning_rate=4e-3,
        ),
        distill=DistillConfig(niceness=10),
    )


def two_cores() -> Recipe:
    """Two cores and half an hour: a wider teacher than `tiny_cpu`'s, to its plateau."""
    tiny = tiny_cpu()
    teacher = dataclasses.replace(tiny.teacher, dim=192)
    return dataclasses.replace(
        tiny,
        name="two_cores",
        teacher=teacher,
        student=dataclasses.replace(tiny.student, dim=40, teacher_dim=teacher.dim),
        train=dataclasses.replace(
            tiny.train,
            max_epochs=10,
            max_train_s=1_800,
            refresh_epochs=0.5,
            refresh_train_s=600,
            refresh_learning_rate=1e-3,
        ),
        distill=dataclasses.replace(tiny.distill, warm_up_s=600, warm_up_label_every=1),
    )


def smoke_cpu() -> Recipe:
    """Seconds, not minutes: does the loop close? For tests; learns little."""
    tiny = tiny_cpu()
    teacher = dataclasses.replace(
        tiny.teacher, dim=32, n_layers=1, n_heads=2, max_len=64, dropout=0.0
    )
    return dataclasses.replace(
        tiny,
        name="smoke_cpu",
        teacher=teacher,
        student=dataclasses.replace(tiny.student, dim=16, teacher_dim=teacher.dim),
        train=dataclasses.replace(
            tiny.train, num_workers=1, max_epochs=3, max_train_s=15, refresh_epochs=1
        ),
        distill=dataclasses.replace(tiny.distill, warm_up_s=8, warm_up_epochs=1),
    )


def smoke_cluster() -> Recipe:
    """`smoke_cpu` over nodes: two workers each, on different ones; refreshes of 40 s, to be
    disturbed (`reflux bench cluster`)."""
    smoke = smoke_cpu()
    return dataclasses.replace(
        smoke,
        name="smoke_cluster",
        train=dataclasses.replace(
            smoke.train,
            num_workers=2,
            placement="SPREAD",
            refresh_epochs=1_000,
            refresh_train_s=40,
            checkpoint_every_s=3,
        ),
        distill=dataclasses.replace(smoke.distill, num_workers=2, placement="SPREAD"),
    )


def blocks_cpu() -> Recipe:
    """Interactions without an order (`--protocol blocks`): histories are read as sets. Most of it
    is where the items begin (`spectral`); more gradient steps than these overfit."""
    tiny = tiny_cpu()
    teacher = EncoderConfig(
        dim=1280, n_layers=0, n_heads=1, max_len=512, ordered=False, dropout=0.1, content_buckets=16
    )
    student = StudentConfig(
        dim=110,
        n_layers=0,
        n_heads=1,
        max_len=512,
        ordered=False,
        content_buckets=16,
        teacher_dim=teacher.dim,
    )
    return Recipe(
        name="blocks_cpu",
        teacher=teacher,
        student=student,
        train=dataclasses.replace(
            tiny.train,
            num_workers=1,
            max_epochs=0.02,
            max_train_s=600,
            refresh_epochs=0.02,
            refresh_train_s=300,
            batch_lines=4,
            learning_rate=1e-4,
            refresh_learning_rate=1e-4,
            weight_decay=0.0,
            spectral_start=True,
        ),
        distill=dataclasses.replace(
            tiny.distill,
            context_events=512,
            learning_rate=1e-4,
            hidden_weight=0.0,
            soft_tower=False,
            temperature=1.0,
            replay_users=0,
            warm_up_users=64,
            warm_up_epochs=0.5,
            warm_up_learning_rate=5e-4,
        ),
    )


def one_gpu() -> Recipe:
    """One GPU, tens of millions of events."""
    tiny = tiny_cpu()
    return dataclasses.replace(
        tiny,
        name="one_gpu",
        teacher=dataclasses.replace(
            tiny.teacher, dim=256, n_layers=8, n_heads=8, max_len=512, dropout=0.1
        ),
        student=dataclasses.replace(tiny.student, dim=64, n_layers=2, teacher_dim=256),
        train=dataclasses.replace(
            tiny.train,
            num_workers=1,
            use_gpu=True,
            niceness=0,
            cpus_per_worker=4,
            threads_per_worker=4,
            max_epochs=12,
            max_train_s=1800,
            refresh_epochs=0.5,
            refresh_train_s=600,
            line_events=1024,
            batch_lines=32,
            learning_rate=1e-3,
            refresh_learning_rate=3e-4,
            bf16=True,  # on an H100 1.9 times the steps a second
            checkpoint_every_s=60,
        ),
    )


def one_gpu_1m() -> Recipe:
    """One GPU, a million events: a teacher of four layers in two minutes, which labels there, too;
    the student learns on a CPU core: on a GPU its small steps are all launches."""
    two = two_cores()
    teacher = dataclasses.replace(two.teacher, dim=256, n_layers=4, n_heads=8, dropout=0.3)
    return dataclasses.replace(
        two,
        name="one_gpu_1m",
        teacher=teacher,
        student=dataclasses.replace(two.student, dim=80, teacher_dim=teacher.dim),
        train=dataclasses.replace(
            two.train,
            num_workers=1,
            use_gpu=True,
            gpu_share=0.5,
            niceness=0,
            max_epochs=12,
            batch_lines=8,
            weight_decay=0.1,
            refresh_learning_rate=1.5e-3,
        ),
        distill=dataclasses.replace(
            two.distill,
            temperature=1.0,  # as measured on the whole stream (EXPERIMENTS.md)
            label_gpus=0.2,
            warm_up_epochs=3.0,
        ),
    )


def many_gpus() -> Recipe:
    """Eight GPUs on any number of nodes; the catalog may be too large for a full softmax."""
    one = one_gpu()
    return dataclasses.replace(
        one,
        name="many_gpus",
        teacher=dataclasses.replace(one.teacher, dim=512, n_layers=12, max_len=1024),
        student=dataclasses.replace(one.student, teacher_dim=512),
        train=dataclasses.replace(
            one.train,
            num_workers=8,
            line_events=2048,
            sampled_negatives=8192,
            max_train_s=4 * 3600,
            refresh_train_s=3600,
        ),
        distill=dataclasses.replace(one.distill, num_workers=4, warm_up_users=32),
    )


RECIPES: Final[dict[str, Callable[[], Recipe]]] = {
    recipe.__name__: recipe
    for recipe in (
        tiny_cpu,
        two_cores,
        smoke_cpu,
        smoke_cluster,
        blocks_cpu,
        one_gpu_1m,
        one_gpu,
        many_gpus,
    )
}


def load(name: str) -> Recipe:
    """The recipe of that name; ValueError lists the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}: no such recipe; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def chosen(settings: Settings, name: str | None = None) -> Recipe:
    """The recipe of that name (None: the settings'), with as many workers as the settings ask."""
    recipe = load(name or settings.recipe)
    train, distill = recipe.train, recipe.distill
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(train, num_workers=settings.teacher_workers or train.num_workers),
        distill=dataclasses.replace(
            distill, num_workers=settings.student_workers or distill.num_workers
        ),
    )
