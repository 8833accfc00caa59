"""The entry points as processes: they start, work, and stop in order on SIGTERM."""

import signal
import sys
from functools import partial
from pathlib import Path

import httpx

from services.core.eventlog import EventLog
from services.core.features import FeatureStore
from services.core.settings import Settings
from services.local import processes
from tests.component.test_worker import event, wait_for


def test_gateway_and_worker_stop_in_order_and_lose_nothing(
    settings: Settings, fresh_kafka: str, tmp_path: Path
) -> None:
    ports = {"gateway": processes.free_port(), "worker": processes.free_port()}
    own = settings.model_copy(
        update={
            "kafka_bootstrap": fresh_kafka,
            "gateway_port": ports["gateway"],
            "worker_metrics_port": ports["worker"],
            "log_flush_s": 600.0,  # what is logged was flushed by the stop
        }
    )
    running = {
        name: processes.Process(
            processes.Command(
                name=name,
                argv=[sys.executable, "-m", f"services.ingest.{name}"],
                ready=partial(processes.listens, port),
                env=own.environment(),
                ready_timeout_s=120.0,
            ),
            logs=tmp_path,
        )
        for name, port in ports.items()
    }
    try:
        for process in running.values():
            process.wait_ready()
        sent = [event(n, user="processes-user").model_dump(exclude_none=True) for n in range(3)]
        url = f"http://127.0.0.1:{ports['gateway']}/v1/events"
        httpx.post(url, json=sent).raise_for_status()
        features = FeatureStore(own)
        wait_for(lambda: features.read_users(["processes-user"])[0].n_events == 3)
        metrics = httpx.get(f"http://127.0.0.1:{ports['worker']}/metrics").text
        assert 'reflux_worker_events_total{type="view"} 3.0' in metrics
        assert EventLog(own.offline).end() == {}
        for process in running.values():
            process._popen.send_signal(signal.SIGTERM)
            assert process._popen.wait(timeout=30) == 0
        assert len(EventLog(own.offline).read()) == 3
    finally:
        for process in running.values():
            process.stop()
