"""Worker processes that tests share, for starting one takes longer than what it does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What two workers, and then three, have left behind; this process is the first of them."""
    from tests.unit.test_workers import work

    home, n_threads = tmp_path_factory.mktemp("together"), torch.get_num_threads()
    others = spawn(other, args=(home,), nprocs=2, join=False)
    assert others is not None
    try:
        torch.set_num_threads(1)
        work(0, home)
        while not others.join():
            pass
        yield home
    finally:
        torch.set_num_threads(n_threads)
        for process in others.processes:
            process.terminate()


def other(index: int, home: Path) -> None:
    from tests.unit.test_workers import work

    torch.set_num_threads(1)
    work(index + 1, home)
