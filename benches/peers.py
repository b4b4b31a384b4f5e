"""Loads a safetensors file into CPU memory by another loader, as `dmaload bench --peer` asks.

    peers.py NAME PATH    NAME: safetensors, safetensors-clone, fastsafetensors, runai, fio

Standard input says `prepare`, then `go`; each is answered by a line of JSON. The measurement
begins just before the file is opened and ends when every byte is in the caller's memory: a
mapping is touched page by page.
"""

import json
import os
import subprocess
import sys
import time


def touch(tensor):
    """Reads a byte of each page."""
    array = tensor.view(-1).view(torch.uint8)
    return int(array[::4096].sum()) if array.numel() else 0


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


def by_fio(path):
    """Measures the device's limit by fio's own clock, as a check of the mode `limit`."""
    job = ["fio", "--name=limit", f"--filename={path}", "--rw=read", "--direct=1", "--ioengine=io_uring", "--fixedbufs=1"]
    job += ["--bs=4M", "--iodepth=16", "--mem=mmaphuge" if huge_pages() else "--mem=mmap", "--output-format=json", "--readonly"]
    run = subprocess.run(job, capture_output=True, check=True, text=True)
    read = json.loads(run.stdout[run.stdout.index("{"):])["jobs"][0]["read"]
    return read["io_bytes"] / read["bw_bytes"]


def huge_pages():
    with open("/proc/sys/vm/nr_hugepages", encoding="ascii") as file:
        return int(file.read()) >= 32


WAYS = {
    "safetensors": by_safetensors,
    "safetensors-clone": by_safetensors_clone,
    "fastsafetensors": by_fastsafetensors,
    "runai": by_runai,
    "fio": by_fio,
}


def tell(**values):
    print(json.dumps(values), flush=True)


def heard(word):
    return sys.stdin.readline().strip() == word


name, path = sys.argv[1:]
if not heard("prepare"):
    sys.exit()
if name != "fio":
    import torch

    torch.empty(1 << 20, dtype=torch.uint8).clone()
if name.startswith("safetensors"):
    from safetensors import safe_open
elif name == "fastsafetensors":
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
elif name == "runai":
    from runai_model_streamer import SafetensorsStreamer
tell(ready=True)
if heard("go"):
    start, cpu = time.perf_counter(), time.process_time()
    loaded = WAYS[name](path)
    seconds = loaded if name == "fio" else time.perf_counter() - start
    tell(seconds=seconds, cpu_seconds=time.process_time() - cpu, page_bytes=os.sysconf("SC_PAGE_SIZE"))
