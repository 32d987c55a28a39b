"""What the shadows have found: candidates beside the live models."""

from fastapi import APIRouter

from tools.gateway.auth import Who
from tools.gateway.errors import responses
from tools.gateway.services import Services
from tools.shadow.report import Reports


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["shadow"])

    @routes.get("/shadow", responses=responses())
    async def shadow(who: Who) -> Reports:
        """How each candidate differs from the live model on the same traffic, and whether it may be promoted."""
        return Reports(shadows=services.backend.reports())

    return routes
