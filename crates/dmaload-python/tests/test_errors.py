"""Tests that each error raises the right exception, with the message that the command prints."""

import asyncio
import errno
import inspect
import os
import random
import re
import subprocess
import sys
import tempfile

import pytest

import dmaload
from conftest import REPOSITORY
from files import Expected, header, large, sharded, tensor, write


def every_exception():
    """Returns the package's exceptions."""
    everything = vars(dmaload).values()
    return {
        each for each in everything if inspect.isclass(each) and issubclass(each, dmaload.Error)
    }


def check(error):
    """Checks the properties that each of the package's exceptions must have."""
    assert isinstance(error, dmaload.Error), repr(error)
    assert type(error) in every_exception(), "programs must be able to catch it by name"
    assert isinstance(error, Exception), "it must not be pyo3's PanicException"
    assert error.errno is None or error.errno in errno.errorcode
    assert error.filename is None or isinstance(error.filename, str)
    assert error.hint is None or isinstance(error.hint, str)
    assert str(error) and not re.search(r"panic|unwrap|\.rs:", str(error))
    if error.errno is not None:
        assert errno.errorcode[error.errno] in str(error)


def raised(use):
    with pytest.raises(dmaload.Error) as caught:
        use()
    check(caught.value)
    return caught.value


def bad_files(folder):
    """Returns invalid files by name."""
    good = header({"w": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}})
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    return {
        "empty.safetensors": b"",
        "seven-bytes.safetensors": b"\x10\0\0\0\0\0\0",
        "lfs-pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\n"
        b"oid sha256:" + b"4d" * 32 + b"\nsize 12345678901\n",
        "html.safetensors": b"<!DOCTYPE html>\n<html><body>401</body></html>\n",
        "json.safetensors": b'{"error": "Repository not found"}\n',
        "zip.safetensors": b"PK\x03\x04" + bytes(500),
        "zeros.safetensors": bytes(5000),
        "cut-header.safetensors": good[:20],
        "cut-data.safetensors": good + bytes(10),
        "too-long.safetensors": good + bytes(100),
        "header-length-lies.safetensors": (1 << 60).to_bytes(8, "little") + good[8:],
        "big-endian.safetensors": good[:8][::-1] + good[8:] + bytes(64),
        "not-json.safetensors": b"\x08\0\0\0\0\0\0\0{broken}",
        "unknown-dtype.safetensors": header({"w": {**entry, "dtype": "F128"}}) + bytes(4),
        "shape-lies.safetensors": header({"w": {**entry, "shape": [5]}}) + bytes(4),
        "negative.safetensors": header({"w": {**entry, "shape": [-4]}}) + bytes(4),
        "overflow.safetensors": header({"w": {**entry, "shape": [1 << 62, 8]}}) + bytes(4),
        "hole.safetensors": header({"w": {**entry, "data_offsets": [4, 8]}}) + bytes(8),
        "name-escapes.safetensors": header({"\x1b[31m\n": {**entry, "shape": [5]}}) + bytes(4),
        "empty.gguf": b"",
        "gguf-v1.gguf": b"GGUF" + (1).to_bytes(4, "little") + bytes(64),
        "gguf-v9.gguf": b"GGUF" + (9).to_bytes(4, "little") + bytes(64),
        "gguf-cut.gguf": b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little"),
        "gguf-counts-lie.gguf": b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 15 + b"\0",
    }


BAD = sorted(bad_files(None))


@pytest.mark.parametrize("name", BAD)
def test_bad_files_raise_the_commands_error(tmp_path, command_error, name):
    path = tmp_path / name
    path.write_bytes(bad_files(tmp_path)[name])
    error = raised(lambda: dmaload.load(path))
    assert str(error) == command_error("load", path)
    assert error.filename == str(path)
    # The other functions raise the same error.
    assert str(raised(lambda: asyncio.run(dmaload.load_async(path)))) == str(error)
    assert str(raised(lambda: list(dmaload.stream(path)))) == str(error)
    assert str(raised(lambda: dmaload.safe_open(path, framework="numpy"))) == str(error)
    assert str(raised(lambda: dmaload.numpy.load_file(path))) == str(error)


@pytest.mark.parametrize("name", ["missing.safetensors", "m.safetensors/below"])
def test_file_that_vanished_raises_the_error_of_a_load(tmp_path, name):
    """safe_open opens a file again after it has read the header."""
    write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    path = str(tmp_path / name)
    expected = raised(lambda: dmaload.load(path))
    found = raised(lambda: dmaload._open._open(path))
    check(found)
    assert (type(found), found.errno, found.filename) == (
        type(expected),
        expected.errno,
        expected.filename,
    )
    assert (str(found), found.hint) == (str(expected), expected.hint)


