"""Serves a FUSE file system with one file, `model.safetensors`, whose bytes are held back from a
given offset on: `slow_files.py MOUNT_POINT SOURCE HELD_FROM`. Requires root.

The program prints `mounted` when the file system is mounted, and `held` when it first holds back a
read. After the line `go` on standard input, it answers all held reads and all later ones. After
the line `late`, it prints how many bytes were requested since `go`. When standard input ends, it
exits, and later requests fail. The caller has to unmount the file system. The protocol is defined
in include/uapi/linux/fuse.h.
"""

import ctypes
import errno
import os
import select
import stat
import struct
import sys

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, INTERRUPT, BATCH_FORGET = 25, 26, 36, 42
ROOT, FILE = 1, 2
MOST = 1 << 17
# Attributes expire immediately, so the kernel requests them each time.
VALID = struct.pack("<QQII", 0, 0, 0, 0)


def attributes(node, size):
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o644
    times = (1, 1, 1, 0, 0, 0)
    return struct.pack(
        "<QQQQQQIIIIIIIIII",
        node,
        size,
        (size + 511) // 512,
        *times[:3],
        *times[3:],
        mode,
        1,
        0,
        0,
        0,
        4096,
        0,
    )


class Server:
    def __init__(self, mount_point, source, held_from):
        self.source = os.open(source, os.O_RDONLY)
        self.size = os.fstat(self.source).st_size
        self.held_from, self.held, self.released, self.late = held_from, [], False, 0
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"slow", mount_point.encode(), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    def answer(self, unique, data=b"", error=0):
        reply = struct.pack("<IiQ", 16 + len(data), -error, unique) + data
        try:
            os.write(self.device, reply)
        except OSError as refused:
            # ENOENT: the request was interrupted in the meantime.
            if refused.errno != errno.ENOENT:
                raise

    def read(self, unique, offset, size):
        self.answer(unique, os.pread(self.source, size, offset))

    def handle(self, request):
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        body = request[40:]
        if opcode == INIT:
            major, minor, readahead = struct.unpack_from("<III", body)
            reply = struct.pack(
                "<IIIIHHIIHH",
                major,
                min(minor, 31),
                readahead,
                0,
                16,
                12,
                MOST,
                1,
                MOST // 4096,
                0,
            )
            self.answer(unique, reply + bytes(32))
        elif opcode == LOOKUP:
            if node == ROOT and body == b"model.safetensors\0":
                entry = struct.pack("<QQ", FILE, 0) + VALID + attributes(FILE, self.size)
                self.answer(unique, entry)
            else:
                self.answer(unique, error=errno.ENOENT)
        elif opcode == GETATTR:
            reply = struct.pack("<QII", 0, 0, 0) + attributes(node, self.size)
            self.answer(unique, reply)
        elif opcode == OPEN:
            self.answer(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.late += size if self.released else 0
            if self.released or offset + size <= self.held_from:
                self.read(unique, offset, size)
            else:
                if not self.held:
                    print("held", flush=True)
                self.held.append((unique, offset, size))
        elif opcode == STATFS:
            self.answer(
                unique, struct.pack("<QQQQQIIII", 0, 0, 0, 0, 0, 4096, 255, 4096, 0) + bytes(24)
            )
        elif opcode == INTERRUPT:
            (interrupted,) = struct.unpack_from("<Q", body)
            if interrupted in [each[0] for each in self.held]:
                self.held = [each for each in self.held if each[0] != interrupted]
                self.answer(interrupted, error=errno.EINTR)
        elif opcode in (RELEASE, FLUSH):
            self.answer(unique)
        elif opcode not in (FORGET, BATCH_FORGET):
            self.answer(unique, error=errno.ENOSYS)

    def run(self):
        print("mounted", flush=True)
        while True:
            ready, _, _ = select.select([self.device, 0], [], [])
            if 0 in ready:
                lines = os.read(0, 100)
                if not lines:
                    return
                if b"go\n" in lines:
                    self.released = True
                    for each in self.held:
                        self.read(*each)
                    self.held = []
                if b"late\n" in lines:
                    print(self.late, flush=True)
            if self.device in ready:
                try:
                    self.handle(os.read(self.device, MOST + 65536))
                except OSError as gone:
                    if gone.errno == errno.ENODEV:
                        return
                    if gone.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        raise


if __name__ == "__main__":
    Server(sys.argv[1], sys.argv[2], int(sys.argv[3])).run()
