"""What every router of the gateway gets."""

from dataclasses import dataclass

from tools.gateway.auth import Authenticator
from tools.gateway.limits import Rates
from tools.gateway.metrics import Figures
from tools.gateway.settings import Settings
from tools.gateway.shadowing import ShadowedBackend
from tools.gateway.storage import Storage


@dataclass(frozen=True)
class Services:
    settings: Settings
    backend: ShadowedBackend
    storage: Storage
    authenticator: Authenticator
    figures: Figures
    rates: Rates
