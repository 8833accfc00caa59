"""Every error a caller of Reflux may meet.

RefluxError
├── SettingsError            a setting has a value that can't be used
├── InvalidEventError        an event or item breaks its contract
├── DamagedFileError         a file of the offline log can't be read
├── DatasetError             an interaction log can't be found or read
├── UnavailableError         Kafka, the online store or Ray doesn't answer
│   ├── BusyError            more is under way than we hold: try again in a moment
│   └── DamagedRowError      one user's features can't be read
├── AccessError              the caller may not
│   ├── UnauthorizedError    no key or token, or another one
│   └── ForbiddenError       a key without the role
└── RegistryError            model artifacts
    ├── VersionNotFoundError
    ├── CorruptVersionError
    └── NothingServingError  nothing has been promoted yet

A message names the offending value and the fix; the CLI prints it without a traceback.
"""

from typing import Final

SHOWN_CHARS: Final = 200
RAY_TOKEN: Final = (
    "Ray at {} asks for its token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN too where the one "
    "in ~/.ray/auth_token isn't that cluster's"
)
MAX_EXACT: Final = 2**53  # beyond it JSON's readers differ


class RefluxError(Exception):
    """The root: `except RefluxError` catches whatever Reflux raises on purpose."""


class SettingsError(RefluxError):
    """A setting has a value that can't be used."""


class InvalidEventError(RefluxError):
    """An event or item breaks its contract.

    `field` is the dotted path of the offending field (empty: the whole record), `value` what
    stood there, `fix` one sentence on what would be accepted.
    """

    def __init__(self, *, field: str, value: object, fix: str) -> None:
        self.field = field
        self.value = value
        self.fix = fix
        super().__init__(f"{field or 'record'}={value!r}: {fix}")


class DamagedFileError(RefluxError):
    """A file of the offline log can't be read, or is not what was written."""


class DatasetError(RefluxError):
    """An interaction log can't be found or read."""


class UnavailableError(RefluxError):
    """Kafka, the online store or Ray doesn't answer within its deadline."""


class BusyError(UnavailableError):
    """More is under way already than we are willing to hold."""


class DamagedRowError(UnavailableError):
    """What the online store has of one user can't be read; of others it can."""


class AccessError(RefluxError):
    """The caller may not do this."""


class UnauthorizedError(AccessError):
    """No API key or token of Ray's, or an unknown one."""


class ForbiddenError(AccessError):
    """The API key lacks the role."""


class RegistryError(RefluxError):
    """Something is wrong with the model artifacts."""


class VersionNotFoundError(RegistryError):
    """No such version, or one without a manifest (which therefore doesn't exist)."""


class CorruptVersionError(RegistryError):
    """A version's files don't match the hashes in its manifest."""


class NothingServingError(RegistryError):
    """Nothing has been promoted yet."""


def shown(value: object) -> str | float | bool | None:
    """A value to quote in an answer: itself where any JSON can say it, which it can't say of NaN,
    huge numbers and bytes; else, and of what is long, the beginning of its text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) <= MAX_EXACT:
        return value
    text = str(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
