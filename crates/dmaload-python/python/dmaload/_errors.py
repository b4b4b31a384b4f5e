"""The exceptions: one subclass of :class:`Error` for each kind of error.

If Python has a built-in exception for that kind, the class is also a subclass of it:
``except FileNotFoundError`` catches a missing file.
"""

from __future__ import annotations

import os as _os


class Error(Exception):
    """The base class of all exceptions in this package.

    The message says what failed, and names the file, the position in the file, and the errno if
    they are known. Attributes:

    - ``errno``: the kernel's error, as in the module ``errno``, or ``None``.
    - ``filename``: the affected file, folder, device or socket, or ``None``.
    - ``hint``: what to do, or ``None``. The hint is also added as a note, so tracebacks show it.
    - ``offset``: the start of the affected bytes in the file, or ``None``.
    """

    errno: int | None
    filename: str | None
    hint: str | None
    offset: int | None

    def __new__(cls, message: str = "", *_rest: object, **_named: object) -> Error:
        # OSError.__new__ interprets further arguments; MemoryError.__new__ refuses these classes.
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
    """An option is invalid or contradicts another option. Nothing was read."""


class InvalidInputError(Error, ValueError):
    """The input is not a regular file, reports a wrong length, or lacks the requested data."""


class NotFoundError(Error, FileNotFoundError):
    """The file does not exist, or the folder contains no model."""


class NotInManifestError(Error, LookupError):
    """The manifest does not list this file."""


class TensorNotFoundError(Error, KeyError):
    """No file contains a tensor with this name."""


class NotLoadedError(Error, KeyError):
    """The model contains the tensor, but it was not loaded."""


class AmbiguousError(Error, LookupError):
    """Several files contain a tensor with this name."""


class PermissionDeniedError(Error, PermissionError):
    """This user lacks permission to open the file or to allocate the memory."""


class IoError(Error, OSError):
    """The kernel or the storage failed, or reached a limit: see ``errno``."""


class InvalidModelError(Error, ValueError):
    """The file is not a model, or violates its format."""


class IncompleteError(NotFoundError):
    """Some of the model's files are missing or empty: see ``allow_missing``."""


class ChangedError(Error):
    """The file changed during the load, or after ``safe_open`` opened it.

    Load it again when nothing writes to it.
    """


class CorruptError(Error):
    """The bytes do not match their checksum: see ``verify``."""


class OutOfMemoryError(Error, MemoryError):
    """There is too little memory in the machine, or for this process.

    A process can be limited by its memory cgroup and by its address space.
    """


class OverLimitError(Error, MemoryError):
    """The load needs more memory at once than ``memory_limit`` allows."""


class TooLargeError(Error):
    """A segment would be larger than its heap allows, or the load has too many pieces."""


class DeviceError(Error, OSError):
    """Dma-bufs are not available: a device is missing or cannot be opened."""


class UnsupportedError(Error):
    """The kernel, the file system or the heap does not support what the call requires."""


class ExportError(UnsupportedError, BufferError):
    """DLPack or the buffer protocol cannot export the memory in the requested way, or at all."""


class PlacementError(Error):
    """A tensor cannot be placed in memory as required."""


class InUseError(Error):
    """The call would view memory that was handed out, or hand out memory that is being viewed."""


class ShareError(Error, OSError):
    """A server that shares images, or its socket, failed."""


class PanickedError(Error, RuntimeError):
    """Code in dmaload panicked. Please report this bug."""


class ShutDownError(Error, RuntimeError):
    """The loader was shut down before the load finished."""


class ClosedError(Error, ValueError):
    """The object was closed."""


class ForkedError(Error, RuntimeError):
    """The load belongs to the process that this process was forked from."""
