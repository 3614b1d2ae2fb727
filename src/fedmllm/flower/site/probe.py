"""Reachability of a site's server: TLS and HTTP, without any key."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import httpx

_TIMEOUT_S = 10.0
DOWN_S, UP_S = 5.0, 60.0  # between probes of a server that did not respond, and of one that did


def unreachable(server: str, ca: Path) -> str:
    """Send one request to a server.

    Args:
        server: "host:port".
        ca: Certificate of the authority that must have signed the server's.

    Returns:
        Why it does not respond; "" if it does, whatever the status.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(verify=context, timeout=_TIMEOUT_S) as client:
            client.get(f"https://{server}/")
    except httpx.TimeoutException:
        return f"no response within {_TIMEOUT_S:g} s"
    except (httpx.HTTPError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def report_reachability(server: str, ca: Path, log: Callable[[str], None], stop: threading.Event) -> None:
    """Report when the server stops responding, at once if it never did, and when it responds again.

    Args:
        server: "host:port".
        ca: Certificate of the server's authority.
        log: Called with each line.
        stop: Ends the loop.
    """
    before = ""
    while not stop.is_set():
        reason = unreachable(server, ca)
        if reason and reason != before:
            log(f"the server {server} cannot be reached: {reason}; still trying")
        elif before and not reason:
            log(f"the server {server} responds again")
        before = reason
        stop.wait(DOWN_S if reason else UP_S)
