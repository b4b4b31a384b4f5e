"""Fixtures that several test files share."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
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
    """Runs Python programs in separate processes, so tests notice crashes and warnings."""

    def __init__(self, folder):
        self.folder = folder

    def command(self, text, *arguments):
        preamble = f"import sys, logging; sys.path.insert(0, {str(HERE)!r})\n"
        # asyncio warns about slow callbacks, which are normal on a busy machine.
        preamble += "logging.getLogger('asyncio').setLevel('ERROR')\n"
        path = self.folder / "program.py"
        path.write_text(preamble + textwrap.dedent(text))
        # Development mode warns about leaked resources and checks memory allocators.
        return [sys.executable, "-X", "dev", "-W", "error", path, *map(str, arguments)]

    def run(self, text, *arguments, timeout=60, **keywords):
        """Runs a program to completion. Fails if it takes longer than the timeout."""
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
        """Runs a program that must succeed and print no errors or warnings. Returns its output."""
        done = self.run(text, *arguments, timeout=timeout, **keywords)
        assert (done.status, done.err) == (0, ""), done.out + done.err
        return done.out

    @contextmanager
    def start(self, text, *arguments, **keywords):
        """Starts a program. If it is still running at the end, kills it and its children."""
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
            # Hanging children would keep the pipes open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def programs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


class SlowFile:
    """A file on its own file system, which holds back some of the file's bytes."""

    def __init__(self, server, path):
        self.server, self.path = server, path

    def wait_until_held(self):
        assert self.server.stdout.readline() == "held\n"

    def release(self):
        self.server.stdin.write("go\n")
        self.server.stdin.flush()

    def bytes_requested_since_release(self):
        self.server.stdin.write("late\n")
        self.server.stdin.flush()
        while (line := self.server.stdout.readline()) == "held\n":
            pass
        return int(line)

    def wait_until_idle(self):
        """Waits until nothing is requested for a second, and returns how much was requested."""
        requested = -1
        while (now := self.bytes_requested_since_release()) != requested:
            requested = now
            time.sleep(1)
        return requested


@pytest.fixture
def slow_file(tmp_path):
    """Returns a function that creates a file whose bytes are held back from a given offset on."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("mounting a file system needs root and /dev/fuse")
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
    """The path of the command that the package is compared with."""
    path = os.environ.get("DMALOAD_COMMAND")
    assert path, "DMALOAD_COMMAND must name the command to compare with; .ci/python sets it"
    return path


@pytest.fixture(scope="session")
def command_error(command):
    """Returns a function that runs the command, which must fail, and returns its error text."""

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
    """The small real model that .ci/real-model.sh downloads."""
    path = os.environ.get("DMALOAD_REAL_MODEL")
    assert path, "DMALOAD_REAL_MODEL must name a model; .ci/python sets it"
    return Path(path)


@pytest.fixture
def disk(request, tmp_path):
    """A folder on a disk with a page cache. A temporary folder may be on tmpfs."""
    base = Path(os.environ.get("DMALOAD_DISK", REPOSITORY / "target")) / "python-files"
    folder = base / f"{os.getpid()}-{request.node.name[:60].replace('/', '_')}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def corpus():
    """The files of the Rust tests' corpus, by format."""
    folder = REPOSITORY / "crates/dmaload/tests/corpus"
    return {each.name: sorted(each.iterdir()) for each in folder.iterdir()}


@pytest.fixture(autouse=True)
def no_test_hangs():
    """Fails a test after 120 s, so the other tests still run."""

    def stop(_signal, _frame):
        raise TimeoutError("the test took longer than 120 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
