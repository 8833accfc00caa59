"""How our processes log: a line of text, or one JSON object a line for those who collect them.

Logs carry no payloads and no ids of users. What follows one event from the gateway to the answers
that know it is its `event_key`, the hash of its `event_id` by which histories know it, at level
debug; an answer's line adds its `request_id`, which is also the event id of its impression.
"""

import logging
from typing import Final

import orjson

from services.core.settings import Settings

TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """time (UTC ms), level, logger, message, and whatever `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _ORDINARY},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure(settings: Settings) -> None:
    """For entry points: this process's root logger."""
    handler = logging.StreamHandler()
    text = settings.log_format == "text"
    handler.setFormatter(logging.Formatter(TEXT) if text else JsonFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    # They tell of every connection, and on a busy machine of every loop that took .1 s.
    logging.getLogger("kafka").setLevel(logging.WARNING)
    logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)
    logging.getLogger("numba").setLevel(logging.WARNING)  # of every instruction that it compiles
