"""Requests counted and timed, for Prometheus."""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.shadow.matching import Counts

NOTHING: Mapping[str, Counts] = {}


class Figures:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "marina_gateway_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "marina_gateway_request_seconds",
            "From a request's head to its last byte",
            ["route"],
            registry=self.registry,
        )
        self.under_way = Gauge("marina_gateway_under_way", "Requests under way", registry=self.registry)
        self.up = Gauge("marina_gateway_model_up", "1 for a model that answers", ["model"], registry=self.registry)
        self.shadow_pictures = Counter(
            "marina_gateway_shadow_pictures",
            "What became of pictures behind the answers; captured and not_captured ones are among the differing",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.shadow_detections = Counter(
            "marina_gateway_shadow_detections",
            "Detections of a live model and its candidate: steady or moved where both have them, lost or gained",
            ["model", "label", "change"],
            registry=self.registry,
        )

    def add_shadow(self, model: str, outcome: str, counts: Mapping[str, Counts] = NOTHING) -> None:
        """A picture in the shadow of a model. counts: of each class, where it was compared."""
        self.shadow_pictures.labels(model, outcome).inc()
        for label, each in counts.items():
            changes = {"steady": each.kept - each.moved, "moved": each.moved, "lost": each.lost, "gained": each.gained}
            for change, number in changes.items():
                self.shadow_detections.labels(model, label, change).inc(number)


class Measured:
    """ASGI middleware that counts and times every request."""

    def __init__(self, app: ASGIApp, figures: Figures):
        self._app = app
        self._figures = figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        self._figures.under_way.inc()
        try:
            await self._app(scope, receive, sending)
        finally:
            self._figures.under_way.dec()
            # A template such as /uploads/{id}, never a path: there are as many of these as callers like.
            route = getattr(scope.get("route"), "path", "none")
            self._figures.seconds.labels(route).observe(time.perf_counter() - began)
            self._figures.requests.labels(scope["method"], route, status).inc()
