"""Tests for calls that wait while other threads run, signals arrive, tasks are cancelled, or
processes fork.
"""

import asyncio
import os
import signal
import subprocess
import threading
import time

import pytest

import dmaload
from files import large, sharded, tensor, write

# Each of these calls waits for a file whose bytes are held back from 1 MiB on.
WAITS = {
    "load": "dmaload.load(path)",
    "load with progress": "dmaload.load(path, progress=lambda done, total: None)",
    "stream": "list(dmaload.stream(path))",
    "numpy.load_file": "dmaload.numpy.load_file(path)",
    "get_tensor": "dmaload.safe_open(path, framework='numpy').get_tensor('t3')",
    "get_slice": "dmaload.safe_open(path, framework='numpy').get_slice('t3')[:]",
}
# Each of these calls waits for a header that is held back.
HEADER_WAITS = {
    "safe_open": "dmaload.safe_open(path, framework='numpy')",
    "load's header": "dmaload.load(path)",
}
ALL_WAITS = [(way, 1 << 20) for way in WAITS] + [(way, 0) for way in HEADER_WAITS]


@pytest.mark.parametrize(("way", "held_from"), ALL_WAITS)
def test_other_threads_run_during_a_wait(tmp_path, programs, slow_file, way, held_from):
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, held_from)
    # The counter runs only while the waiting thread has released the GIL.
    text = f"""
    import sys, threading, time
    import dmaload
    path = sys.argv[1]
    counted = 0

    def count():
        global counted
        started = time.monotonic()
        while not done:
            counted += 1
            time.sleep(0.001)
            if counted == 100:
                print("counted in", time.monotonic() - started, flush=True)

    done = False
    thread = threading.Thread(target=count)
    print("begins", flush=True)
    thread.start()
    result = {(WAITS | HEADER_WAITS)[way]}
    done = True
    thread.join()
    print("done", counted, flush=True)
    """
    with programs.start(text, slow.path) as process:
        assert process.stdout.readline() == "begins\n"
        slow.wait_until_held()
        # The waiting thread returns to Python 20 times a second to handle signals. If other
        # threads ran only then, counting to 100 would take 5 s.
        said, seconds = process.stdout.readline().rsplit(maxsplit=1)
        assert said == "counted in" and float(seconds) < 2.5
        assert process.poll() is None
        slow.release()
        out, complaints = process.communicate(timeout=30)
        assert (process.returncode, complaints) == (0, "")
        done, counted = out.split()
        assert done == "done" and int(counted) >= 100


@pytest.mark.parametrize(("way", "held_from"), ALL_WAITS)
def test_ctrl_c_ends_a_wait(tmp_path, programs, slow_file, way, held_from):
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, held_from)
    text = f"""
    import sys
    import dmaload
    path = sys.argv[1]
    try:
        {(WAITS | HEADER_WAITS)[way]}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    """
    with programs.start(text, slow.path) as process:
        slow.wait_until_held()
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - started < 2
        out, complaints = process.communicate(timeout=20)
        assert (process.returncode, out, complaints) == (0, "", "")


def test_load_continues_after_a_signal_handler(tmp_path, programs, slow_file):
    """A signal is handled during the load. The load continues if the handler does not raise."""
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, 1 << 20)
    text = """
    import signal, sys
    import dmaload
    signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
    print(len(dmaload.load(sys.argv[1])), flush=True)
    """
    with programs.start(text, slow.path) as process:
        slow.wait_until_held()
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "handled\n"
        slow.release()
        out, complaints = process.communicate(timeout=30)
        assert (process.returncode, out, complaints) == (0, "4\n", "")


def test_progress_counts_to_the_end(disk):
    path, _ = large(disk / "model.safetensors", 64)
    seen, threads = [], set()

    def progress(done, total):
        seen.append((done, total))
        threads.add(threading.get_ident())

    dmaload.load(path, progress=progress, memory_limit=1 << 30)
    assert seen[-1][0] == seen[-1][1] >= 64 << 20
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert threads == {threading.get_ident()}, "only the waiting thread may call `progress`"


def test_exception_in_progress_cancels_the_load(tmp_path, slow_file):
    path, tensors = large(tmp_path / "large.safetensors", 64)
    slow = slow_file(path, 1 << 20)

    class Enough(Exception):
        pass

    def progress(_done, _total):
        raise Enough

    with pytest.raises(Enough):
        dmaload.load(slow.path, progress=progress)
    slow.release()
    # Reads that were in flight may continue, but the rest of the file is not read.
    assert slow.wait_until_idle() < os.path.getsize(path) / 2
    assert len(dmaload.load(slow.path)) == len(tensors)


