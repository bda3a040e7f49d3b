"""Messages between ComfyUI and one worker: JSON with the bytes of tensors behind it, over a pair of sockets of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import plain_data

Message = dict[str, Any]


class Channel:
    """One end. Any thread may send; one thread receives.

    Args:
        connection: of which only bytes are taken, never what would be unpickled.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        # Of the same socket: only shutting it down wakes who waits at either end.
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._sending = threading.Lock()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """This process's end, and the socket that a worker is given."""
        here, there = socket.socketpair()
        return cls(Connection(here.detach())), there

    def send(self, message: Message, tensors: Sequence[torch.Tensor] = ()) -> None:
        """Raises OSError where nobody is there any more."""
        with self._sending:
            self._connection.send_bytes(plain_data.as_json(message, tensors))
            for tensor in tensors:
                if tensor.numel():
                    flat = plain_data.as_bytes(tensor.cpu().contiguous())
                    self._connection.send_bytes(flat.numpy().data)

    def receive(self) -> tuple[Message, list[torch.Tensor]]:
        """The next message and its tensors, on the CPU. Raises EOFError or OSError where the other end is gone."""
        message, tensors = plain_data.from_json(self._connection.recv_bytes(), torch.device("cpu"))
        for tensor in tensors:
            if tensor.numel():
                self._connection.recv_bytes_into(plain_data.as_bytes(tensor).numpy().data)
        return message, tensors

    def close(self) -> None:
        """The other end is told that nobody is here any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
