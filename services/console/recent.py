"""What happens now: rates, latencies and freshness of the last seconds. Pure."""

from collections import deque
from dataclasses import asdict, dataclass
from typing import Final

from services.console.scrape import Endpoint, Samples, buckets, increase, quantile

NOW_S: Final = 10.0  # rates, latencies, feature freshness
SWAPS_S: Final = 60.0  # weight freshness is observed once every few seconds
PLACES_S: Final = 300.0  # what answers are made of
AWAY_S: Final = 3600.0  # whoever was out of reach for longer counts as new


@dataclass(frozen=True, kw_only=True)
class Recent:
    """None: nobody says, or nothing has happened in that time."""

    events_per_s: float | None = None
    dead_per_s: float | None = None
    answers_per_s: float | None = None
    degraded_per_s: float | None = None
    answer_p50_ms: float | None = None
    answer_p99_ms: float | None = None
    feature_freshness_p50_ms: float | None = None
    feature_freshness_p99_ms: float | None = None
    weight_freshness_p50_s: float | None = None
    cold_share: float | None = None  # of the places in answers
    popular_share: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Looks:
    """The samples of the last minutes: all of the last seconds, then one every ten."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Endpoint]] = {}  # when each was reached, what it said
        self._near: deque[tuple[float, Samples]] = deque()
        self._far: deque[tuple[float, Samples]] = deque()

    def add(self, at_s: float, samples: Samples) -> Recent:
        """Take in a look; what has happened lately. `at_s` is monotonic."""
        while self._near and self._near[0][0] < at_s - NOW_S - 2:
            self._near.popleft()
        while self._far and self._far[0][0] < at_s - PLACES_S:
            self._far.popleft()
        recent = self._recent(at_s, samples)
        known = self._known(at_s, samples)
        self._near.append((at_s, known))
        if not self._far or at_s - self._far[-1][0] >= NOW_S - 1:
            self._far.append((at_s, known))
        return recent

    def _known(self, at_s: float, samples: Samples) -> Samples:
        """These, and the last ones of whoever didn't answer: it goes on counting from there, and
        only a process that is new counts from 0."""
        self._last |= {url: (at_s, found) for url, found in samples.items()}
        self._last = {url: one for url, one in self._last.items() if at_s - one[0] <= AWAY_S}
        return {url: found for url, (_, found) in self._last.items()}

    def _recent(self, at_s: float, samples: Samples) -> Recent:
        if not self._near:
            return Recent()
        before_s, before = self._near[0]
        long_ago = self._far[0][1]
        swaps = next((old for then_s, old in self._far if then_s >= at_s - SWAPS_S), before)
        elapsed_s = max(at_s - before_s, 1e-3)

        def rate(name: str) -> float | None:
            found = increase(samples, name, since=before)
            return None if found is None else found / elapsed_s

        def milliseconds(name: str, q: float) -> float | None:
            found = quantile(buckets(samples, name, since=before), q)
            return None if found is None else 1000 * found

        def share(kind: str) -> float | None:
            places = increase(samples, "reflux_answer_places_total", since=long_ago)
            of_kind = increase(samples, "reflux_answer_places_total", since=long_ago, item=kind)
            return (of_kind or 0.0) / places if places else None

        weights = buckets(samples, "reflux_weight_freshness_seconds", since=swaps)
        return Recent(
            events_per_s=rate("reflux_gateway_accepted_total"),
            dead_per_s=rate("reflux_worker_dead_letters_total"),
            answers_per_s=rate("reflux_answers_total"),
            degraded_per_s=rate("reflux_answer_features_failed_total"),
            answer_p50_ms=milliseconds("reflux_answer_seconds", 0.5),
            answer_p99_ms=milliseconds("reflux_answer_seconds", 0.99),
            feature_freshness_p50_ms=milliseconds("reflux_feature_freshness_seconds", 0.5),
            feature_freshness_p99_ms=milliseconds("reflux_feature_freshness_seconds", 0.99),
            weight_freshness_p50_s=quantile(weights, 0.5),
            cold_share=share("cold"),
            popular_share=share("popular"),
        )
