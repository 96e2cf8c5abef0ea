"""The bound on a request's head: it is held in memory until it is complete, before anybody has shown a key."""

from __future__ import annotations

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# The request line, and all names and values of headers: twice what nginx takes.
MAX_HEAD_BYTES = 64 * 1024
# For so long is read and discarded what a client still sends: if its connection were closed while it sends, it would
# see a broken one instead of the answer.
DRAINED_S = 5.0

_TOO_LARGE = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
_SAID = f"The headers of a request may have {MAX_HEAD_BYTES} bytes.".encode()
_ANSWER = (
    b"HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
    % (_TOO_LARGE, _TOO_LARGE.phrase.encode(), len(_SAID), _SAID)
)


class BoundedHeads(HttpToolsProtocol):
    """Answers 431 to a head that is incomplete after ``MAX_HEAD_BYTES``, and closes the connection. One that is
    complete by then is in memory already: `agentstate.api.guard` judges that."""

    _head_bytes = 0
    _in_head = True
    _refused = False

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refused = True
            self.transport.write(_ANSWER)
            self.transport.write_eof()
            self.loop.call_later(DRAINED_S, self.transport.abort)

    def on_message_begin(self) -> None:
        self._head_bytes, self._in_head = 0, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
