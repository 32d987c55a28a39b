"""The public port: a relay to TorchServe that can stop between two requests.

TorchServe cannot: told to stop, it drops what is under way; until then it takes whatever comes. So it listens on
loopback alone, and this stands before it. It passes bytes on as they are, and reads of them where answers end.
"""

import asyncio
import contextlib
import re
import socket

CHUNK = 1 << 18
BACKLOG = 1024
# In which a request may still come that was on its way when the end began.
SETTLE_S = 0.5
# The answers to `Expect: 100-continue`, which another one follows.
INTERIM = b"HTTP/1.1 1"

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Framing:
    """Finds where answers end in what a server sends (RFC 9112, section 6.3)."""

    def __init__(self) -> None:
        self._head = b""
        # Bytes of the body still to come; None within a head. A chunked one ends in its last bytes.
        self._left: int | None = None
        self._last: bytes | None = None

    @property
    def between(self) -> bool:
        """Whether what comes next begins an answer."""
        return not self._head and self._left is None and self._last is None

    def ends(self, data: bytes, bodyless: bool) -> bool:
        """Whether `data` brings an answer to its end. bodyless: it answers HEAD."""
        if self._left is None and self._last is None:
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            self._head = b"" if end else head
            if not end:
                return False
            if head.startswith(INTERIM):
                return self.ends(data, bodyless) if data else False
            self._begin_body(head, bodyless)
        if self._last is not None:
            self._last = (self._last + data)[-len(_LAST_CHUNK) :]
            ended = self._last == _LAST_CHUNK
        else:
            self._left = (self._left or 0) - len(data)
            ended = self._left <= 0
        if ended:
            self._left = self._last = None
        return ended

    def _begin_body(self, head: bytes, bodyless: bool) -> None:
        length = _LENGTH.search(head)
        if not bodyless and _CHUNKED.search(head):
            self._last = b"\r\n"
        else:
            # TorchServe gives one or the other; without a length there is no body.
            self._left = int(length[1]) if length and not bodyless else 0


class Connection:
    """A client, and the connection to TorchServe that is its own."""

    def __init__(self, client: socket.socket, backend: tuple[str, int]):
        self.under_way = False
        self.draining = False
        self._bodyless = False
        self._client = client
        self._backend_address = backend
        self._backend = socket.socket()

    async def run(self) -> None:
        """Return when either side has closed, or, while draining, after the answer."""
        with self._client, self._backend, contextlib.suppress(OSError):
            for end in (self._client, self._backend):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(self._backend, self._backend_address)
            requests = asyncio.create_task(self._pass_requests())
            try:
                await self._pass_answers()
            finally:
                requests.cancel()
                await asyncio.wait([requests])

    async def _pass_requests(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._client, CHUNK):
                if not self.under_way:
                    self.under_way = True
                    self._bodyless = data.startswith(b"HEAD ")
                try:
                    await loop.sock_sendall(self._backend, data)
                except OSError:
                    # TorchServe has hung up; its last words are still to be passed on.
                    return
        # The client has left, so nobody waits for the answer.
        self.under_way = False
        with contextlib.suppress(OSError):
            self._backend.shutdown(socket.SHUT_RDWR)

    async def _pass_answers(self) -> None:
        loop = asyncio.get_running_loop()
        framing = Framing()
        while data := await loop.sock_recv(self._backend, CHUNK):
            if self.draining and framing.between and not data.startswith(INTERIM):
                # So that the client does not send its next request here.
                data = data.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
            ended = framing.ends(data, self._bodyless)
            await loop.sock_sendall(self._client, data)
            if ended:
                self.under_way = False
                if self.draining:
                    return


class Relay:
    """Holds `port` of every address, for TorchServe at `backend`. Raises OSError where the port is in use."""

    def __init__(self, port: int, backend: tuple[str, int]):
        self._backend = backend
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("0.0.0.0", port))  # noqa: S104  # clients are outside of the container
        self._listener.setblocking(False)
        self._accepting: asyncio.Task[None] | None = None
        self._open: dict[asyncio.Task[None], Connection] = {}

    async def start(self) -> None:
        """Take connections from when TorchServe does; clients that come earlier are refused."""
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as probe, contextlib.suppress(ConnectionRefusedError):
                probe.setblocking(False)
                await loop.sock_connect(probe, self._backend)
                break
            await asyncio.sleep(0.1)
        self._listener.listen(BACKLOG)
        self._accepting = asyncio.create_task(self._accept())

    async def drain(self, grace: float) -> int:
        """Take no connection any more, close each after the answer under way, and return when all are closed, or after
        `grace` seconds, with the number of requests that got no answer."""
        if self._accepting:
            self._accepting.cancel()
            # Who has got through to the listener may have sent a request.
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._relay(self._listener.accept()[0])
        self._listener.close()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        connections = list(self._open.values())
        for connection in connections:
            connection.draining = True
        if self._open:
            await asyncio.wait(self._open, timeout=min(SETTLE_S, grace))
        for task, connection in self._open.items():
            if not connection.under_way:
                task.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=deadline - loop.time())
        return sum(connection.under_way for connection in connections)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._relay((await loop.sock_accept(self._listener))[0])

    def _relay(self, client: socket.socket) -> None:
        connection = Connection(client, self._backend)
        task = asyncio.create_task(connection.run())
        self._open[task] = connection
        task.add_done_callback(self._open.pop)
