"""One answer, from request to what was shown: history, ranking, impression, and their times."""

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import numpy as np
import orjson
import torch

from services.core.catalog import Catalog
from services.core.errors import UnavailableError
from services.core.features import FeatureStore, UserHistory
from services.core.kafka import Publisher
from services.core.pauses import settle
from services.core.registry import Registry
from services.core.settings import Settings
from services.recommend.engine import Model, Ranking, rank
from services.recommend.histories import Histories
from services.recommend.impressions import Impressions, Shown
from services.recommend.items import Card, Items
from services.recommend.live import LiveModel, rehearse
from services.recommend.schema import BatchRequest, RecommendRequest
from services.recommend.shown import ShownItems
from services.recommend.telemetry import NodeMetrics, Telemetry
from services.recommend.trial import LiveTrial, Running

BATCH_USERS: Final = 100  # of a batch that are read together

log = logging.getLogger(__name__)


class NoModelError(UnavailableError):
    """No student has been promoted yet."""


class Recommender:
    """What one replica holds: the live model, the way to the histories, the way of impressions."""

    def __init__(self, settings: Settings) -> None:
        self.telemetry = Telemetry()
        self._settings = settings
        several = max(settings.replicas, settings.max_replicas) > 1
        self._live = LiveModel(
            Registry(settings.registry),
            poll_s=settings.serving_poll_s,
            telemetry=self.telemetry,
            exact_items=settings.exact_items,
            shared=settings.home.absolute() / "served" if several else None,
        )
        self._trial = LiveTrial(
            Registry(settings.registry),
            poll_s=settings.serving_poll_s,
            exact_items=settings.exact_items,
        )
        self._impressions = Impressions(Publisher(settings), self.telemetry)
        self._shown = ShownItems(self.telemetry)
        self._histories: Histories | None = None
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="batches")
        port = settings.answers_metrics_port
        self._metrics = NodeMetrics(self.telemetry, host=settings.host, port=port) if port else None

    async def start(self) -> None:
        """Everything slow, before the first request: Feast's import takes seconds."""
        timeout_s = self._settings.feature_timeout_s
        store = await asyncio.to_thread(FeatureStore, self._settings, timeout_s=timeout_s)
        self._histories = Histories(store)
        # One answer, one core: replicas are how more cores are used.
        torch.set_num_threads(1)
        self._batches.submit(rehearse)
        await asyncio.to_thread(self._live.start)
        await asyncio.to_thread(self._trial.start)
        if self._settings.impressions:
            self._impressions.start()
        if self._metrics:
            self._metrics.start()
        settle()

    async def stop(self) -> None:
        await asyncio.to_thread(self._live.stop)
        await asyncio.to_thread(self._trial.stop)
        if self._settings.impressions:
            await asyncio.to_thread(self._impressions.stop)
        self._batches.shutdown(wait=False, cancel_futures=True)
        if self._histories:
            await self._histories.close()
        if self._metrics:
            await asyncio.to_thread(self._metrics.stop)

    @property
    def model(self) -> Model:
        """The version that answers now; an answer takes it once and keeps to it."""
        if self._live.model is None:
            raise NoModelError(
                f"no student has been promoted in {self._settings.registry} yet; the distillation "
                "job promotes the first one after its warm-up: try again in a moment"
            )
        return self._live.model

    async def answer(self, request: RecommendRequest) -> dict[str, Any]:
        """The fields of `RecommendAnswer`. Raises `NoModelError`; nothing else is a failure."""
        model, now_ms = self.model, time.time_ns() // 1_000_000
        running = self._trial.running if request.user_id else None
        split = running if running and running.trial.mode == "split" else None
        in_trial = running is not None and running.trial.takes(request.user_id or "")
        if split and in_trial:
            model = split.model
        began_s = time.perf_counter()
        history, reason = await self._history(request.user_id)
        read_s = time.perf_counter()
        ranking = rank(model, request, history, now_ms=now_ms)
        ranked_s = time.perf_counter()

        request_id = uuid.uuid4().hex
        cards = model.catalog.cards(ranking.rows)
        self._shown.add(model.catalog, ranking.rows)
        age_s = _age_s(history, now_ms)
        if age_s is not None:
            self.telemetry.features_age_seconds.observe(age_s)
        if request.user_id and cards and self._settings.impressions:
            shown = Shown(
                request_id=request_id,
                user_id=request.user_id,
                item_ids=[card.item_id for card in cards],
                model_version=model.version,
                fallback=ranking.fallback,
                now_ms=now_ms,
                trial=split.trial.arm(in_trial) if split else {},
            )
            if running and in_trial and not split:
                # After this answer is on its way.
                loop = asyncio.get_running_loop()
                loop.call_soon(self._offer_with_shadow, shown, running, request, history)
            else:
                self._impressions.offer(shown)
        if log.isEnabledFor(logging.DEBUG):
            newest = int(history.event_keys[-1]) if history and len(history.event_keys) else None
            log.debug(
                "answered",
                extra={
                    "request_id": request_id,
                    "event_key": newest,  # the last event that this answer knew
                    "model_version": model.version,
                    "degraded": reason is not None,
                },
            )
        self.telemetry.features_seconds.observe(read_s - began_s)
        self.telemetry.rank_seconds.observe(ranked_s - read_s)
        return {
            "request_id": request_id,
            "user_id": request.user_id,
            "features_age_s": age_s,
            **_content(model, ranking, cards, reason),
        }

    async def user(self, user_id: str, *, n: int) -> dict[str, Any]:
        """The fields of `UserAnswer`. Raises `UnavailableError` where Redis doesn't answer."""
        history = (
            await self._histories.read(user_id) if self._histories else UserHistory(user_id=user_id)
        )
        item_ids = history.item_ids[-n:]
        catalog = self._live.model.catalog if self._live.model else Items.of(Catalog().to_table())
        rows = catalog.rows(item_ids)
        columns = (
            item_ids,
            history.event_types[-n:],
            np.asarray(history.timestamps_ms[-n:], np.int64).tolist(),
            np.asarray(history.values[-n:], np.float64).tolist(),
            catalog.titles(rows),
            catalog.categories(rows),
        )
        names = ("item_id", "type", "timestamp", "value", "title", "categories")
        events = [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]
        return {"user_id": user_id, "n_events": history.n_events, "events": events[::-1]}

    def _offer_with_shadow(
        self,
        shown: Shown,
        running: Running,
        request: RecommendRequest,
        history: UserHistory | None,
    ) -> None:
        """The impression, with what the version that is tried out would have shown."""
        try:
            ranking = rank(running.model, request, history, now_ms=shown.now_ms)
            unseen = running.model.catalog.ids(ranking.rows)
            shown = replace(shown, trial=running.trial.unseen(unseen))
        finally:
            self._impressions.offer(shown)

    async def answer_many(self, request: BatchRequest) -> bytes:
        """A `BatchAnswer` as JSON. Raises `NoModelError`; nothing else is a failure.

        In a thread of its own, one batch after the other, so that single answers go on meanwhile.
        Nothing of it counts as shown: whether and when it will be, only the client knows.
        """
        loop, model = asyncio.get_running_loop(), self.model
        return await loop.run_in_executor(self._batches, self._answer_many, model, request)

    def _answer_many(self, model: Model, request: BatchRequest) -> bytes:
        answers: list[dict[str, Any]] = []
        user_ids = iter(request.user_ids)
        while together := list(islice(user_ids, BATCH_USERS)):
            histories, reason = self._histories_of(together)
            now_ms = time.time_ns() // 1_000_000
            for user_id, history in zip(together, histories, strict=True):
                ranking = rank(model, request.of(user_id), history, now_ms=now_ms)
                answers.append(
                    {
                        "request_id": uuid.uuid4().hex,
                        "user_id": user_id,
                        "features_age_s": _age_s(history, now_ms),
                        **_content(model, ranking, model.catalog.cards(ranking.rows), reason),
                    }
                )
                time.sleep(0)  # whoever waits for the interpreter goes first
        return orjson.dumps({"answers": answers})

    def _histories_of(
        self, user_ids: Sequence[str]
    ) -> tuple[Sequence[UserHistory | None], str | None]:
        """The users' histories, or None for each and why they could not be had."""
        nothing = [None] * len(user_ids)
        if self._histories is None:
            return nothing, None
        try:
            return self._histories.read_now(user_ids), None
        except UnavailableError as error:
            self.telemetry.features_failed.inc(len(user_ids))
            return nothing, _degraded(error)

    async def _history(self, user_id: str | None) -> tuple[UserHistory | None, str | None]:
        """The user's history, or None and why it could not be had."""
        if user_id is None or self._histories is None:
            return None, None
        try:
            return await self._histories.read(user_id), None
        except UnavailableError as error:
            self.telemetry.features_failed.inc()
            return None, _degraded(error)


def _age_s(history: UserHistory | None, now_ms: int) -> float | None:
    if history is None or not history.updated_ms:
        return None
    return max(0, now_ms - history.updated_ms) / 1000


def _degraded(error: UnavailableError) -> str:
    return f"answered without the history: {error}"


def _content(
    model: Model, ranking: Ranking, cards: list[Card], reason: str | None
) -> dict[str, Any]:
    """What of an answer depends on neither the request nor the user."""
    return {
        "items": [
            {
                "item_id": card.item_id,
                "score": score,
                "title": card.title,
                "categories": card.categories,
            }
            for card, score in zip(cards, ranking.scores, strict=True)
        ],
        "model_version": model.version,
        "teacher_version": model.teacher_version,
        "fallback": ranking.fallback,
        "degraded": reason is not None,
        "reason": reason,
        "ignored": ranking.ignored,
    }
