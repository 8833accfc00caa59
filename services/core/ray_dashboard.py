"""What every request to Ray's dashboard needs: a deadline, and the token where one is asked for."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

REQUEST_TIMEOUT_S: Final = 20.0


class WithDeadline:
    """Before a client of Ray's: its own requests wait for ever for a dashboard that hangs, and so
    would the supervisor."""

    def _do_request(self, *args: Any, **given: Any) -> Any:
        ask: Any = super()
        return ask._do_request(*args, **{"timeout": REQUEST_TIMEOUT_S, **given})


def ray_headers() -> dict[str, str]:
    """What Ray's dashboard asks for where its token auth is on, found where Ray itself looks."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
        with suppress(OSError):
            token = Path(path).read_text()
    return {"authorization": f"Bearer {token.strip()}"}
