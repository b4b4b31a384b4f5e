"""Runs the Python snippets in the documentation, and compares their output with their comments."""

import re
import subprocess
import time

import pytest

from conftest import REPOSITORY
from files import Expected, large, sharded, tensor, write
from test_models import write_gguf

PAGE = REPOSITORY / "docs/python.md"
PAGES = [PAGE, REPOSITORY / "docs/adopt.md"]
FENCE = re.compile(r"^```(\w[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(kind):
    """Returns the snippets of this kind, identified by their pages and line numbers."""
    return [
        pytest.param(found.group(2), id=f"{page.name}:{text[: found.start()].count(chr(10)) + 1}")
        for page in PAGES
        for text in [page.read_text()]
        for found in FENCE.finditer(text)
        if found.group(1) == kind
    ]


# `just python-torch` runs the snippets that need torch.
PYTHON, TORCH = snippets("python"), snippets("python torch")


def prints(text):
    """Returns the expected output, which the page shows in comments after calls to `print`."""
    return re.findall(r"print\(.*\)  # (.*)$", text, re.MULTILINE)


@pytest.fixture
def place(tmp_path, command, monkeypatch):
    """A folder with the files that the page uses."""
    tensors = {
        "model.embed_tokens.weight": tensor("BF16", (64, 32)),
        "model.norm.weight": Expected(
            "F32", (4,), bytes.fromhex("0000803f0000004000004040") * 1 + bytes.fromhex("00008040")
        ),
        "lm_head.weight": tensor("F16", (64, 32)),
    }
    path = write(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    sharded(tmp_path / "model-folder")
    write_gguf(tmp_path / "model.gguf")
    large(tmp_path / "large.safetensors", 64)
    manifest = subprocess.check_output([command, "manifest", path])
    (tmp_path / "model.manifest.json").write_bytes(manifest)
    monkeypatch.chdir(tmp_path)
    server = subprocess.Popen([command, "serve", "m.sock", path], stdout=subprocess.DEVNULL)
    while not (tmp_path / "m.sock").exists():
        assert server.poll() is None
        time.sleep(0.01)
    yield tmp_path
    server.terminate()
    server.wait(10)


def run(text, place, programs):
    # `programs` runs the text from a file, which child processes can import.
    found = programs.succeed(text, cwd=place).splitlines()
    lines = iter(found)
    for expected in prints(text):
        assert expected in lines, f"{expected!r} is not printed, or not in order: {found}"


@pytest.mark.parametrize("text", PYTHON)
def test_snippets_print_their_comments(text, place, programs):
    run(text, place, programs)


def test_page_has_snippets_with_expected_output():
    assert len(PYTHON) >= 10
    assert len(TORCH) >= 2
    assert sum(len(prints(each.values[0])) for each in PYTHON) >= 10


def test_page_mentions_every_public_name():
    import dmaload

    text = PAGE.read_text()
    missing = [name for name in dmaload.__all__ if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing
    for method in ("keys", "offset_keys", "get_tensor", "get_tensors", "get_slice", "metadata"):
        assert method in text


def test_page_lists_the_packages_exceptions():
    import builtins

    import dmaload

    rows = re.findall(r"^\| `(\w+Error)` \| (?:`(\w+)`)? ?\|", PAGE.read_text(), re.MULTILINE)
    exceptions = {name for name in dmaload.__all__ if name.endswith("Error")} - {
        "Error",
        "SafetensorError",
    }
    assert {name for name, _ in rows} == exceptions
    for name, base in rows:
        found = getattr(dmaload, name)
        assert issubclass(found, dmaload.Error)
        if base:
            assert issubclass(found, getattr(dmaload, base, None) or getattr(builtins, base))
        else:
            assert found.__bases__ == (dmaload.Error,), name


def test_lines_of_page_end_before_column_100():
    long = [
        number
        for number, line in enumerate(PAGE.read_text().splitlines(), 1)
        if len(line) > 100 and "|" not in line and "http" not in line
    ]
    assert not long
