"""What `POST /v1/recommendations` takes and gives; also what the OpenAPI page shows."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from services.core.errors import shown
from services.core.events import Id

MAX_ITEMS: Final = 100
MAX_BATCH_USERS: Final = 1_000
MAX_BODY_BYTES: Final = 2**20

Category = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Wanted(BaseModel):
    """How much, and what not."""

    n: int = Field(10, ge=1, le=MAX_ITEMS)
    exclude: list[Id] = Field(
        default_factory=list, max_length=10_000, description="item ids never to answer with"
    )
    categories: list[Category] = Field(
        default_factory=list,
        max_length=64,
        description="an item must have at least one of these; case doesn't matter",
    )
    include_seen: bool = Field(False, description="also items that the user has interacted with")


class RecommendRequest(Wanted):
    """Whom to recommend to, how much, and what not. Neither user nor items: what is trending."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"user_id": "42", "n": 10, "categories": ["Comedy"]}]},
    )

    user_id: Id | None = None
    recent_items: list[Id] = Field(
        default_factory=list,
        max_length=1_000,
        description="item ids, oldest first: an anonymous session, or what the user did just now "
        "and the history may not hold yet",
    )


class BatchRequest(Wanted):
    """Many users at once, for e-mail and warm caches; what is wanted is the same for all."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"user_ids": ["42", "43"], "n": 10}]},
    )

    user_ids: list[Id] = Field(min_length=1, max_length=MAX_BATCH_USERS)

    def of(self, user_id: str) -> RecommendRequest:
        """The request of one of the users; it has been validated already."""
        wanted = {name: getattr(self, name) for name in Wanted.model_fields}
        return RecommendRequest.model_construct(user_id=user_id, recent_items=[], **wanted)


class RecommendedItem(BaseModel):
    item_id: str
    score: float = Field(description="higher is better; comparable within one answer only")
    title: str | None = None
    categories: list[str] | None = None


class RecommendAnswer(BaseModel):
    """The answer; fewer than `n` items where the filters leave fewer."""

    request_id: str = Field(description="also the event_id of the impression")
    user_id: str | None
    items: list[RecommendedItem] = Field(description="best first")
    model_version: int
    teacher_version: int | None = Field(description="the teacher that this student learned from")
    features_age_s: float | None = Field(
        description="since the user's features were written; null: there are none"
    )
    fallback: str | None = Field(
        description="null: personal; `trending`: what is popular now; `trending_categories`: what "
        "is popular now in the categories asked for"
    )
    degraded: bool = Field(description="the history could not be read in time")
    reason: str | None = Field(description="why degraded")
    ignored: list[str] = Field(
        description="ids in recent_items and exclude, and categories, that this model doesn't know"
    )


class UserEvent(BaseModel):
    item_id: str
    type: str
    timestamp: int = Field(description="event time, UTC milliseconds")
    value: float | None = None
    title: str | None = None
    categories: list[str] | None = None


class UserAnswer(BaseModel):
    """What answers to this user go by."""

    user_id: str
    n_events: int = Field(description="interactions so far")
    events: list[UserEvent] = Field(description="the latest interactions, newest first")


class BatchAnswer(BaseModel):
    """One answer per user, in the order asked for, all of one model version."""

    answers: list[RecommendAnswer]


class Problem(BaseModel):
    """One thing that is wrong with a request, and how to put it right."""

    field: str
    value: Any = None
    fix: str


class Problems(BaseModel):
    """The body of every answer that is not a 200."""

    detail: list[Problem]


def problem(fix: str) -> list[dict[str, Any]]:
    """A complaint about the request as a whole."""
    return [{"field": "", "value": None, "fix": fix}]


def problems(
    errors: Sequence[Any], model: type[BaseModel] = RecommendRequest
) -> list[dict[str, Any]]:
    """Pydantic's complaints about a `model` as field, value and fix."""
    return [_problem(error, model.model_fields) for error in errors]


def _problem(error: Any, fields: Iterable[str]) -> dict[str, Any]:
    # FastAPI puts the place before the field: "query".
    field = ".".join(str(part) for part in error["loc"] if part != "query")
    if error["type"] == "extra_forbidden":
        known = ", ".join(fields)
        value, fix = shown(error["input"]), f"no such field; there are {known}"
        return {"field": field, "value": value, "fix": fix}
    if error["type"] == "json_invalid":
        return problem(f"the body must be JSON ({error['ctx']['error']})")[0]
    return {"field": field, "value": shown(error["input"]), "fix": error["msg"]}
