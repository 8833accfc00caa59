"""How the workers of a job find each other: Ray Train's torch backend, kept to loopback where the
node is.

Worker 0 hosts torch's key-value store, which listens on every interface, without asking who comes,
and neither Ray Train nor torch's `env://` has a setting for that.
"""

import importlib
import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

LOOPBACK = "127.0.0.1"


class RendezvousConfig(TorchConfig):
    """`TorchTrainer(torch_config=RendezvousConfig(), ...)`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_stay_on_loopback)
        super().on_start(worker_group, backend_config)


def _stay_on_loopback() -> None:
    """In a worker, before it joins."""
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    # The module: `torch.distributed.rendezvous` as an attribute is its function of that name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    everywhere = rendezvous.TCPStore

    def on_loopback(*, port: int, is_master: bool, **given: Any) -> Any:
        if is_master:
            given["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
        return everywhere(port=port, is_master=is_master, **given)

    rendezvous.TCPStore = on_loopback
