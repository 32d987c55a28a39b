"""What callers own, by names that sort by age, and lists of it a page at a time."""

import secrets
from collections.abc import Iterable
from typing import Annotated

from fastapi import Query

MOST_LISTED = 100

After = Annotated[str, Query(description="`next` of the page before", max_length=32)]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]


def new_name(seconds: float) -> str:
    """32 hexadecimal digits: 8 of the time of creation, whole seconds since 1970, 8 of its fraction, 16 of chance."""
    return f"{int(seconds * 2**32):016x}{secrets.token_hex(8)}"


def page(names: Iterable[str], after: str, limit: int) -> tuple[list[str], str | None]:
    """The first names behind `after`, in order, and what to give as `after` for those that follow; None at the end."""
    left = sorted(name for name in names if name > after)
    return left[:limit], left[limit - 1] if len(left) > limit else None
