"""Loads models as a whole or as a stream, with blocking functions and with asyncio."""

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

# How long a thread blocks at a time, in seconds. Between waits, Python handles signals. A result
# ends a wait immediately.
_TICK = 0.05


def _paths(paths: Paths) -> list[str]:
    if isinstance(paths, (str, bytes, os.PathLike)):
        paths = [paths]
    return [os.fsdecode(os.fspath(path)) for path in paths]


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`load`, which documents their meanings and defaults."""

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
            raise ConfigError(f"shard must be (rank, world_size) or (rank, world_size, dim), not {shard!r}")
        # Without a dimension, the library would divide the bytes of each file among the ranks,
        # and the shares would contain no tensors.
        shard = (numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 0)
    if memory_limit is not None and not 0 <= memory_limit < 1 << 64:
        raise ConfigError(f"memory_limit must be between 0 and 2**64 - 1 bytes, but is {memory_limit}")
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
    """Blocks until a result is available.

    An exception, such as ``KeyboardInterrupt``, cancels the operation.
    """
    try:
        while True:
            has_come = loading.wait(_TICK)
            if progress is not None:
                progress(*loading.progress())
            # If another thread took the result first, this thread waits for the next result.
            if has_come and (taken := loading.take()) is not None:
                return taken[0]
    except BaseException:
        loading.close()
        raise


class _EventLoop:
    """Wakes the tasks of one event loop. An instance exists as long as any task is waiting."""

    _all: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _EventLoop] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.hub = _native.Hub()
        # `leave` cannot ask for the running loop: an abandoned coroutine may be closed while
        # another loop, or no loop, is running.
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
        """Waits until a result can be taken."""
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

    - ``tensors``: names or patterns (``model.layers.{0..3}.*``) of the tensors to load.
    - ``shard``: ``(rank, world_size)`` or ``(rank, world_size, dim)``, to load one rank's share of
      each tensor. Tensors are cut along the dimension ``dim``, by default 0. If it is not 0, a
      share is not contiguous in memory, so its first conversion to an array copies it.
    - ``memory_limit``: the maximum number of bytes that this load's segments may occupy.
    - ``progress``: a function that the waiting thread calls repeatedly, and once at the end. Its
      arguments are the number of bytes read and the number of bytes to read. An exception from it
      cancels the load.
    - ``verify``: the path of a manifest, or the checksum of a single file: ``sha256:HEX`` (or
      ``blake3:``, ``crc32c:``, ``xxh3:``).
    - ``format``: ``auto``, ``safetensors``, ``gguf`` or ``raw``.
    - ``heap``: ``anon``; ``memfd`` for memory that other processes can map; ``dma-buf``,
      ``udmabuf`` or ``dma-heap:NAME`` for dma-bufs.
    - ``route``: the first route to try, or ``auto``.
    - ``cache``: ``auto`` copies cached bytes from the page cache, ``bypass`` reads all bytes from
      storage.
    - ``allow_missing``: load the files that exist, even if other files of the model are missing.

    Other Python threads can run during the load. Ctrl-C cancels it.

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


async def _start_async(
    start: Callable[[list[str], dict[str, Any]], _native.Loading],
    paths: list[str],
    keywords: dict[str, Any],
) -> _native.Loading:
    # Starting a load reads the manifest, so a thread does it.
    if keywords["verify"] is not None:
        return await asyncio.to_thread(start, paths, keywords)
    return start(paths, keywords)


async def load_async(
    paths: Paths,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Image:
    """Like :func:`load`, but for asyncio: it does not block the event loop.

    Cancelling the task cancels the load. ``progress`` is called on the event loop's thread.
    """
    keywords = _keywords(**options)
    loading = await _start_async(_native.start_load, _paths(paths), keywords)
    return await _wait_async(loading, progress)


class Stream(Iterator["tuple[str, Tensor]"]):
    """Iterates over the names and tensors of a load as they arrive. Created by :func:`stream`.

    A stream does not keep the tensors that it has yielded. It reads ahead of its consumer by at
    most the window and one segment (by default 128 MiB and 64 MiB). Closing it, or leaving its
    ``with`` block, cancels the load, but yielded tensors stay valid. Several threads can read from
    one stream; each tensor goes to one of them.
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
        """Returns the number of bytes read and the number of bytes to read."""
        return self._loading.progress()

    def close(self) -> None:
        """Cancels the load if it is still running. Later reads raise :class:`ClosedError`."""
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
    """Yields the names and tensors of a model as they arrive.

    While a tensor is being used, later tensors are still being read. Tensors arrive in file order,
    or in the order of ``tensors``. With ``memory_limit``, a consumer that drops used tensors can
    stream models larger than memory. The other options are those of :func:`load`.
    """
    keywords = _keywords(**options)
    return Stream(_native.start_stream(_paths(paths), keywords), progress)


async def stream_async(
    paths: Paths,
    *,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> AsyncIterator[tuple[str, Tensor]]:
    """Like :func:`stream`, but for use with ``async for``.

    The load begins when the first tensor is requested. Closing the iterator cancels the load.
    """
    keywords = _keywords(**options)
    loading = await _start_async(_native.start_stream, _paths(paths), keywords)
    try:
        while (tensor := await _wait_async(loading, progress)) is not None:
            yield tensor.name, tensor
    finally:
        loading.close()