def test_reads_of_small_tensors_raise_errors_of_the_library(tmp_path):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    described = ("w", "U8", [64], 8, 72)
    with path.open("rb") as file:
        file_number = file.fileno()
        cut = raised(
            lambda: dmaload._native.read_small(path, file_number, (*described[:3], 1000, 1064))
        )
    assert (type(cut), cut.filename) == (dmaload.ChangedError, str(path))
    assert "shrank" in str(cut)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        refused = raised(lambda: dmaload._native.read_small(path, folder, described))
    finally:
        os.close(folder)
    assert (refused.errno, refused.filename, refused.offset) == (errno.EISDIR, str(path), 8)
    for closed in (-1, folder):
        for read in (dmaload._native.read_small, dmaload._native.start_read):
            refused = raised(lambda read=read, closed=closed: read(path, closed, described))
            assert (refused.errno, refused.filename) == (errno.EBADF, str(path))


def test_corpus_inputs_load_or_fail_as_in_the_command(tmp_path, corpus, command):
    """The package and the command refuse the same inputs, with the same message."""
    refused = 0
    for kind, suffix in [("safetensors", "safetensors"), ("gguf", "gguf")]:
        for source in corpus[kind]:
            path = tmp_path / f"{source.name}.{suffix}"
            path.write_bytes(source.read_bytes())
            done = subprocess.run(
                [command, "load", path, "--json"], capture_output=True, check=False
            )
            try:
                dmaload.load(path)
            except dmaload.Error as error:
                check(error)
                assert f'"error": {json_text(str(error))}' in done.stdout.decode(), source
                refused += 1
            else:
                assert done.returncode == 0, source
    assert refused >= 10


def json_text(text):
    import json

    # Like the command's JSON, which does not escape letters outside ASCII.
    return json.dumps(text, ensure_ascii=False)


def test_bad_paths_raise_the_commands_error(tmp_path, command_error):
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    (tmp_path / "empty-folder").mkdir()
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    folder, _ = sharded(tmp_path / "incomplete")
    (folder / "model-00002-of-00003.safetensors").unlink()
    twice = tmp_path / "twice"
    for name in "ab":
        write(twice / f"{name}.safetensors", {"w": tensor("U8", (8,))})
    file = write(tmp_path / "file.safetensors", {"w": tensor("U8", (8,))})
    for path, number in {
        tmp_path / "missing.safetensors": errno.ENOENT,
        file / "below": errno.ENOTDIR,
        loop: errno.ELOOP,
        fifo: None,
        "/dev/null": None,
        tmp_path / "empty-folder": None,
        folder: None,
        twice: None,
    }.items():
        error = raised(lambda path=path: dmaload.load(path))
        assert str(error) == command_error("load", path)
        assert error.errno == number
        assert error.filename and str(path) in error.filename
    assert "model-00002-of-00003" in str(raised(lambda: dmaload.load(folder)))
    assert len(dmaload.load(folder, allow_missing=True)) == 6


def test_bad_options_raise_the_commands_error(tmp_path, command_error):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,)), "v": tensor("F4", (8,))})
    zeros = "sha256:" + "0" * 64
    for arguments, keywords in [
        (["--tensors", "no-such-*"], {"tensors": ["no-such-*"]}),
        (["--verify", zeros], {"verify": zeros}),
        (["--memory-limit", "1"], {"memory_limit": 1}),
        (["--rank", "4", "--world-size", "4"], {"shard": (4, 4)}),
        (["--heap", "udmabuf"], {"heap": "udmabuf"}),
        (["--heap", "dma-heap:no-such"], {"heap": "dma-heap:no-such"}),
        (["--format", "gguf"], {"format": "gguf"}),
    ]:
        if arguments == ["--heap", "udmabuf"] and os.path.exists("/dev/udmabuf"):
            continue
        error = raised(lambda keywords=keywords: dmaload.load(path, **keywords))
        said = command_error("load", path, *arguments)
        # If the error does not concern the file, the command still names the file.
        assert said in (str(error), f"{path}: {error}"), keywords


