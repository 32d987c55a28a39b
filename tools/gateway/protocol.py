"""HTTP/1.1 whose clients may neither keep a connection for ever nor send endless heads, which uvicorn itself lets
them; one that closes its side behind a whole request is answered."""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PATIENCE_S = 10.0
MOST_HEAD_BYTES = 65_536


class GuardedProtocol(HttpToolsProtocol):
    """Closes a connection on which PATIENCE_S after its beginning, or after an answer, there is no whole head of a next
    request, or whose head is too long.

    An answer may be given before the request's body is there: what is left of it is read and dropped for so long, since
    a client may read the answer only then (RFC 9112, section 9.6).
    """

    _in_head = False
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request's head has more than {MOST_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP; in the form of every other error."""
        body = json.dumps({"code": 400, "type": "InvalidRequest", "message": msg}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio keeps the connection where it is true
        under_way = self.cycle is not None and not self.cycle.response_complete
        # TLS cannot be closed on one side alone.
        if self.scheme == "https" or not under_way or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Otherwise the next request is there already.
        if self.cycle.response_complete:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        """Unless it runs."""
        if self._timer is None:
            self._timer = self.loop.call_later(PATIENCE_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
