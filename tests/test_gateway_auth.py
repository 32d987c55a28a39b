"""Who may call: API keys, and tokens of a provider that runs here."""

import asyncio
import http.server
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tools.errors import ToolError
from tools.gateway import auth
from tools.gateway.auth import Caller, Keys, OidcTokens, new_key
from tools.gateway.errors import GatewayError
from tools.gateway.settings import Oidc


def ask(authenticator: auth.Authenticator, token: str | None) -> Caller:
    return asyncio.run(authenticator.authenticate(token))


def refused(authenticator: auth.Authenticator, token: str | None) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        ask(authenticator, token)
    return caught.value


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    (first, line), (second, other) = new_key("camera-1"), new_key("camera-2")
    file = tmp_path / "keys"
    file.write_text(f"# of the yard\n\n{line}\n{other}\n")
    keys = Keys(file)
    assert first not in file.read_text() and len(first) > 40
    assert ask(keys, first).id == "camera-1" and ask(keys, second).id == "camera-2"
    assert ask(keys, first).owner != ask(keys, second).owner
    for wrong in (None, "", first[:-1], first + "x", line, line.split(":")[1], "\udcff"):
        answer = refused(keys, wrong)
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert not wrong or wrong not in answer.message


@pytest.mark.parametrize("text", ["", "# nothing\n", "me plain-key\n", "me sha256:abc\n", "a b sha256:" + "0" * 64])
def test_a_keys_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ToolError, match="--new-key"):
        Keys(tmp_path / "keys")


def test_a_keys_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot be read"):
        Keys(tmp_path / "keys")


@pytest.mark.parametrize("name", ["", "a b", "a\nb sha256:x", "../x", "x" * 65])
def test_a_key_has_a_plain_name(name: str) -> None:
    with pytest.raises(ToolError, match="key name"):
        new_key(name)


class Provider:
    """Keys on a loopback port, as an OpenID Connect provider publishes them."""

    def __init__(self) -> None:
        self.keys = {"one": ec.generate_private_key(ec.SECP256R1())}
        self.asked = 0
        self.broken = False
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                self.send_response(500 if provider.broken else 200)
                self.end_headers()
                self.wfile.write(provider.published())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.oidc = Oidc(
            issuer="https://id", audience="marina", jwks_url=f"http://127.0.0.1:{self.server.server_port}/"
        )

    def published(self) -> bytes:
        algorithm = jwt.algorithms.ECAlgorithm
        keys = [algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": name} for name, key in self.keys.items()]
        return json.dumps({"keys": keys}).encode()

    def token(self, key: object = None, algorithm: str = "ES256", kid: str = "one", **changes: object) -> str:
        claims = {"iss": "https://id", "aud": "marina", "sub": "ada", "exp": time.time() + 600} | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, key or self.keys[kid], algorithm=algorithm, headers={"kid": kid})


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    threading.Thread(target=provider.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()


def test_a_token_of_the_provider_names_its_caller(provider: Provider) -> None:
    tokens = OidcTokens(provider.oidc)
    assert ask(tokens, provider.token()).id == "https://id#ada"
    assert ask(tokens, provider.token(aud=["other", "marina"], sub="bob")).id == "https://id#bob"
    assert provider.asked == 1


def test_what_is_wrong_with_a_token_is_refused(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = OidcTokens(provider.oidc)
    stranger = ec.generate_private_key(ec.SECP256R1())
    wrong = [
        provider.token(exp=time.time() - 3600),
        provider.token(exp=None),
        provider.token(nbf=time.time() + 3600),
        provider.token(iss="https://elsewhere"),
        provider.token(iss=None),
        provider.token(aud="other"),
        provider.token(aud=None),
        provider.token(sub=None),
        provider.token(key=stranger),
        provider.token(key=stranger, kid="two"),
        provider.token(key="x" * 64, algorithm="HS256"),
        jwt.encode({"iss": "https://id", "aud": "marina", "sub": "ada", "exp": 9e9}, None, algorithm="none"),
        provider.token()[:-4] + "AAAA",
        "no.token.atall",
        "",
        None,
    ]
    for token in wrong:
        answer = refused(tokens, token)
        assert answer.status == 401, token
        assert not token or token not in answer.message + caplog.text


def test_new_keys_of_the_provider_are_fetched_but_not_at_every_wish(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = OidcTokens(provider.oidc)
    ask(tokens, provider.token())
    provider.keys["two"] = ec.generate_private_key(ec.SECP256R1())
    for _ in range(20):
        assert refused(tokens, provider.token(kid="two")).status == 401
    assert provider.asked == 1
    monkeypatch.setattr(auth, "REFETCH_S", 0)
    assert ask(tokens, provider.token(kid="two")).id == "https://id#ada"


def test_a_provider_that_does_not_answer_is_503_until_it_does(provider: Provider) -> None:
    tokens = OidcTokens(provider.oidc)
    provider.broken = True
    answer = refused(tokens, provider.token())
    assert answer.status == 503 and "Retry-After" in answer.headers
    provider.broken = False
    assert ask(tokens, provider.token()).id == "https://id#ada"
