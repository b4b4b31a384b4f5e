"""Loads a model into dma-bufs, and checks what importers get and what arrays refuse.

`tests/python.rs` runs this with the name of a heap. The interpreter has no other packages.
"""

import fcntl
import gc
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import time

import dmaload

HEAP = sys.argv[1]
PATH = "/disk/model.safetensors"
# _IOW('b', 0, struct dma_buf_sync) from linux/dma-buf.h, and the flags of its field.
SYNC, SYNC_READ, SYNC_END = 0x40086200, 1, 1 << 2


def write_model():
    """Writes a model whose second tensor spans several segments. Returns the tensors' bytes."""
    shapes = {"small": (3, 5), "large": (72, 1 << 20), "rows": (64, 1024), "last": (777,)}
    entries, data = {}, {}
    at = 0
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        # Generating random bytes is slow in emulation, so each mebibyte of a tensor differs from
        # the others only in its first bytes.
        block = random.Random(name).randbytes(min(size, 1 << 20))
        numbers = range(size // len(block))
        data[name] = b"".join(struct.pack("<I", number) + block[4:] for number in numbers)
        entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with open(PATH, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + b"".join(data.values()))
    return data


def imported(part):
    """Maps a dma-buf like an importer, and returns the tensor's bytes in it."""
    fd = part.fileno()
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/dmabuf:")
    fcntl.ioctl(fd, SYNC, struct.pack("Q", SYNC_READ))
    end = part.offset + part.length
    with mmap.mmap(fd, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE, prot=mmap.PROT_READ) as mapped:
        found = mapped[part.offset : end]
    fcntl.ioctl(fd, SYNC, struct.pack("Q", SYNC_READ | SYNC_END))
    return found


def refused(use, kind):
    try:
        use()
    except kind as error:
        assert isinstance(error, dmaload.Error) and str(error), repr(error)
        return error
    raise AssertionError(f"{use} should have raised {kind}")


def check_image(image, data):
    for name, expected in data.items():
        tensor = image[name]
        # Other holders of the descriptor could write to the memory, so arrays never share it.
        for export in (memoryview, lambda tensor: tensor.__dlpack__(max_version=(1, 1))):
            error = refused(lambda export=export, tensor=tensor: export(tensor), dmaload.ExportError)
            assert isinstance(error, BufferError)
        parts = dmaload.dma_buf(tensor)
        assert b"".join(imported(part) for part in parts) == expected, name
        assert sum(part.length for part in parts) == tensor.nbytes
        for part in parts:
            part.close()
            refused(part.fileno, dmaload.ClosedError)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def main():
    data = write_model()
    image = dmaload.load(PATH, heap=HEAP)
    assert image.report()["heap"] in ("udmabuf", "dma-heap:system"), image.report()["heap"]
    assert len(dmaload.dma_buf(image["large"])) > 1, "the tensor should span several segments"
    check_image(image, data)
    before = descriptors()
    check_image(image, data)
    assert descriptors() == before, "closed parts should close their descriptors"

    # A descriptor outlives the image, and detached ones belong to the caller.
    kept = dmaload.dma_buf(image["last"])
    (lent,) = dmaload.dma_buf(image["small"])
    fd = lent.detach()
    refused(lent.fileno, dmaload.ClosedError)
    os.close(fd)
    del image
    gc.collect()
    assert b"".join(imported(part) for part in kept) == data["last"]
    with kept[0] as part:
        assert part.fileno() >= 0
    refused(part.fileno, dmaload.ClosedError)
    for part in kept:
        part.close()

    # The rows of a share along dimension 1 are not contiguous.
    share = dmaload.load(PATH, heap=HEAP, tensors=["rows"], shard=(1, 2, 1))["rows"]
    rows = [data["rows"][1024 * row + 512 : 1024 * (row + 1)] for row in range(64)]
    found = dmaload.dma_buf(share)
    assert b"".join(imported(part) for part in found) == b"".join(rows)
    for part in found:
        part.close()
    refused(lambda: memoryview(share), dmaload.ExportError)

    # A server can share dma-bufs. The client gets descriptors, but no arrays.
    socket = "/tmp/model.sock"
    serve = [sys.executable, "-m", "dmaload", "serve", socket, PATH, "--dma-buf", "--share-dma-bufs"]
    with subprocess.Popen(serve, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while not os.path.exists(socket):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            attached = dmaload.share.attach(socket)
        finally:
            server.terminate()
        assert server.wait(60) == 0
    check_image(attached, data)

    error = refused(lambda: dmaload.load(PATH, heap="dma-heap:no-such"), dmaload.DeviceError)
    assert isinstance(error, OSError) and "system" in str(error), "it should list the heaps"
    error = refused(lambda: dmaload.dma_buf(dmaload.load(PATH)["small"]), dmaload.UnsupportedError)
    assert "anon" in str(error)
    os.unlink(PATH)
    print(f"{HEAP}: all checks passed")


if __name__ == "__main__":
    main()
