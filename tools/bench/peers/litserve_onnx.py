"""LitServe: a process that listens, and processes with a detector each."""

import json
from typing import Annotated, Any

import litserve
from fastapi import Body

from tools.bench.peers.detector import SETTINGS, Detector


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.detector = Detector()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def predict(self, x: bytes) -> dict[str, Any]:
        return self.detector(x)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    settings = json.loads(SETTINGS.read_text())
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=settings["workers"])
    server.run(host="127.0.0.1", port=settings["port"], num_api_servers=1, generate_client_file=False)
