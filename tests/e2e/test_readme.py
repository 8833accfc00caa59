"""The README's examples do what they say, on the running stack."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import Running

README = Path(__file__).parents[2] / "README.md"


def example(language: str, word: str, running: Running) -> str:
    """The README's fenced block with that word in it, pointed at this stack's ports."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    block = next(block for block in blocks if word in block)
    settings = running.settings
    for usual, real in (
        ("http://127.0.0.1:8080", settings.gateway_url),
        ("http://127.0.0.1:8000", settings.recommend_url),
        ("127.0.0.1:9092", settings.kafka_bootstrap),
    ):
        block = block.replace(usual, real)
    return block


def test_the_curl_that_sends_an_event(running: Running) -> None:
    answer = json.loads(_shell(example("sh", "/v1/events", running)))
    assert answer == {"accepted": 1, "rejected": []}


def test_the_kafka_python_producer(running: Running) -> None:
    before = running.look().events_dead
    code = example("python", "KafkaProducer", running)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    running.wait_until(lambda: running.look().feature_lag_events == 0, "the event in features")
    assert running.look().events_dead == before


def test_the_curl_that_asks(running: Running) -> None:
    answer = json.loads(_shell(example("sh", "/v1/recommendations", running)))
    assert len(answer["items"]) == 3


def _shell(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout
