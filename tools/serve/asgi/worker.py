"""One worker process: an extracted archive between the front's socket and `handlers.worker`, the archive's own.

    socket -> row -> Worker.read, in a thread -> batch -> Worker.infer, Worker.respond -> socket

While one batch is with the network, the next requests are read and decoded. A batch is all that is there, up to
batchSize; it waits for more, maxBatchDelay at most, only where more were under way when the last one was done: a lone
client never waits.

    python -m tools.serve.asgi.worker FD '{"config": …, "name": …, "gpu": …}'     in the archive's folder
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import yaml

from tools.serve.asgi.rows import BadForm, read_row
from tools.serve.asgi.wire import pack, read_frame

if TYPE_CHECKING:
    from handlers.metrics import Increase
    from handlers.pipeline import Answer, Job
    from handlers.worker import Worker


class Connection:
    """To the front. To be used by any threads."""

    def __init__(self, end: socket.socket):
        self._end = end
        self._stream = end.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next request. Ends the process where the front is gone."""
        try:
            frame = read_frame(self._stream)
        except OSError:
            frame = None
        if frame is None:
            os._exit(0)
        return frame

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        with self._lock:
            self._end.sendall(pack(head, len(body)) + body)

    def answer(self, number: int, answer: "Answer") -> None:
        self.send({"id": number, "status": answer.status, "type": answer.content_type}, answer.body)


class Batches:
    """What was read, in batches as large as is worth waiting for."""

    def __init__(self, size: int, delay_s: float):
        self._size = size
        self._delay_s = delay_s
        self._queue: SimpleQueue[tuple[int, Job]] = SimpleQueue()
        self._expected = 1

    def put(self, number: int, job: "Job") -> None:
        self._queue.put((number, job))

    def next(self) -> "list[tuple[int, Job]]":
        batch = [self._queue.get()]
        deadline = time.monotonic() + self._delay_s
        while len(batch) < self._size:
            left = deadline - time.monotonic() if len(batch) < self._expected else 0.0
            try:
                batch.append(self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait())
            except Empty:
                break
        return batch

    def done(self, batch: "list[tuple[int, Job]]") -> None:
        """Whoever was answered, or waits already, may well be there for the next one."""
        self._expected = len(batch) + self._queue.qsize()


def read_requests(connection: Connection, worker: "Worker", batches: Batches) -> None:
    """Until the front is gone."""
    from handlers.pipeline import Answer

    while True:
        head, body = connection.receive()
        number = head["id"]
        try:
            row = read_row(head["headers"], head["query"], body)
        except BadForm as error:
            refusal = {"code": 400, "type": "InvalidForm", "message": str(error)}
            connection.send({"id": number, "status": 400, "type": "application/json"}, json.dumps(refusal).encode())
            continue
        job = worker.read(row, head["headers"], head["request_id"])
        if isinstance(job, Answer):
            connection.answer(number, job)
        else:
            batches.put(number, job)


def work(connection: Connection, worker: "Worker", batches: Batches) -> None:
    """In the thread that has loaded the network, whose number of threads is that thread's own."""
    while True:
        batch = batches.next()
        jobs = [job for _, job in batch]
        worker.infer(jobs)
        for (number, _), answer in zip(batch, worker.respond(jobs), strict=True):
            connection.answer(number, answer)
        batches.done(batch)


def _guarded(task: Any, *arguments: Any) -> None:
    """Of a thread that is gone nobody would learn otherwise."""
    try:
        task(*arguments)
    except Exception:  # noqa: BLE001  # whatever it is, the front must see this process end
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    settings = json.loads(sys.argv[2])
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    from handlers.lean_import import import_torchvision

    # What TorchServe has its workers say too; the front puts the model's name before it.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import_torchvision()
    from handlers.metrics import COUNTERS
    from handlers.worker import Worker

    config = yaml.safe_load(Path(settings["config"]).read_text(encoding="utf-8"))
    worker = Worker(Path.cwd(), config, settings["name"], settings["gpu"])

    def count(increase: "Increase") -> None:
        labels = dict(zip(COUNTERS[increase.counter].dimensions, increase.of, strict=True))
        connection.send({"counter": increase.counter, "amount": increase.amount, "labels": labels})

    worker.figures.report(count)
    batches = Batches(settings["batch_size"], settings["batch_delay"])
    threading.Thread(target=_guarded, args=(read_requests, connection, worker, batches), daemon=True).start()
    connection.send({"ready": True})
    work(connection, worker, batches)


if __name__ == "__main__":
    main()
