"""How the workers of a job find each other: Ray Train's torch backend, kept to the node's address.

Worker 0 hosts torch's key-value store, which listens on every interface, without asking who comes,
and neither Ray Train nor torch's `env://` has a setting for that.
"""

import importlib
import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class RendezvousConfig(TorchConfig):
    """`TorchTrainer(torch_config=RendezvousConfig(), ...)`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_stay_at_our_address)
        super().on_start(worker_group, backend_config)


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
