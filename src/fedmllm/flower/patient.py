"""Flower's programs on a busy machine: `python -m fedmllm.flower.patient flower-supernode|flower-superexec ARGUMENTS`.

Where SuperLink's database is locked for some seconds it answers 500. Flower's programs then end, or lose the thread of their
heartbeats and with it, after a minute and for good, the site. Here they ask again.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import httpx
from flwr.supercore.retry import http_retry
from flwr.supernode import fleet_http_connection

PROGRAMS = {"flower-supernode": "flwr.supernode.cli", "flower-superexec": "flwr.supercore.cli"}


def be_patient() -> None:
    """In this process Flower takes a 500 as it takes a 503: for a while."""
    http_retry._RETRYABLE_STATUS_CODES = http_retry._RETRYABLE_STATUS_CODES | {httpx.codes.INTERNAL_SERVER_ERROR}


def beats(send: Callable[[], bool]) -> Callable[[], bool]:
    """A heartbeat that a 500 makes fail, to be sent again, instead of ending them all."""

    def beat() -> bool:
        try:
            return send()
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                return False
            raise

    return beat


def main() -> None:
    """Run the program that the first argument names."""
    name, sys.argv = sys.argv[1], sys.argv[1:]
    be_patient()
    sender = fleet_http_connection.HeartbeatSender
    fleet_http_connection.HeartbeatSender = lambda send: sender(beats(send))
    sys.exit(getattr(importlib.import_module(PROGRAMS[name]), name.replace("-", "_"))())


if __name__ == "__main__":
    main()