def test_each_kind_of_error_has_its_exception(tmp_path):
    tree = every_exception()
    assert 5 < len(tree) < 40
    assert all(each.__module__.split(".")[0] == "dmaload" for each in tree)
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,)), "v": tensor("U8", (4,))})
    two = [write(tmp_path / f"{n}.safetensors", {"same": tensor("U8", (8,))}) for n in "ab"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    kinds = {
        "not found": lambda: dmaload.load(tmp_path / "missing"),
        "invalid model": lambda: dmaload.load(cut),
        "invalid input": lambda: dmaload.load(path, tensors=["no-such"]),
        "corrupt": lambda: dmaload.load(path, verify="sha256:" + "0" * 64),
        "over limit": lambda: dmaload.load(path, memory_limit=4096),
        "ambiguous": lambda: dmaload.load(two)["same"],
        "not loaded": lambda: dmaload.load(path, tensors=["v"])["w"],
        "share": lambda: dmaload.share.attach(tmp_path / "no-socket"),
    }
    found = {kind: type(raised(use)) for kind, use in kinds.items()}
    assert len(set(found.values())) == len(kinds), found


def test_every_kind_of_the_library_has_a_class():
    """A kind without a class would be raised as the base class, which says nothing."""
    kinds = (REPOSITORY / "crates/dmaload/src/error/kind.rs").read_text()
    body = re.search(r"pub enum ErrorKind \{(.*?)\n\}", kinds, re.DOTALL)[1]
    names = re.findall(r"^    (\w+),$", body, re.MULTILINE)
    assert len(names) > 15
    converted = (REPOSITORY / "crates/dmaload-python/src/errors.rs").read_text()
    for name in names:
        assert f'ErrorKind::{name} => "{name}Error"' in converted, name
        assert issubclass(getattr(dmaload, f"{name}Error"), dmaload.Error)
    # Every class that the native module names exists.
    sources = (REPOSITORY / "crates/dmaload-python/src").glob("*.rs")
    named = {
        name for source in sources for name in re.findall(r'"(\w+Error)"', source.read_text())
    }
    assert named <= {each.__name__ for each in every_exception()}


def test_panic_becomes_an_exception():
    with pytest.raises(dmaload.PanickedError) as caught:
        dmaload._native._panic_on_purpose("the reason")
    assert str(caught.value) == "dmaload panicked: the reason"
    assert isinstance(caught.value, RuntimeError)


def test_programs_for_safetensors_catch_the_error(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"no model")
    with pytest.raises(dmaload.SafetensorError):
        dmaload.safe_open(path, framework="numpy")


def test_too_little_address_space_is_a_memory_error(tmp_path, programs):
    path = tmp_path / "m.raw"
    path.touch()
    os.truncate(path, 1 << 30)
    out = programs.succeed(
        """
    import re, resource, sys
    import dmaload
    dmaload.load(sys.argv[2])
    with open("/proc/self/status") as file:
        used = int(re.search(r"VmSize:\\s+(\\d+)", file.read())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
    try:
        dmaload.load(sys.argv[1], format="raw")
    except MemoryError as error:
        print(type(error).__name__, "ENOMEM" in str(error), "ulimit -v" in error.hint)
    """,
        path,
        write(tmp_path / "small.safetensors", {"w": tensor("U8", (64,))}),
    )
    assert out == "OutOfMemoryError True True\n"


def test_file_of_too_many_pieces_is_too_large():
    # Disk file systems refuse files of this length.
    with tempfile.NamedTemporaryFile(dir="/dev/shm", suffix=".raw") as file:
        os.truncate(file.name, 1 << 46)
        error = raised(lambda: next(dmaload.stream(file.name, format="raw")))
    assert type(error) is dmaload.TooLargeError
    assert error.hint


def test_file_that_a_manifest_lacks(tmp_path, command):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    other = write(tmp_path / "other.safetensors", {"w": tensor("U8", (64,))})
    manifest = tmp_path / "manifest.json"
    second = write(tmp_path / "second.safetensors", {"w": tensor("U8", (64,))})
    manifest.write_bytes(subprocess.check_output([command, "manifest", path, second]))
    dmaload.load(path, verify=manifest)
    error = raised(lambda: dmaload.load(other, verify=manifest))
    assert type(error) is dmaload.NotInManifestError
    assert error.filename == str(other)
    with pytest.raises(LookupError):
        dmaload.load(other, verify=manifest)


def test_memory_without_a_dma_buf_is_refused(tmp_path):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    error = raised(lambda: dmaload.dma_buf(dmaload.load(path)["w"]))
    assert type(error) is dmaload.UnsupportedError
    assert "anon" in str(error)
    whole = raised(lambda: dmaload.dma_buf(dmaload.load(path).file()))
    assert type(whole) is dmaload.UnsupportedError


def test_missing_tensor_is_a_key_error(tmp_path):
    image = dmaload.load(write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))}))
    with pytest.raises(KeyError) as caught:
        image["no-such"]
    check(caught.value)
    assert "no-such" in str(caught.value)
    assert image.get("no-such") is None
    assert "no-such" not in image


