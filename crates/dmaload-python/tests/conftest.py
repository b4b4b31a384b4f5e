"""What the tests share: the command to compare with, separate processes, slow files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]


@dataclass
class Finished:
    """How a program ended."""

    status: int
    out: str
    err: str


class Programs:
    """Runs Python programs in separate processes, where what they do to themselves shows."""

    def __init__(self, folder):
        self.folder = folder

    def command(self, text, *arguments):
        # Development mode warns of leaked resources and checks the allocator.
        preamble = f"import sys, logging; sys.path.insert(0, {str(HERE)!r})\n"
        # asyncio warns of callbacks that take long, as all do on a busy machine.
        preamble += "logging.getLogger('asyncio').setLevel('ERROR')\n"
        path = self.folder / "program.py"
        path.write_text(preamble + textwrap.dedent(text))
        return [sys.executable, "-X", "dev", "-W", "error", path, *map(str, arguments)]

    def run(self, text, *arguments, timeout=60, **keywords):
        """Runs a program to its end. One that needs longer has failed."""
        done = subprocess.run(
            self.command(text, *arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **keywords,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def succeed(self, text, *arguments, timeout=60, **keywords):
        """Runs a program that ends well and has nothing to complain of; gives what it prints."""
        done = self.run(text, *arguments, timeout=timeout, **keywords)
        assert (done.status, done.err) == (0, ""), done.out + done.err
        return done.out

    @contextmanager
    def start(self, text, *arguments, **keywords):
        """Starts a program, and kills it with its children if it is still there in the end."""
        process = subprocess.Popen(
            self.command(text, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **keywords,
        )
        try:
            yield process
        finally:
            # Children that hang would hold the pipes open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def programs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


class SlowFile:
    """A file whose bytes are held back, on a file system of its own."""

    def __init__(self, server, path):
        self.server, self.path = server, path

    def wait_until_held(self):
        assert self.server.stdout.readline() == "held\n"

    def release(self):
        self.server.stdin.write("go\n")
        self.server.stdin.flush()


@pytest.fixture
def slow_file(tmp_path):
    """Makes files that are held back from an offset on."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting a file system takes root and /dev/fuse")
    servers = []

    def make(source, held_from):
        folder = tmp_path / f"slow{len(servers)}"
        folder.mkdir()
        server = subprocess.Popen(
            [sys.executable, HERE / "slow_files.py", folder, source, str(held_from)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        servers.append((server, folder))
        assert server.stdout.readline() == "mounted\n"
        return SlowFile(server, folder / "model.safetensors")

    yield make
    for server, folder in servers:
        server.kill()
        server.communicate()
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def command():
    """The command, which the extension is compared with."""
    path = os.environ.get("DMALOAD_COMMAND")
    assert path, "DMALOAD_COMMAND names no command to compare with; .ci/python sets it"
    return path


@pytest.fixture(scope="session")
def command_error(command):
    """The error with which the command fails: its text and its hint."""

    def error(*arguments):
        done = subprocess.run(
            [command, *map(str, arguments), "--json"],
            capture_output=True,
            timeout=60,
            check=False,
        )
        said = json.loads(done.stdout)
        assert done.returncode in (1, 2), said
        return said["error"]

    return error


@pytest.fixture(scope="session")
def real_model():
    """The small real model of .ci/real-model.sh."""
    path = os.environ.get("DMALOAD_REAL_MODEL")
    assert path, "DMALOAD_REAL_MODEL names no model; .ci/python sets it"
    return Path(path)


@pytest.fixture
def disk(request, tmp_path):
    """A folder on a disk, where a page cache is above a device, as a temporary one may not be."""
    base = Path(os.environ.get("DMALOAD_DISK", REPOSITORY / "target")) / "python-files"
    folder = base / f"{os.getpid()}-{request.node.name[:60].replace('/', '_')}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def corpus():
    """The kept inputs of the Rust tests, by format."""
    folder = REPOSITORY / "crates/dmaload/tests/corpus"
    return {each.name: sorted(each.iterdir()) for each in folder.iterdir()}


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A test that takes minutes has failed; the others still run."""

    def stop(_signal, _frame):
        raise TimeoutError("the test took longer than 120 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
