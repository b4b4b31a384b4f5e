"""The command ``dmaload``: ``python -m dmaload load model.safetensors``."""

from __future__ import annotations

import os
import signal
import sys

from . import _native


def main() -> int:
    """Runs the command with the arguments of this process, and returns its exit status."""
    # The command has no use for an exception: it ends by the signal, as any other program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = _native.run_command(["dmaload", *sys.argv[1:]], [sys.executable, "-m", "dmaload"])
    sys.stdout.flush()
    # Nothing of Python's is left to be done.
    os._exit(status)


if __name__ == "__main__":
    main()
