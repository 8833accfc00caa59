"""How the workers of a job find each other: torch's process group, which they alone join.

Ray Train's own `TorchConfig` does the same, but for two things. Here neither a job's driver nor
Train's controller imports torch: a job that is started again is back 8 s sooner on two cores. And
worker 0, which hosts torch's key-value store, keeps to the node's address: the store listens on
every interface otherwise, without asking who comes, and neither Ray Train nor torch's `env://` has
a setting for that.
"""

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from ray_jobs.imports import importing

LEAVE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class RendezvousConfig(BackendConfig):
    use_gpu: bool = False

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        return _on_its_device

    def to_dict(self) -> dict[str, Any]:
        return {"use_gpu": self.use_gpu}


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, RendezvousConfig)
        if len(worker_group) == 1:  # nobody to find
            return
        address, port = worker_group.execute_single(0, get_address_and_port)
        joins = [
            worker_group.execute_single_async(
                rank,
                _join,
                backend="nccl" if backend_config.use_gpu else "gloo",
                address=address,
                port=port,
                world_rank=rank,
                world_size=len(worker_group),
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_TIMEOUT_S)


def _join(*, backend: str, address: str, port: int, world_rank: int, world_size: int) -> None:
    """In a worker."""
    with importing():
        from ray.train.torch import config

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _stay_at_our_address()
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(
        backend=backend, world_rank=world_rank, world_size=world_size, init_method="env://"
    )


def _leave() -> None:
    import torch.distributed as dist
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=dist.is_initialized())


@contextmanager
def _on_its_device() -> Iterator[None]:
    """Around a worker's training loop."""
    with importing():
        import torch

    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    yield


def _stay_at_our_address() -> None:
    """In a worker, before it joins."""
    address = ray.util.get_node_ip_address()
    # The module: `torch.distributed.rendezvous` as an attribute is its function of that name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    everywhere = rendezvous.TCPStore

    def at_our_address(*, port: int, is_master: bool, **given: Any) -> Any:
        if is_master:
            given["master_listen_fd"] = socket.create_server((address, port)).detach()
        return everywhere(port=port, is_master=is_master, **given)

    rendezvous.TCPStore = at_our_address
