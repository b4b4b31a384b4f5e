"""Tests for memory: writing to a tensor must neither crash nor change anything else."""

import asyncio
import hashlib
import os
import socket as socket_module
import subprocess
import sys
import time

import pytest

import dmaload
from files import large, tensor, write

# The script writes despite read-only flags, like torch, which has no read-only tensors.
OVERWRITE = """
    import ctypes, hashlib
    import dmaload, numpy

    def overwrite(found):
        array = numpy.asarray(memoryview(found))
        assert array.nbytes == found.nbytes
        ctypes.memset(array.ctypes.data, 0x55, array.nbytes)
        assert (array.view(numpy.uint8) == 0x55).all()
        exported = numpy.from_dlpack(found)
        ctypes.memset(exported.ctypes.data, 0xAA, exported.nbytes)
        assert (exported.view(numpy.uint8) == 0xAA).all()

    def digest(found):
        return hashlib.sha256(memoryview(found).tobytes()).hexdigest()
"""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("heap", ["anon", "memfd"])
def test_writing_changes_neither_the_file_nor_another_load(tmp_path, programs, heap):
    expected = tensor("F32", (300, 1000))
    path = write(tmp_path / "model.safetensors", {"w": expected, "next": tensor("U8", (5000,))})
    before = sha256(path.read_bytes())
    out = programs.succeed(
        OVERWRITE
        + """
    import sys
    path, heap = sys.argv[1:]
    first, second = dmaload.load(path, heap=heap), dmaload.load(path, heap=heap)
    overwrite(first["w"])
    print(digest(second["w"]), digest(first["next"]), digest(dmaload.load(path, heap=heap)["w"]))
    """,
        path,
        heap,
    )
    neighbor = sha256(tensor("U8", (5000,)).data)
    assert out.split() == [sha256(expected.data), neighbor, sha256(expected.data)]
    assert sha256(path.read_bytes()) == before


def test_numpy_can_write_to_loaded_arrays(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (300, 100))})
    for heap in ("anon", "memfd"):
        array = dmaload.load(path, heap=heap)["w"].numpy()
        assert array.flags.writeable
        array[...] = 7
        array += 1
        assert (array == 8).all()


@pytest.fixture
def served(tmp_path, command):
    """Starts a process that shares a model. Returns its socket and the tensors."""
    path, tensors = large(tmp_path / "served.safetensors", 4)
    socket = tmp_path / "m.sock"
    server = subprocess.Popen([command, "serve", socket, path], stdout=subprocess.PIPE, text=True)
    while not socket.exists():
        assert server.poll() is None
        time.sleep(0.01)
    yield socket, tensors
    server.terminate()
    assert server.wait(10) == 0
    server.stdout.close()


def test_attached_tensors_equal_the_served_ones(served):
    socket, tensors = served
    image = dmaload.share.attach(socket)
    assert sorted(image) == sorted(tensors)
    for name, expected in tensors.items():
        assert memoryview(image[name]).tobytes() == expected.data


def test_attach_async_does_not_block_the_event_loop(served):
    socket, tensors = served

    async def attach_both():
        return await asyncio.gather(*(dmaload.share.attach_async(socket) for _ in range(2)))

    for image in asyncio.run(attach_both()):
        assert sorted(image) == sorted(tensors)
        for name, expected in tensors.items():
            assert memoryview(image[name]).tobytes() == expected.data
    with pytest.raises(dmaload.ShareError):
        asyncio.run(dmaload.share.attach_async(socket.with_name("no-socket")))


def test_attach_async_waits_for_a_silent_server_in_the_background(tmp_path):
    """A server that accepts the connection but never answers must not block the event loop."""
    path = tmp_path / "silent.sock"
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen()

        async def attach():
            task = asyncio.create_task(dmaload.share.attach_async(path))
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(attach())


