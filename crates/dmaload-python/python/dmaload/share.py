"""Attaches to models that another process has loaded, without a copy."""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import _load, _native
from ._native import Image

__all__ = ["attach", "attach_async"]


def _start(socket: _load.Path, name: str | None, trusted_users: Iterable[int]) -> _native.Loading:
    return _native.start_attach(os.fsdecode(os.fspath(socket)), name, list(trusted_users))


def attach(socket: _load.Path, name: str | None = None, *, trusted_users: Iterable[int] = ()) -> Image:
    """Attaches to an image that a server shares (``dmaload serve SOCKET MODEL``).

    - ``socket``: the path of the server's socket.
    - ``name``: the name of the image, if the server shares several.
    - ``trusted_users``: the ids of users whose servers are trusted not to change the bytes. This
      process's user and root are always trusted.

    The memory is shared with the server. A page is copied when this process writes to it, so no
    other process sees the change. If the server shares dma-bufs, they cannot be exported as
    arrays: see :func:`dmaload.dma_buf`.

    Raises :class:`dmaload.ShareError`.
    """
    return _load.wait(_start(socket, name, trusted_users))


async def attach_async(socket: _load.Path, name: str | None = None, *, trusted_users: Iterable[int] = ()) -> Image:
    """Like :func:`attach`, but for asyncio: it does not block the event loop."""
    return await _load._wait_async(_start(socket, name, trusted_users))
