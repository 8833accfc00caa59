"""The live page: `python -m services.console` serves it at `/` of REFLUX_CONSOLE_PORT.

Needs the settings of the deployment that it shows: REFLUX_REGISTRY_URI, REFLUX_GATEWAY_URL,
REFLUX_RECOMMEND_URL, REFLUX_METRICS_URLS; REFLUX_RAY_ADDRESS for the jobs' states and logs.
"""

import logging
import signal
import sys

import uvicorn

from services.console.app import create_app
from services.core import logs
from services.core.settings import Settings

USUAL_PORT = 8090


def main() -> None:
    settings = Settings.load()
    logs.configure(settings)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    # Uvicorn stops in order and then raises the signal again: that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.console_port or USUAL_PORT,
        log_config=None,  # ours
        access_log=False,
        timeout_graceful_shutdown=1,  # pages that are open would keep it for ever
    )


if __name__ == "__main__":
    main()
