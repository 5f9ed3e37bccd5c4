"""Does a Ray head answer at an address? Asked in seconds; Ray itself takes minutes, and then ends the process."""

from __future__ import annotations

import os
import socket
import struct

from ..errors import UsageError

SECONDS = 5.0
"""How long a head may take to answer."""
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = 4
"""Preface of a client and type of the first frame of both sides (RFC 9113, sections 3.4 and 6.5): gRPC speaks so."""


def parsed(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT``; a UsageError where it is something else, ``ray://`` of Ray's client included."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise UsageError(
            "an address with :// is one of Ray's client, which is not used here", where=address,
            hint="run on a machine of the cluster, and give the HOST:PORT that `ray start --head` printed",
        )  # fmt: skip
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            "the address of a Ray cluster is not of the form HOST:PORT", where=address,
            hint="give what `ray start --head` printed, such as 10.0.0.1:6379, or auto for a cluster of this machine",
        )  # fmt: skip
    return host.removeprefix("[").removesuffix("]"), int(port)


def refusal(host: str, port: int, seconds: float = SECONDS) -> str:
    """Return why no Ray head can be there, in a clause; empty where one seems to answer.

    A cluster with RAY_USE_TLS is only asked for a connection.
    """
    try:
        with socket.create_connection((host, port), timeout=seconds) as made:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return ""
            made.sendall(_HTTP2 + struct.pack(">IBI", _SETTINGS, 0, 0))
            held = b""
            while len(held) < 4:
                part = made.recv(4 - len(held))
                if not part:
                    return "what answers there is no Ray head"
                held += part
    except TimeoutError:
        return f"nothing answers there within {seconds:g} seconds"
    except socket.gaierror:
        return f"there is no host {host}"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if held[3] == _SETTINGS else "what answers there is no Ray head"
