"""What pages load beside themselves: shipped with the package, under names that change with their content.

So browsers keep an asset for good, and an open tab sees by `BUILD` that the service was upgraded.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

import agentstate

ROOM = Path(__file__).parent
PATH = "/console/assets/"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
# Of the file as its authors published it (https://four.htmx.org): whatever else is there is not served.
HTMX = "htmx-4.0.1.min.js"
HTMX_SHA256 = "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"


@dataclass(frozen=True)
class Asset:
    """``integrity`` is what a page tells browsers to expect."""

    url: str
    integrity: str
    content: bytes
    media_type: str


def _load() -> dict[str, Asset]:
    found = {}
    for file in sorted((ROOM / "static").iterdir()):
        if file.suffix not in _TYPES:
            continue
        content = file.read_bytes()
        digest = hashlib.sha256(content)
        if file.name == HTMX and digest.hexdigest() != HTMX_SHA256:
            raise RuntimeError(f"{file} is not htmx 4.0.1: install AgentState again")
        integrity = "sha256-" + base64.b64encode(digest.digest()).decode()
        url = f"{PATH}{file.stem}.{digest.hexdigest()[:16]}{file.suffix}"
        found[file.name] = Asset(url, integrity, content, _TYPES[file.suffix])
    return found


ASSETS = _load()
_BY_URL = {asset.url: asset for asset in ASSETS.values()}


def _build() -> str:
    digest = hashlib.sha256(agentstate.__version__.encode())
    for file in sorted((ROOM / "templates").iterdir()):
        digest.update(file.read_bytes())
    for asset in ASSETS.values():
        digest.update(asset.url.encode())
    return digest.hexdigest()[:16]


BUILD = _build()

router = APIRouter(include_in_schema=False)


@router.get(PATH + "{name}")
async def read(name: str) -> Response:
    asset = _BY_URL.get(PATH + name)
    if asset is None:
        raise HTTPException(404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(asset.content, media_type=asset.media_type, headers=headers)
