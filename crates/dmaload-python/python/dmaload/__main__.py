"""The command ``dmaload``: ``python -m dmaload load model.safetensors``."""

from __future__ import annotations

import os
import signal
import sys

from . import _native


def main() -> int:
    """Runs the command with this process's arguments, and exits with the command's status."""
    # Like any other program, the command is ended by the signal, not by an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = _native.run_command(["dmaload", *sys.argv[1:]], [sys.executable, "-m", "dmaload"])
    sys.stdout.flush()
    # Skips the interpreter's exit, which has nothing left to do.
    os._exit(status)


if __name__ == "__main__":
    main()
