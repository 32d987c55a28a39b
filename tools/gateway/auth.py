"""Who calls: API keys whose hashes lie in a file, or bearer tokens of an OpenID Connect provider.

A key is 256 random bits, so that a plain SHA-256 of it cannot be turned back and nothing slower is needed. The
file has one line a key: `NAME sha256:HEX`. No token goes into a log or an error.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import httpx
import jwt
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jwt import PyJWK, PyJWKSet

from tools.errors import ToolError
from tools.gateway.errors import GatewayError
from tools.gateway.settings import Oidc, Settings

if TYPE_CHECKING:
    from tools.gateway.services import Services

KEY_PREFIX = "marina_"
# Signatures by a provider's private key; never "none", never HMAC with a public key as the secret.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
LEEWAY_S = 30
# How soon a token with an unknown key may have the provider's keys fetched again.
REFETCH_S = 30
MAX_TOKEN = 8192

_LINE = re.compile(r"(?P<name>[A-Za-z0-9][\w.@-]{0,63})\s+sha256:(?P<hash>[0-9a-f]{64})")


@dataclass(frozen=True)
class Caller:
    """id: the key's name, or issuer and subject of a token; for logs."""

    id: str

    @property
    def owner(self) -> str:
        """32 hexadecimal digits for names of files."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:32]


class Authenticator(Protocol):
    async def authenticate(self, token: str | None) -> Caller:
        """Raises GatewayError 401, or 503 when it cannot be found out."""


class Open:
    """Everybody is one and the same caller."""

    async def authenticate(self, token: str | None) -> Caller:
        return Caller("anybody")


class Keys:
    """API keys of a file, read at the start."""

    def __init__(self, path: Path):
        """Raises ToolError, naming the line."""
        self._hashes: list[tuple[str, bytes]] = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ToolError(f"keys file {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line.strip())
            if not found:
                raise ToolError(
                    f"keys file {path}, line {number} is not `NAME sha256:HEX`; make one with --new-key NAME"
                )
            self._hashes.append((found["name"], bytes.fromhex(found["hash"])))
        if not self._hashes:
            raise ToolError(f"keys file {path} holds no key; make one with --new-key NAME")

    async def authenticate(self, token: str | None) -> Caller:
        if token is None:
            raise _refusal("no API key; send Authorization: Bearer KEY")
        given = hashlib.sha256(token.encode(errors="replace")).digest()
        # All are compared, so that the time tells nothing of where one matched.
        matches = [name for name, known in self._hashes if hmac.compare_digest(known, given)]
        if not matches:
            raise _refusal("the API key is not known here")
        return Caller(matches[0])


@dataclass
class OidcTokens:
    """JSON Web Tokens: signature, issuer, audience and expiry are checked (RFC 7519, OpenID Connect Core 3.1.3.7)."""

    oidc: Oidc
    _keys: dict[str | None, PyJWK] = field(default_factory=dict)
    _fetched: float = field(default=float("-inf"))
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def authenticate(self, token: str | None) -> Caller:
        if token is None:
            raise _refusal(f"no token; send Authorization: Bearer TOKEN of {self.oidc.issuer}")
        try:
            name = jwt.get_unverified_header(token).get("kid")
            # A key that is not known may be new.
            key = self._keys.get(name) or (await self._fetch()).get(name)
            if key is None:
                raise _refusal("the token is signed with a key that its issuer does not have")
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self.oidc.issuer,
                audience=self.oidc.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise _refusal(f"the token is not valid: {type(error).__name__}") from None
        return Caller(f"{self.oidc.issuer}#{claims['sub']}")

    async def _fetch(self) -> dict[str | None, PyJWK]:
        """The provider's keys by name, those known already if they are fresh. Raises GatewayError 503."""
        async with self._lock:
            if time.monotonic() < self._fetched + REFETCH_S:
                return self._keys
            try:
                async with httpx.AsyncClient(timeout=5) as client:
                    answer = await client.get(self.oidc.jwks_url)
                    answer.raise_for_status()
                    self._keys = {key.key_id: key for key in PyJWKSet.from_dict(answer.json()).keys}
            except (httpx.HTTPError, ValueError, AttributeError, jwt.PyJWTError) as error:
                raise GatewayError(503, "NoProvider", "the keys of the token's issuer cannot be had", 5) from error
            self._fetched = time.monotonic()
            return self._keys


def authenticator(settings: Settings) -> Authenticator:
    """Raises ToolError for a keys file that cannot be used."""
    if settings.keys_file is not None:
        return Keys(settings.keys_file)
    return OidcTokens(settings.oidc) if settings.oidc is not None else Open()


def new_key(name: str) -> tuple[str, str]:
    """A key, shown once, and its line for the keys file. Raises ToolError for a name that cannot be in it."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    line = f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise ToolError(f"key name {name!r} is not letters, digits, '.', '_', '@' and '-', 64 at most")
    return key, line


def _refusal(message: str) -> GatewayError:
    return GatewayError(401, "NotAuthenticated", message)


_BEARER = HTTPBearer(auto_error=False, description="An API key, or a token of the OpenID Connect provider.")


async def caller(request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> Caller:
    """Who calls, as a dependency of every route that is not for everybody. Raises GatewayError 401 or 429."""
    services: Services = request.app.state.services
    token = bearer.credentials if bearer else None
    if token is not None and len(token) > MAX_TOKEN:
        raise _refusal(f"the token is longer than {MAX_TOKEN} characters")
    found = await services.authenticator.authenticate(token)
    services.rates.count(found.id)
    return found


Who = Annotated[Caller, Depends(caller)]