def test_thousand_cancelled_loads_leak_nothing(disk, programs):
    path, _ = large(disk / "model.safetensors", 8)
    out = programs.succeed(
        """
    import asyncio, gc, hashlib, os, random, sys, time
    import dmaload
    path = sys.argv[1]
    problems, ended = [], {"cancelled": 0, "loaded": 0}

    def state():
        gc.collect()
        with open("/proc/self/status") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        return kib >> 10, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    async def one(source):
        task = asyncio.ensure_future(dmaload.load_async(path))
        # Cancels at a random time: before the load begins, during it, or after it.
        for _ in range(source.choice([0, 0, 1, 2, 5])):
            await asyncio.sleep(source.random() * 0.004)
        task.cancel()
        try:
            assert len(await task) == 8
            ended["loaded"] += 1
        except asyncio.CancelledError:
            ended["cancelled"] += 1

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
        source = random.Random(1)
        states = []
        for number in range(5000):
            if ended["cancelled"] >= 1000:
                break
            await asyncio.gather(*[one(source) for _ in range(2 if number % 10 == 0 else 1)])
            if number == 100:
                states.append(state())
        # Cancels many loads at the same time.
        tasks = [asyncio.ensure_future(dmaload.load_async(path)) for _ in range(50)]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Tasks of loads that finished before they were cancelled keep the images.
        del task, tasks
        image = await dmaload.load_async(path)
        assert len(image) == 8
        del image
        deadline = time.monotonic() + 10
        while state()[0] > states[0][0] + 16 and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        states.append(state())
        return states

    before, after = asyncio.run(main())
    assert not problems, problems
    assert ended["cancelled"] >= 1000, ended
    print(*[b - a for a, b in zip(before, after)])
    """,
        path,
        timeout=110,
    )
    mib, descriptors, threads = map(int, out.split())
    assert mib <= 16 and descriptors <= 8 and threads <= 8, out


@pytest.mark.parametrize("streamed", [False, True])
def test_event_loop_runs_while_a_manifest_is_read(tmp_path, command, slow_file, streamed):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(subprocess.check_output([command, "manifest", path]))
    slow = slow_file(manifest, 0)
    # If the load blocks the event loop, only this timer lets it go on.
    blocked = threading.Event()
    watchdog = threading.Timer(10, lambda: (blocked.set(), slow.release()))
    watchdog.start()

    async def names():
        if streamed:
            return [name async for name, _ in dmaload.stream_async(path, verify=slow.path)]
        return list(await dmaload.load_async(path, verify=slow.path))

    async def main():
        task = asyncio.create_task(names())
        await asyncio.to_thread(slow.wait_until_held)
        watchdog.cancel()
        assert not blocked.is_set(), "the event loop was blocked"
        slow.release()
        return await task

    assert asyncio.run(main()) == ["w"]


def test_cancelled_load_stops_reading(tmp_path, programs, slow_file):
    path, _ = large(tmp_path / "large.safetensors", 64)
    slow = slow_file(path, 1 << 20)
    text = """
    import asyncio, sys, time
    import dmaload

    async def main():
        tasks = [asyncio.ensure_future(dmaload.load_async(sys.argv[1])) for _ in range(20)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks)
        started = time.monotonic()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in results), results
        print(time.monotonic() - started < 1, flush=True)
        sys.stdin.read()

    asyncio.run(main())
    """
    with programs.start(text, slow.path) as process:
        slow.wait_until_held()
        assert process.stdout.readline() == "True\n"
        slow.release()
        # Reads that were in flight may continue, but 20 complete loads would request 20 files.
        assert slow.wait_until_idle() < os.path.getsize(path)
        out, complaints = process.communicate(timeout=30)
        assert (process.returncode, out, complaints) == (0, "", "")


def test_async_functions_return_the_same_tensors(tmp_path):
    import asyncio

    folder, tensors = sharded(tmp_path / "model")

    async def main():
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        heart = asyncio.ensure_future(beat())
        image = await dmaload.load_async(folder, tensors=["layers.0.*"])
        assert sorted(image) == sorted(name for name in tensors if name.startswith("layers.0."))
        found = {}
        async for name, each in dmaload.stream_async(folder):
            found[name] = memoryview(each).tobytes()
        assert found == {name: each.data for name, each in tensors.items()}
        with pytest.raises(dmaload.Error, match="ENOENT"):
            await dmaload.load_async(folder / "missing.safetensors")
        heart.cancel()
        assert beats > 1, "the event loop must run during the load"

    asyncio.run(main())


