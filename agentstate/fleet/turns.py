"""The turn that a request to an engine belongs to, and the token that proves it.

A session's id is no secret: it is in logs, events and URLs. Whoever knows one must not be able to replace the session's
manifest, so the service signs a token with every lease, and a client sends it where the id goes, as ``ID.TOKEN``:
``session_id`` is the one field that all of SGLang's routes pass on and that changes no page key. Only services and
engines can make a token (`sql.secret`). A token of an earlier turn proves that turn: SQL decides whether its manifest
still counts, when it is written (`fleet.manifests.publish`).

A token also names the turn's DP rank, where its engine has several: so a request finds the rank that has the session's
KV by whatever way it comes. Tokens of other turns are those of earlier releases, byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from dataclasses import dataclass

# By the version, which is the first byte: the epoch follows, and then the DP rank where there are several.
_HEADS = {1: struct.Struct(">BQ"), 2: struct.Struct(">BQH")}
_MAC_BYTES = 16


@dataclass(frozen=True)
class Turn:
    """A turn of a session: ``session_id`` is what engines know it by, ``epoch`` its lease's. ``account`` is whom the
    pages are charged to: the scope of KV that the session belongs to, or its tenant. ``dp_rank`` is the rank of its
    engine that is to serve it, None where there is only one."""

    session_id: str
    epoch: int
    account: str
    dp_rank: int | None = None


def signing_key(secret: bytes) -> bytes:
    """The key that signs tokens, derived from an installation's secret."""
    return hmac.digest(secret, b"turn tokens", hashlib.sha256)


def sign(key: bytes, turn: Turn) -> str:
    """What a client of the turn sends as ``session_id``: ``ID.TOKEN``."""
    head = _HEADS[1].pack(1, turn.epoch) if turn.dp_rank is None else _HEADS[2].pack(2, turn.epoch, turn.dp_rank)
    account = turn.account.encode()
    token = base64.urlsafe_b64encode(head + _mac(key, head, account, turn.session_id) + account)
    return f"{turn.session_id}.{token.decode().rstrip('=')}"


def split(sent: str) -> tuple[str, str | None]:
    """The id and the token of what was sent as ``session_id``; no token (None) if no part of it has a token's form."""
    session_id, _, token = sent.rpartition(".")
    return (session_id, token) if session_id and _parts(token) else (sent, None)


def verify(key: bytes, session_id: str, token: str) -> Turn | None:
    """The turn that ``token`` proves, or None if it is not a token for this session."""
    if (parts := _parts(token)) is None:
        return None
    head, mac, account = parts
    if not hmac.compare_digest(mac, _mac(key, head, account, session_id)):
        return None
    epoch, *dp_rank = _HEADS[head[0]].unpack(head)[1:]
    return Turn(session_id, epoch, account.decode(), *dp_rank)


def named_dp_rank(token: str) -> int | None:
    """The DP rank that a token names, unproven; None if it names none."""
    parts = _parts(token)
    return _HEADS[2].unpack(parts[0])[2] if parts is not None and parts[0][0] == 2 else None


def _mac(key: bytes, head: bytes, account: bytes, session_id: str) -> bytes:
    text = head + struct.pack(">I", len(account)) + account + session_id.encode("utf-8", "surrogatepass")
    return hmac.digest(key, text, hashlib.sha256)[:_MAC_BYTES]


def _parts(token: str) -> tuple[bytes, bytes, bytes] | None:
    """A token's head, MAC and account."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    head = _HEADS.get(raw[0]) if raw else None
    if head is None or len(raw) < head.size + _MAC_BYTES:
        return None
    return raw[: head.size], raw[head.size : head.size + _MAC_BYTES], raw[head.size + _MAC_BYTES :]
