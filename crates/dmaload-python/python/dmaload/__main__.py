"""The command ``dmaload``: ``python -m dmaload load model.safetensors``."""

from __future__ import annotations

import os
import signal
import sys

from . import _native


def main() -> int:
    """Runs the command with this process's arguments, and exits with the command's status."""
    # Let Ctrl-C end the command as it ends any other program, instead of raising an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = _native.run_command(["dmaload", *sys.argv[1:]], [sys.executable, "-m", "dmaload"])
    sys.stdout.flush()
    # Skip the interpreter's shutdown, which has nothing left to do.
    os._exit(status)


if __name__ == "__main__":
    main()
