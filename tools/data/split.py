"""Which split a picture goes to: the same on every machine, alike in classes, without anything left to chance.

Iterative stratification for several labels a picture (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
Multi-Label Data", 2011): the rarest class first, each of its pictures to the split that lacks it most. How many
pictures a split takes is settled before that, so that a small set has no empty split.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from tools.data.dataset import SPLITS

BACKGROUND = ""  # stands for the class of pictures without a box, so that they are spread as well


def stratified(
    pictures: Mapping[str, frozenset[str]], fractions: Sequence[float], seed: int
) -> tuple[dict[str, str], list[str]]:
    """Split by picture, and the classes that have a single picture, which goes to the first split that takes any.

    pictures: content hash to the classes on it. fractions: of train, valid and test. The order within a class
    comes from the hashes and the seed, so neither names nor the order of files matter.
    """
    classes_of = {key: sorted(classes) or [BACKGROUND] for key, classes in pictures.items()}
    order = sorted(pictures, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    counts = Counter(name for classes in classes_of.values() for name in classes)
    room = totals(len(pictures), fractions)
    # In units of one picture divided by their number: whole numbers, so that equals are equal on every machine.
    lacking = {name: [count * total for total in room] for name, count in counts.items()}
    single = sorted(name for name, count in counts.items() if count == 1 and name != BACKGROUND)
    first = next(index for index, fraction in enumerate(fractions) if fraction > 0)
    placed: dict[str, str] = {}

    def place(key: str, index: int) -> None:
        placed[key] = SPLITS[index]
        room[index] -= 1
        for name in classes_of[key]:
            lacking[name][index] -= len(pictures)
            counts[name] -= 1

    for key in order:
        if set(classes_of[key]) & set(single):
            place(key, first)
    while len(placed) < len(pictures):
        rarest = min((count, name) for name, count in counts.items() if count)[1]
        for key in order:
            if key not in placed and rarest in classes_of[key]:
                # Of equals the split with the least room, which has the fewest chances to come.
                free = [index for index, count in enumerate(room) if count > 0]
                place(key, max(free, key=lambda i: (lacking[rarest][i], -room[i], -i)))
    return placed, single


def totals(count: int, fractions: Sequence[float]) -> list[int]:
    """Pictures of each split by largest remainder; one at least where the fraction is above 0 and there are enough."""
    parts = [int(count * fraction) for fraction in fractions]
    remainders = [count * fraction - part for fraction, part in zip(fractions, parts, strict=True)]
    for index in sorted(range(len(parts)), key=lambda i: -remainders[i])[: count - sum(parts)]:
        parts[index] += 1
    wanted = [index for index, fraction in enumerate(fractions) if fraction > 0]
    for index in wanted if count >= len(wanted) else []:
        if not parts[index]:
            parts[parts.index(max(parts))] -= 1
            parts[index] = 1
    return parts
