"""FastAPI and uvicorn: one process, the detector in a thread pool."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from tools.bench.peers.detector import SETTINGS, Detector

settings = json.loads(SETTINGS.read_text())
app = FastAPI()
pool = ThreadPoolExecutor(settings["workers"])
detector = Detector()


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    body = await request.body()
    return await asyncio.get_running_loop().run_in_executor(pool, detector, body)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=settings["port"])
