"""Tests for lifetimes, in separate processes under `-X dev` that must exit without warnings."""

import time

import pytest

from files import large, tensor, write


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.safetensors", {"w": tensor("I32", (1000, 300))})


CHECK = """
    import gc, hashlib, sys
    import dmaload, numpy
    path, expected = sys.argv[1:]

    def check(buffer):
        assert hashlib.sha256(bytes(memoryview(buffer).cast("B"))).hexdigest() == expected
"""


def digest():
    import hashlib

    return hashlib.sha256(tensor("I32", (1000, 300)).data).hexdigest()


@pytest.mark.parametrize("heap", ["anon", "memfd"])
def test_each_object_outlives_its_source(model, programs, heap):
    programs.succeed(
        CHECK
        + f"""
    image = dmaload.load(path, heap="{heap}", memory_limit=1 << 30)
    # The image outlives its loader, which no other load uses.
    gc.collect()
    found = image["w"]
    del image
    gc.collect()
    for _ in range(20):
        # Later loads must not reuse the tensor's memory.
        dmaload.load(path)["w"].numpy()[...] = 5
    check(found)
    view, array, exported = memoryview(found), found.numpy(), numpy.from_dlpack(found)
    row = array[7]
    del found
    gc.collect()
    for _ in range(20):
        dmaload.load(path)["w"].numpy()[...] = 5
    check(view), check(array), check(exported)
    first = row.tobytes()
    del view, array, exported
    gc.collect()
    assert row.tobytes() == first
    print("ok")
    """,
        model,
        digest(),
    )


@pytest.mark.parametrize("heap", ["anon", "memfd"])
@pytest.mark.parametrize(
    "way", ["memoryview(found)", "found.numpy()", "numpy.from_dlpack(found)", "Unversioned(found)"]
)
def test_each_conversion_keeps_the_memory(model, programs, heap, way):
    programs.succeed(
        CHECK
        + f"""
    def Unversioned(found):
        class Old:
            # Importers older than DLPack 1 pass no version.
            __dlpack_device__ = lambda self: (1, 0)
            __dlpack__ = lambda self, **_: found.__dlpack__()
        return numpy.from_dlpack(Old())

    found = dmaload.load(path, heap="{heap}")["w"]
    kept = {way}
    del found
    gc.collect()
    for _ in range(20):
        dmaload.load(path, heap="{heap}")["w"].numpy()[...] = 5
    check(kept)
    """,
        model,
        digest(),
    )


def test_objects_can_live_until_the_interpreter_exits(model, programs):
    programs.succeed(
        CHECK
        + """
    image = dmaload.load(path)
    found, array, view = image["w"], image["w"].numpy(), memoryview(image["w"])
    capsule = found.__dlpack__(max_version=(1, 0))
    stream = dmaload.stream(path)
    next(stream)
    other = dmaload.stream(path)
    file = dmaload.safe_open(path, framework="numpy")
    part = file.get_slice("w")

    class Last:
        # Destroyed while the interpreter exits.
        def __del__(self):
            check(array)

    last = Last()
    cycle = [last, image, array]
    cycle.append(cycle)
    """,
        model,
        digest(),
    )


def test_closed_stream_keeps_its_tensors_valid(model, programs):
    programs.succeed(
        CHECK
        + """
    stream = dmaload.stream(path)
    _, found = next(stream)
    stream.close()
    del stream
    gc.collect()
    check(found)
    stream = dmaload.stream(path)
    stream.close()
    try:
        next(stream)
    except dmaload.ClosedError as error:
        assert "closed" in str(error)
    else:
        raise AssertionError("a closed stream must not yield tensors")
    """,
        model,
        digest(),
    )


WAYS = {
    "thread": """
        import threading
        threading.Thread(target=lambda: dmaload.load(path), daemon=True).start()
    """,
    "stream": "stream = dmaload.stream(path)",
    "stream in a thread": """
        import threading
        threading.Thread(target=lambda: list(dmaload.stream(path)), daemon=True).start()
    """,
    "coroutine": """
        import asyncio
        loop = asyncio.new_event_loop()
        task = loop.create_task(dmaload.load_async(path))
        try:
            loop.run_until_complete(asyncio.wait_for(asyncio.shield(task), 0.3))
        except TimeoutError:
            pass
        task.cancel()
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        loop.close()
    """,
    "coroutine, abandoned": """
        import asyncio
        async def main():
            loads = [asyncio.ensure_future(dmaload.load_async(path)) for _ in range(5)]
            await asyncio.sleep(0.3)
        asyncio.run(main())
    """,
    "progress in a thread": """
        import threading
        calls = []
        load = lambda: dmaload.load(path, progress=lambda *seen: calls.append(seen))
        threading.Thread(target=load, daemon=True).start()
    """,
}


@pytest.mark.parametrize("way", WAYS)
def test_interpreter_exits_with_loads_in_flight(tmp_path, programs, slow_file, way):
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, 1 << 20)
    text = f"""
    import sys, time
    import dmaload
    path = sys.argv[1]

    class Slow:
        # Destroyed when other threads can no longer attach to the interpreter. Sleeps, so threads
        # that are waiting for a load have time to try.
        def __del__(self, sleep=time.sleep):
            sleep(0.3)

    sys.slow = Slow()
    if True:
        {WAYS[way].strip()}
    print("in flight", flush=True)
    sys.stdin.readline()
    """
    with programs.start(text, slow.path) as process:
        assert process.stdout.readline() == "in flight\n"
        slow.wait_until_held()
        started = time.monotonic()
        process.stdin.write("end\n")
        process.stdin.flush()
        _, complaints = process.communicate(timeout=20)
        assert (process.returncode, complaints) == (0, "")
        assert time.monotonic() - started < 10
