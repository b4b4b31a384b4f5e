"""Tests for the rest of the wheel: the command, the types and the metadata."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import dmaload
from files import tensor, write


def run(*arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "dmaload", *arguments], capture_output=True, check=False, **keywords
    )


def test_module_runs_the_command(tmp_path, command):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (64, 64))})
    own = run("cat", path)
    assert (own.returncode, own.stdout, own.stderr) == (0, path.read_bytes(), b"")
    for arguments in (["inspect", path, "--json"], ["load", path, "--quiet"], ["--version"]):
        own = run(*arguments)
        other = subprocess.run([command, *arguments], capture_output=True, check=False)
        assert (own.returncode, own.stdout) == (other.returncode, other.stdout), arguments
    for arguments, status in [
        (["load", tmp_path / "missing"], 1),
        (["load"], 2),
        (["no-such-verb"], 2),
    ]:
        own = run(*arguments)
        other = subprocess.run([command, *arguments], capture_output=True, check=False)
        assert own.returncode == other.returncode == status
        assert own.stderr == other.stderr


def test_ctrl_c_ends_the_command(tmp_path, slow_file):
    import signal

    path = write(tmp_path / "model.safetensors", {"w": tensor("U8", (1 << 20,))})
    slow = slow_file(path, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "dmaload", "load", slow.path], stderr=subprocess.PIPE
    )
    slow.wait_until_held()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130), process.returncode


def test_wheel_is_typed_and_has_the_crates_version():
    folder = Path(dmaload.__file__).parent
    assert (folder / "py.typed").exists()
    assert list(folder.glob("**/*.pyi"))
    assert dmaload.__version__ == importlib.metadata.version("dmaload")


def test_importing_needs_neither_numpy_nor_torch():
    text = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "torch", "ml_dtypes", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import dmaload
image = dmaload.load(sys.argv[1])
assert bytes(memoryview(image["w"]))
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.safetensors", {"w": tensor("U8", (10,))})
        done = subprocess.run([sys.executable, "-c", text, path], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def parameters(function):
    """Returns the names of a stub's parameters, without `self`."""
    arguments = function.args
    names = [each.arg for each in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    return [name for name in names if name != "self"]


def test_stubs_match_the_native_module():
    """Compares all classes, methods, functions and parameters, in both directions."""
    from dmaload import _native

    stubs = ast.parse((Path(dmaload.__file__).parent / "_native.pyi").read_text()).body
    # The native class may lack these methods, or have them under other names than the stub.
    hidden = {"__buffer__", "__enter__", "__exit__", "__init__"}

    def check(thing, stub):
        given = [name for name in inspect.signature(thing).parameters if name != "self"]
        assert given == parameters(stub), stub.name

    functions = {each.name: each for each in stubs if isinstance(each, ast.FunctionDef)}
    classes = {each.name: each for each in stubs if isinstance(each, ast.ClassDef)}
    public = {name for name in vars(_native) if not name.startswith("_")}
    assert public == {*functions, *classes, "VERSION"}
    for name, stub in functions.items():
        check(getattr(_native, name), stub)
    for name, stub in classes.items():
        kind = getattr(_native, name)
        methods = {each.name: each for each in stub.body if isinstance(each, ast.FunctionDef)}
        public = {each for each in vars(kind) if not each.startswith("_")}
        assert public == {each for each in methods if not each.startswith("_")}, name
        for method, definition in methods.items():
            assert hasattr(kind, method) or method in hidden, (name, method)
            if method in public and callable(getattr(kind, method)):
                check(getattr(kind, method), definition)


def test_every_public_name_is_documented():
    missing = []
    for name in dmaload.__all__:
        thing = getattr(dmaload, name)
        if callable(thing) and not (thing.__doc__ or "").strip():
            missing.append(name)
    assert dmaload.__all__ and not missing
