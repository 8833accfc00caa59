import json
import logging
from pathlib import Path

import pytest

from services.core import logs
from services.core.settings import Settings


def test_one_json_object_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.configure(Settings(log_format="json", log_level="debug"))
        logger = logging.getLogger("reflux.test")
        logger.debug("applied", extra={"event_key": -7, "partition": 1})
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("failed")
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
    applied, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (applied["event_key"], applied["level"]) == (-7, "debug")
    assert (applied["logger"], applied["message"]) == ("reflux.test", "applied")
    assert "two\nlines" in failed["error"]
