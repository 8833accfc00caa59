"""Loops as machine code: Numba's, with what all of ours have in common.

Compiled at the first call, which takes seconds, and kept beside the source or in the user's cache
for the next process. They keep the interpreter's lock: giving it up and waiting for it again costs
more than they take.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])

# Sums in any order, but for NaN and infinity by the rules: models that have lost their mind show.
_FAST: Final = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function: F) -> F:
    """`function` as machine code, for the types that it is called with."""
    return _made(function, nogil=False)


def compiled_aside(function: F) -> F:
    """The same for what takes so long that other threads should go on meanwhile."""
    return _made(function, nogil=True)


def _made(function: F, *, nogil: bool) -> F:
    how: dict[str, Any] = {"fastmath": _FAST, "nogil": nogil}
    try:
        return cast(F, njit(cache=True, **how)(function))
    except RuntimeError:  # nowhere to keep it: neither sources nor home may be written
        return cast(F, njit(**how)(function))
