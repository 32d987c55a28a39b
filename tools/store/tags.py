"""Tags: names for one push of a kind and name, moved one step at a time.

A move is an object of its own, numbered from 1 in eight decimal digits and made by a create-only write. Whoever finds
the next number taken reads what is there now and tries again, so that the moves of a tag are one line.
"""

import getpass
import json
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal, get_args

from tools.errors import ToolError
from tools.store.manifest import FORMAT, ID, NAME, Kind, Manifest, read_record
from tools.store.objects import Objects
from tools.strict import Strict

Tag = Literal["latest", "staging", "production"]
TAGS: tuple[Tag, ...] = get_args(Tag)
Action = Literal["tag", "promote", "rollback"]
ROLLBACK: Action = "rollback"
READERS = 8
# Each is lost only to a move of somebody else that was made.
MOVE_TRIES = 200
LONGEST_PAUSE_S = 1.0


class Move(Strict):
    """One move of a tag: of what to what, by whom and why. token: makes it like no other."""

    format: int
    number: int
    id: str
    previous: str | None
    action: Action
    why: str
    when: str
    who: str
    token: str


class Tags:
    """The tags of one kind and name."""

    def __init__(self, objects: Objects, kind: Kind, name: str):
        self._objects = objects
        self.kind = kind
        self.name = name

    def current(self, tag: Tag) -> Move | None:
        """The last move; None for a tag that was never set."""
        entries = self._objects.names(self._folder(tag))
        return self._read(entries[-1].name) if entries else None

    def history(self, tag: Tag) -> list[Move]:
        """All moves, the first one first. Raises ToolError when they are not one line."""
        names = [entry.name for entry in self._objects.names(self._folder(tag))]
        with ThreadPoolExecutor(READERS) as pool:
            moves = list(pool.map(self._read, names))
        before = None
        for number, move in enumerate(moves, 1):
            if move.number != number or move.previous != before:
                raise ToolError(f"tag {tag} of {self.name}: move {number} is missing or changed by hand")
            before = move.id
        return moves

    def move(self, tag: Tag, manifest: Manifest, action: Action, why: str) -> Move:
        """Point the tag at a push, whatever it points at; nothing is written when it points there already."""
        self._objects.check_exclusive()
        pause = 0.01
        for _ in range(MOVE_TRIES):
            last = self.current(tag)
            if last is not None and last.id == manifest.id:
                return last
            made = self._create(tag, last, manifest.id, action, why)
            if made:
                return made
            time.sleep(random.uniform(0, pause))  # noqa: S311  # not a secret
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise ToolError(f"tag {tag} of {self.name}: others moved it first, {MOVE_TRIES} times in a row; try again")

    def roll_back(self, tag: Tag, why: str, check: Callable[[str], None] = lambda id: None) -> Move:
        """Point the tag at what it pointed at before; once more, at what was before that. Raises ToolError when there
        is nothing, or when somebody else moves the tag at the same moment, and what `check` raises for the id."""
        self._objects.check_exclusive()
        moves = self.history(tag)
        line = standing(moves)
        if len(line) < 2:
            there = f"nothing stands before {line[-1]}" if line else "it was never set"
            raise ToolError(f"tag {tag} of {self.name} cannot go back: {there}")
        check(line[-2])
        made = self._create(tag, moves[-1], line[-2], ROLLBACK, why)
        if made is None:
            raise ToolError(f"tag {tag} of {self.name} was moved by somebody else just now; see `marina store history`")
        return made

    def _create(self, tag: Tag, last: Move | None, id: str, action: Action, why: str) -> Move | None:
        """None when somebody else has taken the number."""
        move = Move(
            format=FORMAT,
            number=last.number + 1 if last else 1,
            id=id,
            previous=last.id if last else None,
            action=action,
            why=" ".join(why.split()),
            when=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            who=who(),
            token=secrets.token_hex(16),
        )
        written = self._objects.create(f"{self._folder(tag)}{move.number:08}.json", move.model_dump_json().encode())
        return move if written else None

    def _read(self, name: str) -> Move:
        where = f"tag record {name}"
        try:
            content = json.loads(self._objects.read(name))
        except ValueError as error:
            raise ToolError(f"{where} is damaged ({error}); somebody changed the store by hand") from error
        return read_record(Move, content, where)

    def _folder(self, tag: Tag) -> str:
        return f"tags/{self.kind}/{self.name}/{tag}/"


def standing(moves: Sequence[Move]) -> list[str]:
    """The ids that a tag would go back through, the present one last: what was rolled back no longer counts."""
    line: list[str] = []
    for move in moves:
        if move.action == ROLLBACK:
            line.pop()
        else:
            line.append(move.id)
    return line


def who() -> str:
    """user@host; in a container the user may be a mere number."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def check_tag(text: str) -> Tag:
    """Raises ToolError for any other."""
    for tag in TAGS:
        if text == tag:
            return tag
    raise ToolError(f"{text!r} is no tag; there are {', '.join(TAGS)}")


def parse_target(text: str) -> tuple[str, Tag | None]:
    """`ID`, `NAME` or `NAME@TAG`. Raises ToolError for anything else."""
    name, at, tag = text.partition("@")
    if not (NAME.fullmatch(name) or ID.fullmatch(name)) or (at and ID.fullmatch(name)):
        raise ToolError(f"{text!r} is neither ID, NAME nor NAME@TAG; `marina store list` shows what there is")
    return name, check_tag(tag) if at else None
