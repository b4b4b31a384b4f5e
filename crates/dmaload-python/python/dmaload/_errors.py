"""What can go wrong: one class for each kind of error, all of them :class:`Error`.

Where Python has an exception for it, the class is that, too: ``except FileNotFoundError`` finds a
file that is not there.
"""

from __future__ import annotations

import os as _os


class Error(Exception):
    """Why a load, or anything else of this package, did not work.

    Its text says what was tried, on which file and where, with the errno by name. Its attributes:

    - ``errno``: what the kernel answered, as a number of module ``errno``, or ``None``.
    - ``filename``: the file, folder, device or socket that it is about, or ``None``.
    - ``hint``: what can be done about it, or ``None``. It is a note of the exception, too, so that
      it is under the traceback.
    - ``offset``: where in the file the bytes begin that it is about, or ``None``.
    """

    errno: int | None
    filename: str | None
    hint: str | None
    offset: int | None

    def __new__(cls, message: str = "", *_rest: object, **_named: object) -> Error:
        # OSError makes something else of several arguments; MemoryError makes its own kind only.
        return (OSError if issubclass(cls, OSError) else Exception).__new__(cls, message)

    def __init__(
        self,
        message: str = "",
        errno: int | None = None,
        filename: str | None = None,
        hint: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self._message = message
        self.errno = errno
        self.filename = filename or None
        self.hint = hint
        self.offset = offset
        if isinstance(self, OSError) and errno is not None:
            self.strerror = _os.strerror(errno)
        if hint is not None:
            self.add_note(hint)

    def __str__(self) -> str:
        return self._message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._message, self.errno, self.filename, self.hint, self.offset)


class ConfigError(Error, ValueError):
    """An option makes no sense, or contradicts another one. Nothing was read."""


class InvalidInputError(Error, ValueError):
    """Not loadable in this way: not a regular file, or it has nothing that was asked for."""


class NotFoundError(Error, FileNotFoundError):
    """There is no such file, or no model in the folder."""


class NotInManifestError(Error, LookupError):
    """The manifest that the load was to be verified by does not know this file."""


class TensorNotFoundError(Error, KeyError):
    """No file has a tensor of this name."""


class NotLoadedError(Error, KeyError):
    """The model has the tensor, and it was not asked for when the model was loaded."""


class AmbiguousError(Error, LookupError):
    """Several files have a tensor of this name."""


class PermissionDeniedError(Error, PermissionError):
    """This user may not open the file, or have the memory."""


class IoError(Error, OSError):
    """The kernel or the storage failed: ``errno`` says how."""


class InvalidModelError(Error, ValueError):
    """The file is not a model of its format, or breaks the format's rules."""


class IncompleteError(NotFoundError):
    """Files of the model are missing: see ``allow_missing``."""


class ChangedError(Error):
    """The file is not what it was when it was opened. Load it again when nothing writes to it."""


class CorruptError(Error):
    """The bytes are not those that were expected: see ``verify``."""


class OutOfMemoryError(Error, MemoryError):
    """The machine, or this process' memory cgroup, has too little memory for it."""


class OverLimitError(Error, MemoryError):
    """The load needs more memory at once than ``memory_limit`` allows."""


class TooLargeError(Error):
    """A segment would be larger than its heap allows, or the load has too many pieces."""


class DeviceError(Error, OSError):
    """No dma-buf can be had: a device is missing, or may not be opened."""


class UnsupportedError(Error):
    """The kernel, the file system or the heap can't do what was required."""


class ExportError(UnsupportedError, BufferError):
    """The memory can't be exported by DLPack or the buffer protocol as it was asked for."""


class PlacementError(Error):
    """A tensor does not lie in memory as it was asked for."""


class InUseError(Error):
    """Memory that was handed out can't be lent, and the other way round."""


class ShareError(Error, OSError):
    """A server of shared images, or the way to it, failed."""


class PanickedError(Error, RuntimeError):
    """Code of dmaload panicked: a defect, which is to be reported."""


class ShutDownError(Error, RuntimeError):
    """The loader was shut down before the load had ended."""


class ClosedError(Error, ValueError):
    """It was closed before."""


class ForkedError(Error, RuntimeError):
    """It is a load of the process that this one was forked from."""
