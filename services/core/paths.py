"""Ids in the paths of URLs: any characters will do, slashes and line ends too."""

from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request

from services.core.events import decode_id

ANYTHING: Final = "anything"  # "/v1/users/{user_id:anything}"


class _Anything(StringConvertor):
    """Starlette's `path` stops at a line end, and a last one it drops: a wish to forget "ann\\n"
    forgot ann."""

    regex = r"[\s\S]*"


def allow_anything() -> None:
    """Let routes made from now on use `{name:anything}`."""
    register_url_convertor(ANYTHING, _Anything())


def id_after(prefix: str, request: Request, *, field: str) -> str:
    """The id that the path ends with, from its bytes: what is no UTF-8 is nobody's id.

    Raises `InvalidEventError`.
    """
    raw: bytes = request.scope["raw_path"]
    return decode_id(unquote_to_bytes(raw.partition(prefix.encode())[2]), field=field)
