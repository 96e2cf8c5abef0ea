"""TLS before the gateway: nginx, with the lines that docs/gateway.md gives for it."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from engines import DONE, Asked, chunk
from gateways import HELLO, Gateway
from stage import PATIENCE_S
from tools import tool

from agentstate.cli.local import free_port
from agentstate.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
NAME = "agents.example"
AROUND = """
daemon off;
pid {directory}/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/client;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        server_name {name};
        ssl_certificate {directory}/certificate;
        ssl_certificate_key {directory}/key;
        {location}
    }}
}}
"""


def location(base_url: str) -> str:
    """What the docs say, for a gateway at ``base_url``."""
    (found,) = re.findall(r"```\n(location .*?)```", (DOCS / "gateway.md").read_text(), re.DOTALL)
    assert "http://127.0.0.1:8700;" in found
    return str(found.replace("http://127.0.0.1:8700", base_url))


@contextmanager
def proxy(directory: Path, base_url: str) -> Iterator[httpx.Client]:
    """A client of nginx, which knows it by `NAME`."""
    program, openssl = tool("nginx"), tool("openssl")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
        + ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
        + ["-keyout", directory / "key", "-out", directory / "certificate"],
        check=True,
        capture_output=True,
    )
    port = free_port()
    for temporary in ("client", "proxy"):
        (directory / temporary).mkdir(0o500)  # nothing is to be written there
    configuration = directory / "nginx.conf"
    configuration.write_text(AROUND.format(directory=directory, port=port, name=NAME, location=location(base_url)))
    log = directory / "log"
    command = [program, "-e", log, "-p", directory, "-c", configuration]
    subprocess.run([*command, "-t"], check=True)
    running = subprocess.Popen(command)
    try:
        while True:
            assert running.poll() is None, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.01)
        trusted = ssl.create_default_context(cafile=directory / "certificate")
        transport = httpx.HTTPTransport(verify=trusted)
        with httpx.Client(
            base_url=f"https://127.0.0.1:{port}", headers={"Host": NAME}, transport=transport, timeout=PATIENCE_S
        ) as client:
            yield client
    finally:
        running.terminate()
        running.wait()


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nginx")


def ask(client: httpx.Client, key: str, **more: object) -> httpx.Request:
    return client.build_request(
        "POST",
        "/v1/chat/completions",
        json={**HELLO, **more},
        headers={"Authorization": f"Bearer {key}"},
        extensions={"sni_hostname": NAME},
    )


def test_a_stream_comes_through_as_it_is_said_and_a_client_that_leaves_ends_it(
    make_gateway: Callable[..., Gateway], directory: Path
) -> None:
    go_on, stays = threading.Event(), threading.Event()

    def script(asked: Asked) -> None:
        asked.start()
        asked.send(chunk("one"))
        go_on.wait(PATIENCE_S)
        asked.send(chunk(" two", finish="stop"))
        if stays.is_set():
            asked.left.wait(PATIENCE_S)
        asked.send(DONE)
        asked.end()

    gateway = make_gateway(script)
    key = gateway.key("acme")
    with proxy(directory, gateway.service.base_url) as client:
        answer = client.send(ask(client, key, stream=True), stream=True)
        assert answer.headers["x-agentstate-session"]
        pieces = answer.iter_raw()
        assert next(pieces) == chunk("one")  # the engine has said no more
        go_on.set()
        assert b"".join(pieces).endswith(DONE)
        stays.set()
        left = client.send(ask(client, key, stream=True), stream=True)
        next(left.iter_raw())
        left.close()
        assert gateway.engine.asked[-1].left.wait(PATIENCE_S)
    gateway.ended()


def test_a_body_may_be_as_large_as_the_gateway_takes(make_gateway: Callable[..., Gateway], directory: Path) -> None:
    gateway = make_gateway(lambda asked: asked.whole({}))
    key = gateway.key("acme")
    said = [{"role": "user", "content": "x" * (Settings().gateway_body_bytes - 10_000)}]
    with proxy(directory, gateway.service.base_url) as client:
        answer = client.send(ask(client, key, model="no such model", messages=said))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_service_without_keys_is_not_opened_to_whoever_reaches_the_proxy(
    make_gateway: Callable[..., Gateway], directory: Path
) -> None:
    gateway = make_gateway(lambda asked: asked.whole({}))
    with proxy(directory, gateway.service.base_url) as client:
        refused = client.send(ask(client, "none"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_refused")
    assert gateway.engine.asked == []
