"""An extracted archive in a process of its own, timed on demand. Run by `tools.bench.engine`, on its own code.

stdin: a line of JSON with `folder`, `config` and `pictures` (paths), then one for each order, {"do": name, ...}.
stdout: a line of JSON for each of these, {"error": text} where the archive does not load or answer.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

JPEG = {"Content-Type": "image/jpeg"}


def main() -> None:
    began = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    orders = (json.loads(line) for line in sys.stdin)
    given = next(orders)

    from handlers.lean_import import import_torchvision

    import_torchvision()
    from handlers.errors import MarinaError

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        engine = Timed(given["folder"], given["config"], [Path(path).read_bytes() for path in given["pictures"]])
        engine.request(0)
        answer({"first_answer_s": time.perf_counter() - began})
        for order in orders:
            answer(getattr(engine, order.pop("do"))(**order))
    except MarinaError as error:
        answer({"error": str(error)})


class Timed:
    """The pipeline of an archive, with a clock."""

    def __init__(self, folder: str, config: dict[str, Any], pictures: list[bytes]):
        from handlers.pipeline import Pipeline

        self.pipeline = Pipeline.load(Path(folder), config)
        self.pictures = pictures
        self._seen: tuple[Any, ...] = ()
        self._candidates = self.pipeline.network.candidates
        self.pipeline.network.candidates = self._remember  # type: ignore[assignment, method-assign]  # in this process alone

    def _remember(self, *arguments: Any) -> Any:
        self._seen = arguments
        return self._candidates(*arguments)

    def request(self, turn: int) -> None:
        """One request from its bytes to those of its answer. Raises BadArchive when it is refused."""
        from handlers.errors import BadArchive

        job = self.pipeline.read({"body": self.pictures[turn % len(self.pictures)]}, JPEG)
        self.pipeline.infer([job])
        found = self.pipeline.respond(job)
        if found.status != 200:
            raise BadArchive(f"the picture gets no answer but {found.body.decode()}; give another with --image")

    def requests(self, runs: int) -> list[float]:
        """Milliseconds of each request, one after the other, pictures in turn."""
        return [self._clock(self.request, turn) for turn in range(runs)]

    def network(self, runs: int) -> list[float]:
        """Milliseconds of the network alone, each time on the tensor that the first picture becomes."""
        import torch

        self.request(0)
        with torch.inference_mode():
            return [self._clock(self._network_once) for _ in range(runs)]

    def _network_once(self) -> None:
        import torch

        self._candidates(*self._seen)
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()

    def loop(self, seconds: float) -> float:
        """Pictures a second of a plain loop: decode, letterbox, network, suppression, without request and answer."""
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            self.pipeline.detect([self.pictures[count % len(self.pictures)]], self.pipeline.defaults)
            count += 1
        return count / elapsed

    def _clock(self, work: Any, *arguments: Any) -> float:
        began = time.perf_counter()
        work(*arguments)
        return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    main()
