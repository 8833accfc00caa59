"""Every process's `/metrics`, read as one set of samples; and what can be told from such sets."""

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import urllib3
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from services.core.settings import Settings
from services.core.stackfile import read_stack

TIMEOUT_S: Final = 2.0
READ: Final = (  # how the lines begin that are read
    *("reflux_gateway_accepted_total", "reflux_worker_dead_letters_total"),
    *("reflux_worker_lag_events", "reflux_student_lag_events"),
    *("reflux_answers_total", "reflux_answer_features_failed_total"),
    *("reflux_answer_places_total", "reflux_answer_item_coverage"),
    *("reflux_student_loss", "reflux_teacher_trust"),
    *(
        f"reflux_{name}_seconds_bucket"
        for name in ("answer", "feature_freshness", "weight_freshness")
    ),
)

# What all endpoints expose, by endpoint and the sample's name: a process that starts anew starts
# its counters at 0, which only shows while they are kept apart.
Endpoint = dict[str, list[Sample]]
Samples = dict[str, Endpoint]


class Scraper:
    """Reads the endpoints of `settings`, or of the one-machine stack that runs in its home."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Not httpx: at 1 ms a request it would be half of a look's cost.
        self._http = urllib3.PoolManager(num_pools=64, timeout=TIMEOUT_S, retries=False)
        # Those of a lost node are silent together, for one timeout. Threads start when needed.
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="scrape")
        self.reached: dict[str, bool] = {}  # endpoint -> whether it answered last time

    def scrape(self) -> Samples:
        """Every sample of ours, of every endpoint that answers."""
        urls = self._endpoints()
        found = dict(zip(urls, self._threads.map(self._read, urls), strict=True))
        self.reached = {url: text is not None for url, text in found.items()}
        return {url: parsed(text) for url, text in found.items() if text is not None}

    def _read(self, url: str) -> str | None:
        """What an endpoint tells; None where it doesn't."""
        try:
            response = self._http.request("GET", f"{url}/metrics")
        except urllib3.exceptions.HTTPError:
            return None
        return response.data.decode() if response.status == 200 else None

    def _endpoints(self) -> list[str]:
        settings = self._settings
        if settings.metrics_urls:
            urls = [url.strip().rstrip("/") for url in settings.metrics_urls.split(",")]
            return list(dict.fromkeys(one for url in urls if url for one in _addresses(url)))
        stack = read_stack(settings)
        ports = list(stack["worker_metrics_ports"]) if stack else []
        if settings.student_metrics_port:
            ports.append(settings.student_metrics_port)
        urls = [settings.gateway_url, settings.recommend_url]
        return [*filter(None, urls), *(f"http://{settings.host}:{port}" for port in ports)]


def total(samples: Samples, name: str, **labels: str) -> int | None:
    """A counter's or gauge's value, summed over labels and processes."""
    found = _values(samples, name, labels)
    return int(sum(found)) if found else None


def highest(samples: Samples, name: str, **labels: str) -> float | None:
    """The highest value of a gauge that every process has for itself."""
    return max(_values(samples, name, labels), default=None)


def by_label(samples: Samples, name: str, label: str) -> dict[str, float]:
    """A gauge's values by one of its labels; the highest where several processes have it."""
    found: dict[str, float] = {}
    for sample in _all(samples, name):
        key = sample.labels[label]
        found[key] = max(sample.value, found.get(key, sample.value))
    return found


def increase(samples: Samples, name: str, *, since: Samples, **labels: str) -> float | None:
    """What a counter has grown by; None where nobody has it now."""
    if not _values(samples, name, labels):
        return None
    return sum(
        after - before if after >= before else after  # less than before: it began anew
        for url in samples
        for before, after in [(_sum(since, url, name, labels), _sum(samples, url, name, labels))]
    )


def buckets(samples: Samples, name: str, *, since: Samples) -> list[tuple[float, float]]:
    """(upper bound, cumulative count) of a histogram, over all processes, less what was before."""
    counts: dict[float, float] = {}
    for url, found in samples.items():
        now = _histogram(found, name)
        before = _histogram(since.get(url, {}), name)
        anew = any(count < before.get(bound, 0.0) for bound, count in now.items())
        for bound, count in now.items():
            counts[bound] = counts.get(bound, 0.0) + count - (0 if anew else before.get(bound, 0.0))
    return sorted(counts.items())


def quantile(buckets: Iterable[tuple[float, float]], q: float) -> float | None:
    """Quantile of a histogram given as (upper bound, cumulative count); None where it is empty."""
    ordered = sorted(buckets)
    if not ordered or ordered[-1][1] == 0:
        return None
    wanted = q * ordered[-1][1]
    below, low = 0.0, 0.0
    for bound, count in ordered:
        if count >= wanted:
            if bound == float("inf") or count == below:
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        below, low = count, bound
    return low


def parsed(text: str) -> dict[str, list[Sample]]:
    """The samples that somebody reads: the parser takes 20 us a line."""
    ours = "\n".join(line for line in text.splitlines() if line.startswith(READ))
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def _addresses(url: str) -> list[str]:
    """The URL by each address that its name stands for, as it is where there is none (yet)."""
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except OSError:
        return [url]
    hosts: list[Any] = sorted({entry[4][0] for entry in found})
    hosts = [f"[{host}]" if ":" in host else host for host in hosts]
    return [urlunsplit(parts._replace(netloc=f"{host}:{parts.port or 80}")) for host in hosts]


def _all(samples: Samples, name: str) -> list[Sample]:
    return [sample for found in samples.values() for sample in found.get(name, ())]


def _values(samples: Samples, name: str, labels: dict[str, str]) -> list[float]:
    return [s.value for s in _all(samples, name) if labels.items() <= s.labels.items()]


def _sum(samples: Samples, url: str, name: str, labels: dict[str, str]) -> float:
    found = samples.get(url, {}).get(name, ())
    return sum(s.value for s in found if labels.items() <= s.labels.items())


def _histogram(found: dict[str, list[Sample]], name: str) -> dict[float, float]:
    counts: dict[float, float] = {}
    for sample in found.get(f"{name}_bucket", ()):
        bound = float(sample.labels["le"])
        counts[bound] = counts.get(bound, 0.0) + sample.value
    return counts