FORKED = """
    import gc, os, sys, threading
    import dmaload
    slow, ready = sys.argv[1:]
    expected = bytes(memoryview(dmaload.load(ready)["w"]).cast("B"))
    before = dmaload.load(ready)
    result = []
    thread = threading.Thread(target=lambda: result.append(dmaload.load(slow)))
    thread.start()
    streams = [dmaload.stream(slow), dmaload.stream(slow)]
    print("begun", flush=True)
    sys.stdin.readline()
    # Python 3.12 and later warn when a process with threads forks, as this test must do.
    import warnings
    warnings.simplefilter("ignore")
    child = os.fork()
    if child == 0:
        assert bytes(memoryview(before["w"]).cast("B")) == expected
        before["w"].numpy()[...] = 0
        try:
            next(streams[0])
        except dmaload.ForkedError as error:
            assert str(os.getppid()) in str(error)
        # Dropping the parent's objects must not need the parent's threads.
        streams[0].close()
        del streams, before
        gc.collect()
        for heap in ("anon", "memfd"):
            assert bytes(memoryview(dmaload.load(ready, heap=heap)["w"]).cast("B")) == expected
        with dmaload.safe_open(ready, framework="numpy") as file:
            assert file.get_tensor("w").tobytes() == expected
        # Do not use os._exit: finalizing the interpreter in a forked child must work, too.
        sys.exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 7, status
    print("child ended", flush=True)
    thread.join()
    (image,) = result
    assert bytes(memoryview(before["w"]).cast("B")) == expected
    for name, each in image.items():
        assert memoryview(each).cast("B")[:8] == int(name[1:]).to_bytes(8, "little"), name
    print(len(image), flush=True)
"""


def test_forked_child_can_load_during_a_load(tmp_path, programs, slow_file):
    path, tensors = large(tmp_path / "large.safetensors", 4)
    ready = write(tmp_path / "ready.safetensors", {"w": tensor("F32", (100, 100))})
    slow = slow_file(path, 1 << 20)
    with programs.start(FORKED, slow.path, ready) as process:
        assert process.stdout.readline() == "begun\n"
        slow.wait_until_held()
        process.stdin.write("fork\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if answer != "child ended\n":
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(answer + process.communicate()[1])
        slow.release()
        out, complaints = process.communicate(timeout=30)
        assert (process.returncode, out, complaints) == (0, f"{len(tensors)}\n", "")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_workers_can_load(tmp_path, programs, method):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (100, 100))})
    out = programs.succeed(
        """
    import hashlib, multiprocessing, sys, warnings
    import dmaload

    def digest(path):
        return hashlib.sha256(bytes(memoryview(dmaload.load(path)["w"]).cast("B"))).hexdigest()

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        method, path = sys.argv[1:]
        expected = digest(path)
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            found = pool.map(digest, [path] * 8)
            pool.close()
            pool.join()
        print(found == [expected] * 8)
    """,
        method,
        path,
    )
    assert out == "True\n"


def test_images_and_tensors_cannot_be_pickled(tmp_path):
    import pickle

    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (10, 10))})
    image = dmaload.load(path)
    for each in (image, image["w"], dmaload.stream(path)):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(each)


def test_many_threads_can_load_at_once(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (1000, 300))})
    expected, wrong = tensor("F32", (1000, 300)).data, []

    def work():
        for _ in range(20):
            if memoryview(dmaload.load(path)["w"]).tobytes() != expected:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_waiting_takes_no_cpu_time(tmp_path, slow_file):
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, 1 << 20)
    result = []
    thread = threading.Thread(target=lambda: result.append(dmaload.load(slow.path)))
    thread.start()
    slow.wait_until_held()
    before = time.process_time()
    time.sleep(1)
    spent = time.process_time() - before
    slow.release()
    thread.join()
    assert len(result[0]) == 4
    assert spent < 0.2, f"{spent} s of CPU time in a second of waiting"


def test_threads_share_one_stream(disk):
    """Each tensor goes to one of the threads that read from a stream, and all see its end."""
    path, _ = large(disk / "large.safetensors", 24)
    expected = sorted(dmaload.safe_open(path, framework="numpy").keys())
    for _ in range(20):
        stream, names, problems = dmaload.stream(path), [], []

        def take(stream=stream, names=names, problems=problems):
            try:
                names.extend(name for name, _ in stream)
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (sorted(names), problems) == (expected, [])


def test_another_thread_can_close_a_stream_immediately(tmp_path, slow_file):
    path, _ = large(tmp_path / "large.safetensors", 4)
    slow = slow_file(path, 1 << 20)
    stream, problems = dmaload.stream(slow.path), []

    def take():
        try:
            list(stream)
        except dmaload.Error as problem:
            problems.append(problem)

    thread = threading.Thread(target=take)
    thread.start()
    slow.wait_until_held()
    started = time.monotonic()
    stream.close()
    thread.join()
    assert time.monotonic() - started < 2
    assert [type(problem) for problem in problems] == [dmaload.ClosedError]