def test_writes_to_attached_memory_are_private(served, programs):
    socket, tensors = served
    out = programs.succeed(
        OVERWRITE
        + """
    import sys
    image = dmaload.share.attach(sys.argv[1])
    for found in image.values():
        overwrite(found)
    image["t0"].numpy()[...] = 1
    """,
        socket,
    )
    assert out == ""
    image = dmaload.share.attach(socket)
    for name, expected in tensors.items():
        assert memoryview(image[name]).tobytes() == expected.data, name


def test_attached_memory_is_shared_until_written(served, programs):
    """Reading uses no private memory, because the pages belong to the server."""
    socket, tensors = served
    out = programs.succeed(
        """
    import re, sys
    import dmaload

    def own_kib():
        with open("/proc/self/smaps_rollup") as file:
            text = file.read()
        return sum(int(re.search(rf"^{key}: *(\\d+)", text, re.M)[1])
                   for key in ("Private_Dirty", "Anonymous"))

    image = dmaload.share.attach(sys.argv[1])
    before = own_kib()
    total = sum(sum(memoryview(each).cast("B")[::4096]) for each in image.values())
    assert total > 0
    read = own_kib() - before
    image["t0"].numpy()[...] = 1
    print(read, own_kib() - before)
    """,
        socket,
    )
    read, written = map(int, out.split())
    assert read < 1024, "reading 4 MiB must not copy pages"
    assert written >= 1024, "writing 1 MiB must copy its pages"
    assert len(tensors) == 4


def test_attaching_to_an_unknown_name_fails(served):
    socket, _ = served
    with pytest.raises(dmaload.Error, match="no-such-model"):
        dmaload.share.attach(socket, "no-such-model")


def test_forked_child_writes_to_its_own_copy(tmp_path):
    expected = tensor("F32", (300, 100))
    path = write(tmp_path / "model.safetensors", {"w": expected})
    for heap in ("anon", "memfd"):
        found = dmaload.load(path, heap=heap)["w"]
        array = found.numpy()
        child = os.fork()
        if child == 0:
            # An exception in the child must not reach pytest, which would run the other tests
            # in the child too.
            try:
                same = memoryview(found).tobytes() == expected.data
                array[...] = 7
                os._exit(0 if same and (array == 7).all() else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert memoryview(found).tobytes() == expected.data


def test_dma_bufs_need_a_device(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (300, 100))})
    found = dmaload.load(path)["w"]
    with pytest.raises(dmaload.UnsupportedError, match="descriptor|dma-buf"):
        dmaload.dma_buf(found)
    if not os.path.exists("/dev/udmabuf"):
        with pytest.raises(dmaload.Error, match="/dev/udmabuf") as caught:
            dmaload.load(path, heap="udmabuf")
        assert caught.value.filename == "/dev/udmabuf"


def test_memory_is_freed_with_the_last_tensor(disk, programs):
    path, _ = large(disk / "model.safetensors", 96)
    out = programs.succeed(
        """
    import gc, sys, time
    import dmaload
    import numpy  # Allocates its own memory before the measurement.

    def resident_mib():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024

    def settles_below(limit):
        deadline = time.monotonic() + 10
        while resident_mib() >= limit and time.monotonic() < deadline:
            time.sleep(0.02)
        return resident_mib() < limit

    before = resident_mib()
    image = dmaload.load(sys.argv[1])
    assert resident_mib() - before >= 90, resident_mib() - before
    last = image["t95"]
    del image
    array = last.numpy()
    del last
    capsule = array.base
    assert array[0, 0] == array[0, 0]
    # The array keeps the second of two segments, which is 32 MiB. A thread frees the first one.
    assert settles_below(before + 64), resident_mib() - before
    assert resident_mib() - before >= 1, resident_mib() - before
    del array, capsule
    gc.collect()
    assert settles_below(before + 16), resident_mib() - before
    # A capsule that is not consumed also frees its memory.
    capsules = [each.__dlpack__(max_version=(1, 0)) for each in dmaload.load(sys.argv[1]).values()]
    capsules += [each.__dlpack__() for each in dmaload.load(sys.argv[1]).values()]
    assert resident_mib() - before >= 180
    del capsules
    gc.collect()
    assert settles_below(before + 16), resident_mib() - before
    print("gone")
    """,
        path,
    )
    assert out == "gone\n"


