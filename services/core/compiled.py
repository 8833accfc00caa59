"""Loops as machine code: Numba's, with what all of ours have in common.

Compiled at the first call, which takes seconds, and kept beside the source or in the user's cache
for the next process. They keep the interpreter's lock: giving it up and waiting for it again costs
more than they take.
"""

from collections.abc import Callable
from typing import Final, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])

# Sums in any order, but for NaN and infinity by the rules: models that have lost their mind show.
_FAST: Final = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function: F) -> F:
    """`function` as machine code, for the types that it is called with."""
    try:
        made = njit(cache=True, fastmath=_FAST)(function)
    except RuntimeError:  # nowhere to keep it: neither sources nor home may be written
        made = njit(fastmath=_FAST)(function)
    return cast(F, made)
