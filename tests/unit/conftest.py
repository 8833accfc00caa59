"""Worker processes that tests share, for starting one takes longer than what it does."""

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

WORKERS = 3


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers, and then three, have left behind."""
    home = tmp_path_factory.mktemp("together")
    spawn(one_of_them, args=(home,), nprocs=WORKERS)
    return home


def one_of_them(rank: int, home: Path) -> None:
    from tests.unit.test_workers import work

    torch.set_num_threads(1)
    work(rank, home)
