"""The engine alone: `python -m services.local.serving_bench.engine_loop SECONDS`, one core.

Histories are read once and the serving version loaded once; then one answer after another, and the
times on stdout as the generator writes them.
"""

import json
import random
import sys
import time
from dataclasses import asdict

import torch

from services.core.features import FeatureStore
from services.core.registry import Registry
from services.core.settings import Settings
from services.local.serving_bench.generator import Measured, quantiles_ms
from services.recommend.engine import rank
from services.recommend.live import load_apart
from services.recommend.schema import RecommendRequest

WARM_UP_S = 1.0


def main() -> None:
    given = json.load(sys.stdin)
    settings, seconds = Settings.load(), float(given["seconds"])
    torch.set_num_threads(1)
    registry = Registry(settings.registry)
    version = registry.serving("student").version
    model = load_apart(registry, version, exact_items=settings.exact_items)
    histories = FeatureStore(settings, timeout_s=30.0).read_users(given["user_ids"])
    random.Random(0).shuffle(histories)
    request, now_ms = RecommendRequest(n=given["n"]), time.time_ns() // 1_000_000

    latencies_s: list[float] = []
    ends_s = time.perf_counter() + WARM_UP_S
    for measuring in (False, True):
        began_s, cpu_s = time.perf_counter(), time.process_time()
        if measuring:
            ends_s = began_s + seconds
            latencies_s.clear()
        while (at_s := time.perf_counter()) < ends_s:
            rank(model, request, histories[len(latencies_s) % len(histories)], now_ms=now_ms)
            latencies_s.append(time.perf_counter() - at_s)
    times_ms = quantiles_ms(latencies_s)
    measured = Measured(
        answers=len(latencies_s),
        failures={},
        degraded=0,
        per_s=len(latencies_s) / (time.perf_counter() - began_s),
        from_due_ms=times_ms,
        from_sent_ms=times_ms,
        mean_ms=1000 * sum(latencies_s) / max(1, len(latencies_s)),
        own_cpu_s=time.process_time() - cpu_s,
    )
    json.dump(asdict(measured), sys.stdout)


if __name__ == "__main__":
    main()
