"""Loads a file into CPU memory with the wheel or another program, for `dmaload bench --peer`.

    peers.py NAME PATH    NAME: wheel, safetensors, safetensors-clone, fastsafetensors, runai,
                          fio, copies

The loaders require a safetensors file; fio and copies can read any file. The script reads
`prepare`, then `go` from standard input, and answers each with a line of JSON. The measurement
starts just before the file is opened and ends when every byte is in the caller's memory. If a
loader returns a mapping, the measurement includes reading a byte of each page. For fio, the
script reports the time that fio itself has measured.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time


def page_bytes(path):
    """Returns the page size used for most of the loaded memory (private memory or a memfd)."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        kinds = ("AnonHugePages:", "ShmemPmdMapped:")
        huge_kib = sum(int(line.split()[1]) for line in file if line.startswith(kinds))
    huge = huge_kib << 10 > os.path.getsize(path) // 2
    return 2 << 20 if huge else os.sysconf("SC_PAGE_SIZE")


def touch(tensor):
    """Faults in a tensor by reading a byte of each page."""
    array = tensor.view(-1).view(torch.uint8)
    return int(array[::4096].sum()) if array.numel() else 0


def by_wheel(path):
    """Loads with dmaload's Python package and its default options."""
    image = dmaload.load(path)
    return image, [image[name] for name in image]


def by_safetensors(path):
    with safe_open(path, framework="pt") as file:
        return [(tensor := file.get_tensor(name), touch(tensor)) for name in file.keys()]


def by_safetensors_clone(path):
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name).clone() for name in file.keys()]


def by_fastsafetensors(path):
    loader = SafeTensorsFileLoader(pg=SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [path]})
    buffer = loader.copy_files_to_device()
    return loader, buffer, [buffer.get_tensor(name) for name in buffer.key_to_rank_lidx]


def by_runai(path):
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([path])
        return [tensor for _name, tensor in streamer.get_tensors()]


def by_copies(path):
    """Reads into new memory with plain `preadv` loops, one thread per CPU."""
    file, extent = os.open(path, os.O_RDONLY), 2 << 20
    size = os.fstat(file).st_size
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    offsets = iter(range(0, size, extent))
    lock = threading.Lock()

    def copy():
        while True:
            with lock:
                start = next(offsets, None)
            if start is None:
                return
            with memoryview(memory)[start:start + extent] as view:
                if os.preadv(file, [view], start) != len(view):
                    raise OSError(f"short read at {start}")

    threads = [threading.Thread(target=copy) for _ in range(os.cpu_count())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return memory


def by_fio(path):
    """Returns the number of seconds that fio takes. It should be close to that of `limit`."""
    job = ["fio", "--name=limit", f"--filename={path}", "--rw=read", "--direct=1", "--ioengine=io_uring", "--fixedbufs=1"]
    job += ["--bs=4M", "--iodepth=16", "--mem=mmaphuge" if huge_pages() else "--mem=mmap", "--output-format=json", "--readonly"]
    run = subprocess.run(job, capture_output=True, check=True, text=True)
    read = json.loads(run.stdout[run.stdout.index("{"):])["jobs"][0]["read"]
    return read["io_bytes"] / read["bw_bytes"]


def huge_pages():
    """Returns whether the system reserves enough 2 MiB pages for fio's 16 buffers of 4 MiB."""
    with open("/proc/sys/vm/nr_hugepages", encoding="ascii") as file:
        return int(file.read()) >= 32


WAYS = {
    "wheel": by_wheel,
    "safetensors": by_safetensors,
    "safetensors-clone": by_safetensors_clone,
    "fastsafetensors": by_fastsafetensors,
    "runai": by_runai,
    "fio": by_fio,
    "copies": by_copies,
}


def answer(**values):
    print(json.dumps(values), flush=True)


def receive(word):
    return sys.stdin.readline().strip() == word


name, path = sys.argv[1:]
if not receive("prepare"):
    sys.exit()
if name == "wheel":
    import dmaload

    # A service creates its loader only once, so this is not measured: a small first load creates
    # the loader in advance.
    with tempfile.NamedTemporaryFile() as first:
        first.write(bytes(1 << 20))
        first.flush()
        dmaload.load(first.name, format="raw")
elif name not in ("fio", "copies"):
    import torch

    torch.empty(1 << 20, dtype=torch.uint8).clone()
if name.startswith("safetensors"):
    from safetensors import safe_open
elif name == "fastsafetensors":
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
elif name == "runai":
    from runai_model_streamer import SafetensorsStreamer
answer(ready=True)
if receive("go"):
    start, cpu = time.perf_counter(), time.process_time()
    loaded = WAYS[name](path)
    seconds = loaded if name == "fio" else time.perf_counter() - start
    answer(seconds=seconds, cpu_seconds=time.process_time() - cpu, page_bytes=page_bytes(path))
