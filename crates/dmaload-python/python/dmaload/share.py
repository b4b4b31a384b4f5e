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
    """Attaches to an image of the server at this socket (``dmaload serve SOCKET MODEL``).

    - ``name``: the name of the image, if the server shares several.
    - ``trusted_users``: user ids, in addition to one's own and root's, whose servers are trusted
      not to change the bytes.

    The memory is shared with the server. A page is copied when this process writes to it, so no
    other process sees the change. Dma-bufs cannot be exported as arrays; see
    :func:`dmaload.dma_buf`.

    Raises :class:`dmaload.ShareError`.
    """
    return _load.wait(_start(socket, name, trusted_users))


async def attach_async(socket: _load.Path, name: str | None = None, *, trusted_users: Iterable[int] = ()) -> Image:
    """Like :func:`attach`, in an asyncio event loop, which it does not block."""
    return await _load._wait_async(_start(socket, name, trusted_users))