def test_five_hundred_loads_leak_nothing(disk, programs):
    path, _ = large(disk / "model.safetensors", 2)
    out = programs.succeed(
        """
    import asyncio, gc, os, sys, threading, tracemalloc
    import dmaload, numpy

    path = sys.argv[1]

    def once(number):
        image = dmaload.load(path, heap="memfd" if number % 2 else "anon")
        image["t0"].numpy()[0, 0] = number
        numpy.from_dlpack(image["t1"])
        memoryview(image["t1"]).release()
        image.report(), image.metadata()
        if number % 5:
            return
        with dmaload.stream(path) as stream:
            next(stream)
        with dmaload.safe_open(path, framework="numpy") as file:
            file.get_slice("t0")[:2]
        try:
            dmaload.load(path + ".missing")
        except dmaload.Error:
            pass
        asyncio.run(dmaload.load_async(path))

    def state():
        gc.collect()
        with open("/proc/self/status") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        with open("/proc/self/maps") as file:
            maps = sum(1 for _ in file)
        traced = tracemalloc.get_traced_memory()[0]
        descriptors, threads = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
        return kib, len(descriptors), len(threads), maps, traced

    tracemalloc.start()
    for number in range(100):
        once(number)
    before = state()
    for number in range(500):
        once(number)
    print(*[after - then for after, then in zip(state(), before)])
    """,
        path,
        timeout=110,
    )
    kib, descriptors, threads, maps, traced = map(int, out.split())
    # The last loads, of 2 MiB each, may not have released their memory and descriptors yet.
    assert kib < 8192, f"{kib} more KiB are resident"
    assert descriptors <= 8 and threads <= 8 and maps <= 40, (descriptors, threads, maps)
    assert traced < 64 << 10, f"Python has allocated {traced} more bytes"


def test_reused_memory_shows_no_old_bytes(tmp_path):
    """A load may reuse memory that an earlier load freed, but must not expose its old bytes."""
    first = write(tmp_path / "a.safetensors", {"w": tensor("U8", (3 << 20,), 1)})
    for number in range(20):
        assert dmaload.load(first)["w"].numpy()[-1] == tensor("U8", (3 << 20,), 1).data[-1]
        expected = tensor("U8", ((1 << 20) + number,), number)
        second = write(tmp_path / "b.safetensors", {"w": expected})
        assert memoryview(dmaload.load(second)["w"]).tobytes() == expected.data


def test_exports_leak_no_references(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (300, 100))})
    found = dmaload.load(path)["w"]
    before = sys.getrefcount(found)
    for _ in range(1000):
        memoryview(found).release()
        found.numpy()
        found.__dlpack__()
    assert sys.getrefcount(found) == before


def test_child_forked_while_rows_are_gathered_has_the_tensor(tmp_path, programs):
    """A child does not wait for a thread that exists only in its parent."""
    rows = 1 << 18
    path = write(tmp_path / "rows.safetensors", {"w": tensor("U8", [rows, 16])})
    # The script avoids NumPy, which imports modules lazily: if a thread is importing one during
    # the fork, that module's import lock stays locked in the child.
    text = """
    import os, signal, sys, threading, time
    import dmaload

    for delay in (0.0, 0.01, 0.03, 0.1):
        part = dmaload.load(sys.argv[1], shard=(1, 2, 1))["w"]
        thread = threading.Thread(target=memoryview, args=[part])
        thread.start()
        time.sleep(delay)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if memoryview(part).shape == (ROWS, 8) else 1)
        thread.join()
        print(os.waitpid(child, 0)[1])
    """.replace("ROWS", str(rows))
    # Python warns when a process with several threads forks.
    text = "    import warnings\n    warnings.simplefilter('ignore')\n" + text
    assert programs.succeed(text, path, timeout=200) == "0\n" * 4
