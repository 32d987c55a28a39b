"""Which split a picture goes to: the same on every machine, alike in classes, without anything left to chance.

Iterative stratification for several labels a picture (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
Multi-Label Data", 2011): the rarest class first, each of its pictures to the split that lacks it most.
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
    lacking = {name: [count * fraction for fraction in fractions] for name, count in counts.items()}
    lacking_in_all = [len(pictures) * fraction for fraction in fractions]
    single = sorted(name for name, count in counts.items() if count == 1 and name != BACKGROUND)
    first = next(index for index, fraction in enumerate(fractions) if fraction > 0)
    placed: dict[str, str] = {}

    def place(key: str, index: int) -> None:
        placed[key] = SPLITS[index]
        lacking_in_all[index] -= 1
        for name in classes_of[key]:
            lacking[name][index] -= 1
            counts[name] -= 1

    for key in order:
        if set(classes_of[key]) & set(single):
            place(key, first)
    while len(placed) < len(pictures):
        rarest = min((count, name) for name, count in counts.items() if count)[1]
        for key in order:
            if key not in placed and rarest in classes_of[key]:
                # Of equals the one that lacks most pictures, then train before valid before test.
                place(key, max(_open(fractions), key=lambda i: (lacking[rarest][i], lacking_in_all[i], -i)))
    return placed, single


def _open(fractions: Sequence[float]) -> list[int]:
    return [index for index, fraction in enumerate(fractions) if fraction > 0]
