"""mosec: a process in Rust that listens, and processes with a detector each. Its command line says where."""

import json
from typing import Any

from mosec import Server, Worker

from tools.bench.peers.detector import SETTINGS, Detector


class DetectionWorker(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.detector = Detector()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> dict[str, Any]:
        return self.detector(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(DetectionWorker, num=json.loads(SETTINGS.read_text())["workers"])
    server.run()
