"""Checks the wheel that was unpacked in a folder: `any_interpreter.py FOLDER`.

One wheel supports CPython 3.11 and later. So this program runs with any of these interpreters, and
uses only the standard library.
"""

import asyncio
import hashlib
import os
import sys
import tempfile
import threading

sys.path.insert(0, sys.argv[1])
sys.path.insert(1, os.path.dirname(os.path.abspath(__file__)))

import dmaload  # noqa: E402
from files import large, tensor, write  # noqa: E402


def check(image, tensors):
    assert sorted(image) == sorted(tensors)
    for name, expected in tensors.items():
        view = memoryview(image[name])
        assert (image[name].dtype, image[name].shape) == (expected.dtype, expected.shape)
        assert hashlib.sha256(view.tobytes()).digest() == hashlib.sha256(expected.data).digest()


async def concurrently(path, tensors):
    for image in await asyncio.gather(*[dmaload.load_async(path) for _ in range(5)]):
        check(image, tensors)


with tempfile.TemporaryDirectory() as folder:
    path, tensors = large(folder + "/large.safetensors", 3)
    check(dmaload.load(path), tensors)
    asyncio.run(concurrently(path, tensors))
    with dmaload.stream(path) as stream:
        assert [name for name, _ in stream] == list(tensors)
    dtypes = {name: tensor(name, (3, 8)) for name in ("BF16", "F8_E4M3", "F4", "F64", "BOOL")}
    small = write(folder + "/small.safetensors", dtypes)
    threads = [
        threading.Thread(target=lambda: check(dmaload.load(small), dtypes)) for _ in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view = memoryview(dmaload.load(small)["F64"])
    assert (view.format, view.shape, view.readonly) == ("d", (3, 8), False)
    view[0, 0] = 1.5
    assert view[0, 0] == 1.5
    try:
        dmaload.load(folder + "/missing")
    except dmaload.Error as error:
        assert error.filename == folder + "/missing"
    else:
        raise AssertionError("a missing file was loaded")
    print(f"CPython {sys.version.split()[0]}: all checks passed")
