"""The one door of a server lets the sites' calls through and nothing else, in whatever way a path is spelt; so does nginx."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from starlette.applications import Starlette
from starlette.requests import Request as Called
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fedmllm.flower import processes as flower_processes
from fedmllm.flower.keys import make_authority
from fedmllm.flower.server.gate import gate
from support.tls import served

CALLS = {
    ("POST", "/v1/fleet/pull-messages"): 201,
    ("GET", "/v1/fleet/pull-messages"): 405,
    ("POST", "/v1/control/start-run"): 404,
    ("POST", "/v1/fleet/../control/start-run"): 404,
    ("POST", "/v1/control/../fleet/pull-messages"): 404,
    ("POST", "/v1/fleet/%2e%2e%2fcontrol%2fstart-run"): 404,
    ("POST", "/v1/fleet/%2e%2e/control/start-run"): 404,
    ("POST", "/v1/fleet/%252e%252e%252fcontrol%252fstart-run"): 404,
    ("POST", "/v1/fleet/..%5ccontrol"): 404,
    ("POST", "/v1/fleet/pull-messages%3fx"): 404,
    ("POST", "/v1/fleet//pull-messages"): 404,
    ("POST", "/v1/fleet/"): 404,
    ("POST", "/"): 404,
}


async def echo(called: Called) -> PlainTextResponse:
    return PlainTextResponse(f"{called.url.path} {len(await called.body())} {called.headers.get('x-key')}", 201)


def call(port: int, folder: Path, method: str, path: str) -> tuple[int, bytes]:
    """A request whose path is sent letter by letter, which no library of a browser's manners does."""
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", port, context=ssl.create_default_context(cafile=folder / "ca.crt"))
    ) as connection:
        connection.request(method, path, body=b"x" * 10**5, headers={"x-key": "7"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def lets_only_sites_through(port: int, folder: Path) -> None:
    found = {(method, path): call(port, folder, method, path) for method, path in CALLS}
    assert {key: status for key, (status, _) in found.items()} == CALLS
    assert found["POST", "/v1/fleet/pull-messages"][1] == b"/v1/fleet/pull-messages 100000 7"


BEHIND = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])


def test_the_gate_passes_a_sites_calls_whole_and_nothing_else(tmp_path):
    make_authority(tmp_path, ["127.0.0.1"])
    with served(BEHIND, tmp_path) as behind:
        door = gate(f"https://127.0.0.1:{behind}", tmp_path / "ca.crt")
        with served(door, tmp_path) as port:
            lets_only_sites_through(port, tmp_path)


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_with_our_configuration_does_the_same(tmp_path):
    make_authority(tmp_path, ["localhost", "127.0.0.1"])
    text, port = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text(), flower_processes.free_port()
    with served(BEHIND, tmp_path) as behind:
        for old, new in {
            "listen 9092 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "/certificates/": f"{tmp_path}/",
            "https://superlink:8000": f"https://127.0.0.1:{behind}",
            "/dev/stdout": str(tmp_path / "access.log"),
            "events {}": f"events {{}}\npid {tmp_path}/pid;",
        }.items():
            assert text.count(old) >= 1, old
            text = text.replace(old, new)
        (tmp_path / "nginx.conf").write_text(text)
        command = ["nginx", "-e", str(tmp_path / "error.log"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        process = subprocess.Popen([*command, "-g", "daemon off;"], preexec_fn=flower_processes.die_with_parent)
        try:
            until = time.monotonic() + 20
            with socket.socket() as probe:
                while probe.connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
                    time.sleep(0.05)
            lets_only_sites_through(port, tmp_path)
        finally:
            flower_processes.stop(process)
