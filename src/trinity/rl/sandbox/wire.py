"""A request as bytes: a JSON object and then its binary parts."""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("=I")


def pack(header: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    text = json.dumps({**header, "parts": [len(part) for part in parts]}).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *parts))


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = json.loads(data[_LENGTH.size : start])
    parts = []
    for length in header.pop("parts"):
        parts.append(data[start : start + length])
        start += length
    return header, parts


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> bytes:
    """What `send` sent; empty when the other end is gone."""
    head = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        return b""
    return connection.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL)
