"""Who published an extent: a keyed message authentication code (MAC) of its header, behind its bytes.

::

    8    magic
    8    which key
    32   BLAKE2b, keyed, of the header as it lies in the file: prefix and map, without the zeros behind them

It lies behind the extent, in the same object: an object of its own would have to be published before the extent, asked
for beside it, and swept when it is alone. The extent format stays as it is, since a reader of an extent knows where it
ends. What is behind is read in the same request as the header.

It covers the keys of the pages, their fingerprint and layout, and their checksums. The pages themselves are bound to
the header by xxh3, which finds every accident and is no defence against somebody who searches for bytes with the same
sum (docs/security.md).
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from agentstate.errors import MacMismatch, SettingsError

_MAGIC = b"AGSTMAC1"
_TRAILER = struct.Struct("<8s8s32s")
TRAILER_BYTES = _TRAILER.size
_LEAST_CHARACTERS = 32


class StoreKeys:
    """``AGENTSTATE_STORE_KEY``: one key, or two with a comma between them. The first signs; extents with the MAC of
    either are read. To change a key, put the new one first on all engines, and take the old one out when what it signed
    is no longer needed. Raises SettingsError for a key of less than 32 characters, or more than two."""

    def __init__(self, keys: str):
        given = [key.strip() for key in keys.split(",")]
        if len(given) > 2 or any(len(key) < _LEAST_CHARACTERS for key in given):
            raise SettingsError(
                f"AGENTSTATE_STORE_KEY: give one key of at least {_LEAST_CHARACTERS} characters, or a new and an old "
                "one with a comma between them (`openssl rand -hex 32` makes one)"
            )
        self._keys = {self._name(key): key for key in (_derived(key) for key in given)}

    @staticmethod
    def _name(key: bytes) -> bytes:
        return hashlib.blake2b(key=key, digest_size=8, person=b"agentstate-key").digest()

    @staticmethod
    def _mac(key: bytes, header: bytes | memoryview) -> bytes:
        return hashlib.blake2b(header, key=key, digest_size=32, person=b"agentstate-head").digest()

    def trailer(self, header: bytes | memoryview) -> bytes:
        """What goes behind the extent with this header: `TRAILER_BYTES` bytes."""
        name, key = next(iter(self._keys.items()))
        return _TRAILER.pack(_MAGIC, name, self._mac(key, header))

    def require(self, header: bytes | memoryview, trailer: bytes | memoryview, name: str) -> None:
        """Raises MacMismatch, with the extent's ``name``, unless a key that is known here has signed the header."""
        magic, which, mac = _TRAILER.unpack(trailer)
        if magic != _MAGIC:
            raise MacMismatch(f"{name}: the extent has no MAC, and AGENTSTATE_STORE_KEY is set")
        key = self._keys.get(which)
        if key is None:
            raise MacMismatch(f"{name}: the extent has the MAC of a key that is not in AGENTSTATE_STORE_KEY")
        if not hmac.compare_digest(mac, self._mac(key, header)):
            raise MacMismatch(f"{name}: the extent's MAC is not that of its header")


def _derived(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=32, person=b"agentstate-store").digest()
