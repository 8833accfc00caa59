"""Who may use the console, and from where: keys and roles, host names, forged requests, headers.

Without keys the console is open to this machine, as the other doors are. A browser is a way around
that: a page from elsewhere could send requests to it (so whatever changes something must come from
our own page), or point a host name of its own at it (so names are refused that aren't this
machine's).
"""

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core.access import Role
from services.core.errors import ForbiddenError
from services.core.settings import LOOPBACK, Settings

CSP: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS: Final = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# A file's name holds its version, or a page asks each time whether it has changed.
FOR_EVER: Final = "public, max-age=31536000, immutable"
ASK_FIRST: Final = "no-cache"
NEVER: Final = "no-store"


class Guard:
    """Decides about requests by their headers. Pure."""

    def __init__(self, settings: Settings) -> None:
        self._keys = settings.keys
        self._any_host = bool(settings.keys.roles_of) or settings.allow_open
        self._own_host = settings.host

    def enter(self, headers: Mapping[str, str], role: Role | None = None) -> frozenset[Role]:
        """The roles of whoever asks. Raises `AccessError` for a stranger, and for one without
        `role` where one is needed."""
        self._check_host(headers.get("host", ""))
        roles = self._keys.roles(headers.get("authorization"))
        if role is not None and role not in roles:
            raise ForbiddenError(f"this key doesn't have the role {role!r}")
        return roles

    def change(self, headers: Mapping[str, str], role: Role | None = None) -> None:
        """The same for a request that changes something."""
        self.enter(headers, role)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        foreign = origin is not None and _netloc(origin) != headers.get("host")
        if foreign or site not in (None, "same-origin"):
            raise ForbiddenError("this comes from another site's page; use the console's own")
        if headers.get("content-type", "").partition(";")[0] != "application/json":
            raise ForbiddenError("send it as `content-type: application/json`")

    def _check_host(self, host: str) -> None:
        if self._any_host:
            return
        name = _netloc(f"//{host}", without_port=True)
        if name in (*LOOPBACK, self._own_host) or _is_address(name):
            return
        raise ForbiddenError(
            f"host {name!r} is no name of this machine: use its address, or set REFLUX_API_KEYS"
        )


class SecureHeaders:
    """Adds `HEADERS`, and how long each thing may be kept, to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        kept = FOR_EVER if path.startswith("/static/vendor/") else ASK_FIRST
        if path.startswith("/api/"):
            kept = NEVER

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", kept)
            await send(message)

        await self._app(scope, receive, answer)


def _netloc(url: str, *, without_port: bool = False) -> str:
    """Of which host a URL is; the empty one where it is none."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "") if without_port else parts.netloc
    except ValueError:  # an unclosed bracket
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
