"""The same app under one uvicorn: `python -m services.local.serving_bench.bare PORT`."""

import sys

import uvicorn

from services.core.settings import Settings
from services.recommend.app import create_app


def main() -> None:
    uvicorn.run(
        create_app(Settings.load()),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
