"""A Serve deployment that does nothing, of the same name and size of answer as ours."""

from typing import Any, Final

from fastapi import FastAPI, Request, Response
from ray import serve

from services.recommend.app import PATH

ANSWER: Final = b'{"items":"' + b"x" * 1_000 + b'"}'  # ten items with titles are about as long


def create_app() -> FastAPI:
    app = FastAPI()

    @app.post(PATH)
    async def recommend(http: Request) -> Response:
        await http.body()
        return Response(ANSWER, media_type="application/json")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


@serve.deployment(name="Recommendations")
@serve.ingress()
class Noop:
    """Built like `replica.Recommendations`."""

    async def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app()


def build(_: dict[str, Any]) -> serve.Application:
    deployment: serve.Deployment = Noop
    return deployment.bind()