def test_file_that_grows_fails_its_load(disk):
    path, _ = large(disk / "model.safetensors", 64)
    stream = dmaload.stream(path, memory_limit=16 << 20)
    next(stream)
    with path.open("ab") as file:
        file.write(b"more")

    def rest():
        # Keeping a tensor would leave less memory for later ones.
        for _ in stream:
            pass

    error = raised(rest)
    assert error.filename == str(path)
    assert "during the load" in str(error)


def test_unreadable_file_is_a_permission_error(tmp_path, programs):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    path.chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(folder.stat().st_mode | 0o011)
    out = programs.succeed(
        """
    import os, sys
    import dmaload
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    try:
        dmaload.load(sys.argv[1])
    except dmaload.Error as error:
        print(error.errno, error.filename == sys.argv[1], "EACCES" in str(error))
    """,
        path,
    )
    assert out == f"{errno.EACCES} True True\n"


@pytest.mark.parametrize(
    "use",
    [
        lambda path: dmaload.load(),
        lambda path: dmaload.load(5),
        lambda path: dmaload.load(None),
        lambda path: dmaload.load(path, tensors=5),
        lambda path: dmaload.load(path, tensors=[5]),
        lambda path: dmaload.load(path, shard=5),
        lambda path: dmaload.load(path, memory_limit="much"),
        lambda path: dmaload.load(path, progress=5),
        lambda path: dmaload.load(path, heap=5),
        lambda path: dmaload.load(path, no_such_option=True),
        lambda path: dmaload.safe_open(path),
        lambda path: dmaload.load(path)[5],
    ],
)
def test_arguments_of_a_wrong_type_are_refused(tmp_path, use):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    with pytest.raises((TypeError, KeyError)):
        use(path)


@pytest.mark.parametrize(
    "keywords",
    [
        {"memory_limit": -1},
        {"memory_limit": 1 << 70},
        {"shard": (-1, 4)},
        {"shard": (0, 0)},
        {"shard": (0, 1, 2, 3)},
        {"shard": ("a", "b")},
        {"heap": "no-such-heap"},
        {"route": "no-such-route"},
        {"cache": "no-such-cache"},
        {"format": "no-such-format"},
        {"verify": "no-such-checksum"},
    ],
    ids=str,
)
def test_invalid_values_are_refused(tmp_path, keywords):
    path = write(tmp_path / "m.safetensors", {"w": tensor("U8", (64,))})
    with pytest.raises((dmaload.Error, ValueError, OverflowError)) as caught:
        dmaload.load(path, **keywords)
    if isinstance(caught.value, dmaload.Error):
        check(caught.value)


def test_damage_is_detected_or_harmless(tmp_path):
    """A file with a damaged header raises one of the package's exceptions, or still loads."""
    good = write(
        tmp_path / "good.safetensors",
        {"w": tensor("F32", (4, 4)), "v": Expected("U8", (16,), bytes(16))},
        {"format": "pt"},
    ).read_bytes()
    path, refused = tmp_path / "m.safetensors", 0
    for seed in range(400):
        source = random.Random(seed)
        data = bytearray(good)
        for _ in range(source.randrange(1, 4)):
            at = source.randrange(len(data) - 80)
            act = source.randrange(3)
            if act == 0:
                data[at] = source.randrange(256)
            elif act == 1:
                data[at : at + 1] = source.choice([b"9", b"-", b'"', b"{", b"[1e999]", b"null"])
            else:
                del data[at : at + source.randrange(1, 9)]
        path.write_bytes(data)
        for use in (dmaload.load, lambda path: dmaload.safe_open(path, framework="numpy")):
            try:
                use(path)
            except dmaload.Error as error:
                check(error)
                refused += 1
    assert refused > 100


def test_errors_survive_pickling_and_copying(tmp_path):
    import copy
    import pickle

    error = raised(lambda: dmaload.load(tmp_path / "missing.safetensors"))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), again.errno, again.filename, again.hint) == (
            str(error),
            error.errno,
            error.filename,
            error.hint,
        )


def test_error_in_a_worker_reaches_its_parent(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(dmaload.load, str(tmp_path / "missing.safetensors"))
        error = raised(future.result)
    assert error.errno == errno.ENOENT
    assert sys.exc_info() == (None, None, None)
