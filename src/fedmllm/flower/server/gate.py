"""Reverse proxy of a server: forwards only the sites' path to SuperLink.

SuperLink serves sites (`/v1/fleet/`), control (`/v1/control/`) and its own processes (`/v1/runtime/`) on one port, and
without single sign-on only the first authenticates the caller. So SuperLink listens on loopback and the gate on the network.
`python -m fedmllm.flower.server.gate FOLDER HOST PORT SUPERLINK_PORT`.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}
TIMEOUT_S = 300.0


class Call(StringConvertor):
    """Name of a call, without dot, slash and percent sign: no spelling of a path leads outside `/v1/fleet/`."""

    regex = "[a-z][a-z-]{0,63}"


register_url_convertor("call", Call())


def gate(superlink: str, ca: Path) -> Starlette:
    """The ASGI app of the gate.

    Args:
        superlink: "https://127.0.0.1:PORT".
        ca: Certificate of the authority that signed SuperLink's.

    Returns:
        An app that forwards `POST /v1/fleet/NAME` and answers 404 or 405 to anything else.
    """
    client = httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(ca)), timeout=TIMEOUT_S)

    async def forward(request: Request) -> Response:
        headers = [(k, v) for k, v in request.headers.raw if k.decode().lower() not in HOP]
        url = f"{superlink}/v1/fleet/{request.path_params['name']}"

        async def body() -> AsyncIterator[bytes]:
            async for chunk in request.stream():
                yield chunk

        try:
            sent = client.build_request("POST", url, headers=headers, content=body())
            answer = await client.send(sent, stream=True)
        except httpx.TransportError:
            return PlainTextResponse("SuperLink does not answer", 502)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, headers=kept, background=BackgroundTask(answer.aclose)
        )

    return Starlette(routes=[Route("/v1/fleet/{name:call}", forward, methods=["POST"])])


def main() -> None:
    """Entry point of the child process of `fedmllm server start`."""
    folder, host, port, superlink_port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    app = gate(f"https://127.0.0.1:{superlink_port}", folder / "ca.crt")
    files = {"ssl_certfile": folder / "server.crt", "ssl_keyfile": folder / "server.key"}
    uvicorn.run(app, host=host, port=port, log_level="warning", **files)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
