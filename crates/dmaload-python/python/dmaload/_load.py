"""Loading: as a whole or as a stream, on a thread that waits or in an event loop."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

from . import _native
from ._errors import ConfigError
from ._native import Image, Tensor

Path: TypeAlias = "str | os.PathLike[str]"
Paths: TypeAlias = "Path | Sequence[Path]"
Shard: TypeAlias = "tuple[int, int] | tuple[int, int, int | None]"
Progress: TypeAlias = "Callable[[int, int], object]"

# How long a thread waits at once, in seconds: then Python handles signals. What is waited for ends
# the wait at once.
_TICK = 0.05


def _paths(paths: Paths) -> list[str]:
    if isinstance(paths, (str, bytes, os.PathLike)):
        paths = [paths]
    return [os.fsdecode(os.fspath(path)) for path in paths]


class Options(TypedDict, total=False):
    """The keywords of :func:`load`, which says what they mean and what holds without them."""

    tensors: str | Iterable[str] | None
    shard: Shard | None
    memory_limit: int | None
    verify: Path | None
    format: str | None
    heap: str
    route: str
    cache: str | None
    allow_missing: bool


def _keywords(
    *,
    tensors: str | Iterable[str] | None = None,
    shard: Shard | None = None,
    memory_limit: int | None = None,
    verify: Path | None = None,
    format: str | None = None,
    heap: str = "anon",
    route: str = "auto",
    cache: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    if isinstance(tensors, str):
        tensors = [tensors]
    if shard is not None:
        numbers = tuple(shard)
        if len(numbers) not in (2, 3) or not all(n is None or isinstance(n, int) and n >= 0 for n in numbers):
            raise ConfigError(f"shard must be (rank, world_size) or (rank, world_size, dim), and is {shard!r}")
        # Tensors are cut, not the bytes of files, which have no tensors then.
        shard = (numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 0)
    if memory_limit is not None and not 0 <= memory_limit < 1 << 64:
        raise ConfigError(f"memory_limit is a number of bytes, below 2**64, and not {memory_limit}")
    return {
        "tensors": None if tensors is None else list(tensors),
        "shard": shard,
        "memory_limit": memory_limit,
        "verify": None if verify is None else os.fsdecode(os.fspath(verify)),
        "format": format,
        "heap": heap,
        "route": route,
        "cache": cache,
        "allow_missing": bool(allow_missing),
    }


def wait(loading: _native.Loading, progress: Progress | None = None) -> Any:
    """What comes of it. This thread sleeps; an exception, such as Ctrl-C, cancels it."""
    try:
        while True:
            has_come = loading.wait(_TICK)
            if progress is not None:
                progress(*loading.progress())
            # Another thread may have taken it first; then this one waits for what comes next.
            if has_come and (taken := loading.take()) is not None:
                return taken[0]
    except BaseException:
        loading.close()
        raise


class _EventLoop:
    """Wakes tasks of one event loop, as long as any of them waits."""

    _all: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _EventLoop] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.hub = _native.Hub()
        # A coroutine that was abandoned may end while another loop runs, or none.
        self._loop = weakref.ref(loop)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._next = 0
        self._tasks = 0

    @classmethod
    def enter(cls) -> _EventLoop:
        loop = asyncio.get_running_loop()
        found = cls._all.get(loop)
        if found is None:
            found = cls._all[loop] = cls(loop)
            loop.add_reader(found.hub.fileno(), found._wake)
        found._tasks += 1
        return found

    def leave(self) -> None:
        self._tasks -= 1
        if self._tasks == 0:
            loop = self._loop()
            if loop is not None:
                self._all.pop(loop, None)
                if not loop.is_closed():
                    loop.remove_reader(self.hub.fileno())

    def _wake(self) -> None:
        for key in self.hub.drain():
            future = self._waiting.pop(key, None)
            if future is not None and not future.done():
                future.set_result(None)

    async def wait(self, loading: _native.Loading, progress: Progress | None) -> None:
        """Waits until something can be taken."""
        while True:
            key, future = self._next, asyncio.get_running_loop().create_future()
            self._next += 1
            self._waiting[key] = future
            try:
                if loading.poll(self.hub, key):
                    return
                if progress is None:
                    await future
                while progress is not None and not future.done():
                    await asyncio.wait([future], timeout=_TICK)
                    if not future.done():
                        progress(*loading.progress())
            finally:
                self._waiting.pop(key, None)


async def _wait_async(loading: _native.Loading, progress: Progress | None = None) -> Any:
    loop = _EventLoop.enter()
    try:
        while True:
            await loop.wait(loading, progress)
            if progress is not None:
                progress(*loading.progress())
            if (taken := loading.take()) is not None:
                return taken[0]
    except BaseException:
        loading.close()
        raise
    finally:
        loop.leave()


def load(
    paths: Paths,
    *,
    tensors: str | Iterable[str] | None = None,
    shard: Shard | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    verify: Path | None = None,
    format: str | None = None,
    heap: str = "anon",
    route: str = "auto",
    cache: str | None = None,
    allow_missing: bool = False,
) -> Image:
    """Loads a model: a file, a folder, an index, or several files.

    - ``tensors``: names or patterns (``model.layers.{0..3}.*``); nothing else is read.
    - ``shard``: ``(rank, world_size)`` or ``(rank, world_size, dim)``: one rank's part of each
      tensor, cut along dimension 0 or ``dim``. Parts along another dimension than 0 are copied
      together when they are first looked at.
    - ``memory_limit``: the most bytes that this load may have in memory.
    - ``progress``: called with the bytes that were read and the bytes to read, now and then and at
      the end, by the thread that waits. What it raises cancels the load.
    - ``verify``: the path of a manifest, or ``sha256:HEX`` of the one file (or ``blake3:``,
      ``crc32c:``, ``xxh3:``).
    - ``format``: ``auto``, ``safetensors``, ``gguf`` or ``raw``.
    - ``heap``: ``anon``; ``memfd`` for memory that other processes can map; ``dma-buf``,
      ``udmabuf`` or ``dma-heap:NAME`` for dma-bufs.
    - ``route``: the route to start at, or ``auto``.
    - ``cache``: ``auto`` copies what the page cache has from there, ``bypass`` reads all from
      storage.
    - ``allow_missing``: load what is there of a model of which files are missing.

    Other threads run meanwhile. Ctrl-C cancels it.

    Raises subclasses of :class:`Error`.
    """
    keywords = _keywords(
        tensors=tensors,
        shard=shard,
        memory_limit=memory_limit,
        verify=verify,
        format=format,
        heap=heap,
        route=route,
        cache=cache,
        allow_missing=allow_missing,
    )
    return wait(_native.start_load(_paths(paths), keywords), progress)


async def load_async(
    paths: Paths,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Image:
    """Does the same as :func:`load`, in an event loop of asyncio, which it does not block.

    Cancelling the task cancels the load. ``progress`` is called by the event loop's thread.
    """
    keywords = _keywords(**options)
    return await _wait_async(_native.start_load(_paths(paths), keywords), progress)


class Stream(Iterator["tuple[str, Tensor]"]):
    """The tensors of a load as they come, with their names. Made by :func:`stream`.

    It keeps none. The load is ahead of its consumer by a bounded number of bytes. Closing it, or
    leaving its ``with``, cancels the load; tensors that were given stay. Several threads may take
    from one stream: each tensor goes to one of them.
    """

    def __init__(self, loading: _native.Loading, progress: Progress | None) -> None:
        self._loading = loading
        self._progress = progress

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        tensor = wait(self._loading, self._progress)
        if tensor is None:
            raise StopIteration
        return tensor.name, tensor

    def progress(self) -> tuple[int, int]:
        """How many bytes were read, and how many there are to read."""
        return self._loading.progress()

    def close(self) -> None:
        """Cancels the load, if it has not ended."""
        self._loading.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def stream(
    paths: Paths,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Stream:
    """Gives the tensors of a model as they come, each with its name, while the rest is read.

    They come in file order, or in the order of ``tensors``. With ``memory_limit``, and where the
    consumer drops what it has used, models larger than memory can be streamed. The other options
    are those of :func:`load`.
    """
    keywords = _keywords(**options)
    return Stream(_native.start_stream(_paths(paths), keywords), progress)


async def stream_async(
    paths: Paths,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> AsyncIterator[tuple[str, Tensor]]:
    """Does the same as :func:`stream`, for ``async for``.

    The load begins with the first tensor that is asked for. Closing the iterator cancels it.
    """
    keywords = _keywords(**options)
    loading = _native.start_stream(_paths(paths), keywords)
    try:
        while (tensor := await _wait_async(loading, progress)) is not None:
            yield tensor.name, tensor
    finally:
        loading.close()
