"""Who may do what over HTTP: API keys with roles. Pure.

`REFLUX_API_KEYS=produce:KEY1,recommend:KEY2,produce+recommend+operate:KEY3`; a caller sends
`Authorization: Bearer KEY`. Without keys everyone may do everything, which settings allow on
loopback only.
"""

import hmac
from dataclasses import dataclass
from typing import Literal, get_args

from services.core.errors import ForbiddenError, SettingsError, UnauthorizedError

Role = Literal["produce", "recommend", "operate"]

MIN_KEY_CHARS = 16
_FORM = "must be role[+role]:key[,...] with roles among " + ", ".join(get_args(Role))


@dataclass(frozen=True)
class Keys:
    """Keys and the roles that each opens; none: open to everyone."""

    roles_of: dict[bytes, frozenset[Role]]

    @classmethod
    def parse(cls, text: str) -> "Keys":
        """Raises `SettingsError`, which never shows a key."""
        roles_of: dict[bytes, frozenset[Role]] = {}
        for number, entry in enumerate(filter(None, text.split(",")), start=1):
            names, _, key = entry.strip().partition(":")
            roles = [role for role in get_args(Role) if role in names.split("+")]
            if len(roles) != len(names.split("+")):
                raise SettingsError(f"REFLUX_API_KEYS, key {number}: {_FORM}")
            if len(key) < MIN_KEY_CHARS:
                raise SettingsError(
                    f"REFLUX_API_KEYS, key {number}: must have at least {MIN_KEY_CHARS} "
                    "characters; `openssl rand -hex 16` makes one"
                )
            roles_of[key.encode()] = frozenset(roles)
        return cls(roles_of)

    def check(self, authorization: str | None, role: Role) -> None:
        """Raise `UnauthorizedError` or `ForbiddenError` unless the header's key opens `role`."""
        if role not in self.roles(authorization):
            raise ForbiddenError(f"this key doesn't have the role {role!r}")

    def roles(self, authorization: str | None) -> frozenset[Role]:
        """What the header's key opens; everything where there are no keys. Raises
        `UnauthorizedError` for a key that nobody gave out."""
        if not self.roles_of:
            return frozenset(get_args(Role))
        scheme, _, given = (authorization or "").partition(" ")
        found: frozenset[Role] | None = None
        for key, roles in self.roles_of.items():  # all of them: time tells nothing about any
            if hmac.compare_digest(key, given.strip().encode()):
                found = roles
        if found is None or scheme.lower() != "bearer":
            raise UnauthorizedError("send `Authorization: Bearer KEY` with a key of this Reflux")
        return found

    def header(self, role: Role) -> dict[str, str]:
        """What our own clients send to be let in; empty where no key is needed."""
        for key, roles in self.roles_of.items():
            if role in roles:
                return {"authorization": f"Bearer {key.decode()}"}
        return {}
