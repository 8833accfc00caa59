"""The same engine and features behind LitServe: `python -m ...behind_litserve PORT`.

LitServe gives requests to a worker process by a queue; `enable_async` lets the worker take the
next one while the history of the last is read.
"""

import sys
from typing import Any

import litserve  # type: ignore[import-untyped]

from services.core.settings import Settings
from services.recommend.app import PATH
from services.recommend.schema import RecommendRequest
from services.recommend.service import Recommender


class Recommendations(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._recommender = Recommender(Settings.load())
        self._started = False

    async def decode_request(self, request: dict[str, Any]) -> RecommendRequest:
        return RecommendRequest.model_validate(request)

    async def predict(self, request: RecommendRequest) -> dict[str, Any]:
        if not self._started:  # in the loop that answers, which `setup` isn't in
            self._started = True
            await self._recommender.start()
        return await self._recommender.answer(request)

    async def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main() -> None:
    api = Recommendations(api_path=PATH, enable_async=True)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
