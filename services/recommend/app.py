"""The HTTP side of the answers: an ASGI app that Ray Serve, uvicorn and tests run alike."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

import orjson
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from services.core.errors import AccessError, ForbiddenError, InvalidEventError, UnavailableError
from services.core.paths import allow_anything, id_after
from services.core.settings import Settings
from services.recommend.schema import (
    MAX_BODY_BYTES,
    BatchAnswer,
    BatchRequest,
    Problems,
    RecommendAnswer,
    RecommendRequest,
    UserAnswer,
    Wanted,
    problem,
    problems,
)
from services.recommend.service import NoModelError, Recommender

RETRY_AFTER_S: Final = 1
PATH: Final = "/v1/recommendations"
USERS_PATH: Final = "/v1/users/"
MAX_EVENTS: Final = 4096  # of one history
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": Problems, "description": "no API key, or an unknown one"},
    403: {"model": Problems, "description": "the API key lacks the role"},
    413: {"model": Problems, "description": "the body is too large"},
    422: {"model": Problems, "description": "what is wrong, field by field, and the fix"},
    503: {"model": Problems, "description": "no model yet; try again after Retry-After"},
}

USER_ERRORS: Final = {**ERRORS, 503: {"model": Problems, "description": "Redis doesn't answer"}}


class DirectRoute(APIRoute):
    """Documented by FastAPI, called without its handling of parameters and responses."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        return self.endpoint


class Application(FastAPI):
    """FastAPI, but for answers: they go by none of its middleware and routing, which cost 57 us
    a request; this way costs 17."""

    answer: Callable[[Request], Awaitable[Response]]  # `POST PATH`, raising nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            response = await self.answer(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings) -> Application:
    """The application; connects to Redis, Kafka and the registry when it starts, not before."""
    recommender = Recommender(settings)
    keys = settings.keys
    allow_anything()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await recommender.start()
        try:
            yield
        finally:
            await recommender.stop()

    app = Application(
        title="Reflux: recommendations",
        description="Answers from a student that never stops learning.",
        lifespan=lifespan,
    )
    router = APIRouter(route_class=DirectRoute)

    @router.post(
        PATH,
        response_model=RecommendAnswer,
        responses=ERRORS,
        summary="Recommend items to a user or a session",
        openapi_extra=_takes(RecommendRequest),
    )
    async def recommend(http: Request) -> Response:
        began_s = time.perf_counter()
        try:
            request = await validated(http, RecommendRequest)
        except AccessError as error:
            return await refused(http, error)
        return request if isinstance(request, Response) else await answer(request, began_s)

    @router.post(
        f"{PATH}:batch",
        response_model=BatchAnswer,
        responses=ERRORS,
        summary="Recommend items to up to 1,000 users; none of it counts as shown",
        openapi_extra=_takes(BatchRequest),
    )
    async def recommend_batch(http: Request) -> Response:
        request = await validated(http, BatchRequest)
        if isinstance(request, Response):
            return request
        try:
            content = await recommender.answer_many(request)
        except NoModelError as error:
            return refuse(503, problem(str(error)))
        recommender.telemetry.answers.labels("200", "batch").inc(len(request.user_ids))
        return Response(content, media_type="application/json")

    async def validated(http: Request, model: type[Wanted]) -> Any:
        """The body as a `model`, or the refusal."""
        keys.check(http.headers.get("authorization"), "recommend")
        body = await _body(http)
        if body is None:
            fix = f"the body may have at most {MAX_BODY_BYTES} bytes"
            return refuse(413, problem(fix))
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            return refuse(422, problems(error.errors(), model))

    @app.get(
        PATH,
        response_model=RecommendAnswer,
        responses=ERRORS,
        summary="The same for people with a browser",
    )
    async def recommend_by_url(
        http: Request, request: Annotated[RecommendRequest, Query()]
    ) -> Response:
        keys.check(http.headers.get("authorization"), "recommend")
        return await answer(request, time.perf_counter())

    @app.get(
        USERS_PATH + "{user_id:anything}",
        response_model=UserAnswer,
        responses=USER_ERRORS,
        summary="What answers to a user go by: the latest interactions",
    )
    async def user(
        http: Request, user_id: str, n: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 50
    ) -> Response:
        keys.check(http.headers.get("authorization"), "recommend")
        try:
            exact = id_after(USERS_PATH, http, field="user_id")
            return _json(200, await recommender.user(exact, n=n))
        except InvalidEventError as error:
            wrong = {"field": error.field, "value": str(error.value), "fix": error.fix}
            return refuse(422, [wrong])
        except UnavailableError as error:
            return _refusal(503, problem(str(error)))

    async def answer(request: RecommendRequest, began_s: float) -> Response:
        try:
            content = await recommender.answer(request)
        except NoModelError as error:
            return refuse(503, problem(str(error)))
        response = _json(200, content)
        telemetry = recommender.telemetry
        telemetry.answers.labels("200", content["fallback"] or "none").inc()
        telemetry.answer_seconds.observe(time.perf_counter() - began_s)
        return response

    def refuse(status: int, detail: list[dict[str, Any]]) -> Response:
        recommender.telemetry.answers.labels(str(status), "none").inc()
        return _refusal(status, detail)

    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="A model answers", responses={503: ERRORS[503]})
    async def readyz() -> Response:
        try:
            return _json(200, {"model_version": recommender.model.version})
        except NoModelError as error:
            return _refusal(503, problem(str(error)))

    @app.get("/metrics", summary="Prometheus metrics of all replicas on this node")
    async def metrics() -> Response:
        return Response(recommender.telemetry.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def invalid_url(_: Request, error: RequestValidationError) -> Response:
        return refuse(422, problems(error.errors()))

    @app.exception_handler(AccessError)
    async def refused(_: Request, error: AccessError) -> Response:
        if isinstance(error, ForbiddenError):
            return refuse(403, problem(str(error)))
        response = refuse(401, problem(str(error)))
        response.headers["www-authenticate"] = "Bearer"
        return response

    app.include_router(router)
    # First, since Serve looks through them for the name of each request's route.
    app.router.routes.insert(0, app.router.routes.pop())
    app.answer = recommend
    return app


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI page: a JSON body of this model."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def _json(status: int, content: Any) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


def _refusal(status: int, detail: list[dict[str, Any]]) -> Response:
    response = _json(status, {"detail": detail})
    if status == 503:
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    return response


async def _body(http: Request) -> bytes | None:
    """The request's body; None where it is too large."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)
