"""A program that uses the package's types. `.ci/python` checks it with `mypy --strict`, which also
rejects unused `type: ignore` comments. It is never run."""

from typing import Any, assert_type

import numpy

import dmaload


def load(path: str) -> int:
    image = dmaload.load(
        path, tensors=["a", "b*"], shard=(0, 2), progress=lambda done, total: None
    )
    assert_type(image, dmaload.Image)
    assert_type(image["a"], dmaload.Tensor)
    assert_type(image.get("a"), dmaload.Tensor | None)
    assert_type(image["a"].numpy(), numpy.ndarray[Any, Any])
    assert_type(memoryview(image["a"]).nbytes, int)
    assert_type(
        dmaload.numpy.load_file(path, allow_missing=True), dict[str, numpy.ndarray[Any, Any]]
    )
    dmaload.torch.load_file(path, "cuda:0", progress=print, heap="memfd")
    return sum(tensor.nbytes for tensor in image.values())


def stream(path: str) -> None:
    with dmaload.stream(path, memory_limit=1 << 20) as tensors:
        for name, tensor in tensors:
            assert_type((name, tensor), tuple[str, dmaload.Tensor])
        assert_type(tensors.progress(), tuple[int, int])


async def asynchronous(path: str) -> None:
    assert_type(await dmaload.load_async(path, verify=path), dmaload.Image)
    async for name, tensor in dmaload.stream_async([path], format="gguf"):
        assert_type((name, tensor), tuple[str, dmaload.Tensor])


def parts(path: str) -> None:
    with dmaload.safe_open(path, framework="numpy") as file:
        assert_type(file.keys(), list[str])
        file.get_slice("a")[1:2, ...]


def shared(socket: str) -> None:
    tensor = dmaload.share.attach(socket, "name", trusted_users=[0])["a"]
    for part in dmaload.dma_buf(tensor):
        assert_type((part.fileno(), part.offset, part.length), tuple[int, int, int])


def mistakes(path: str) -> None:
    dmaload.load(path, heap=3)  # type: ignore[arg-type]
    dmaload.load(path, no_such=3)  # type: ignore[call-arg]
    dmaload.stream(path, heap=3)  # type: ignore[arg-type]
    dmaload.stream(path, no_such=3)  # type: ignore[call-arg]
    dmaload.numpy.load_file(path, no_such=3)  # type: ignore[call-arg]
    try:
        dmaload.load(path)
    except dmaload.Error as error:
        assert_type(error.hint, str | None)
