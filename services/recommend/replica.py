"""The answers as a Ray Serve deployment: what deploy/serve.yaml imports."""

from typing import Any, Final

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private import replica as serve_replica

from services.core import logs
from services.core.settings import Settings
from services.recommend.app import create_app
from services.recommend.deploy import scaling

EVERYWHERE: Final = "[::]:0"
LOOPBACK: Final = "127.0.0.1"


@serve.deployment
@serve.ingress()
class Recommendations:
    """One replica: the ASGI app with a model of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        logs.configure(settings)
        if ray.util.get_node_ip_address() == LOOPBACK:
            _keep_to_loopback()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings)


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` are settings by name, and win over the environment's."""
    settings = Settings.load(**args)
    deployment: serve.Deployment = Recommendations
    return deployment.options(**scaling(settings)).bind(settings)


def _keep_to_loopback() -> None:
    """Serve 2.60 lets every replica take pickled calls of other deployments on every interface,
    and has no setting for it. On a node that is itself on loopback only, neither may that be."""
    listen = serve_replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        return int(listen(server, f"{LOOPBACK}:0" if address == EVERYWHERE else address))

    serve_replica.add_port_to_grpc_server = on_loopback
