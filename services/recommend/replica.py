"""The answers as a Ray Serve deployment: what deploy/serve.yaml imports."""

from typing import Any

from fastapi import FastAPI
from ray import serve

from services.core.settings import Settings
from services.recommend.app import create_app


@serve.deployment
@serve.ingress()
class Recommendations:
    """One replica: the ASGI app with a model of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings)


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` are settings by name, and win over the environment's."""
    settings = Settings.load(**args)
    deployment: serve.Deployment = Recommendations
    return deployment.options(num_replicas=settings.replicas).bind(settings)
