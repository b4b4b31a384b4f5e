"""Arrays of GGUF blocks. Imports NumPy, so it is imported on first use."""

from __future__ import annotations

from typing import Any

import numpy


class Blocks(numpy.ndarray[Any, Any]):
    """The bytes of ggml blocks, as an array of ``uint8``.

    - ``ggml_type``: the type of the blocks, such as ``Q4_K``. Slices and copies keep it. Arrays of
      another type that are made from this one, such as its view as ``float16``, have ``None``.

    Results of arithmetic and comparisons are ordinary arrays.
    """

    _ggml_type: str | None

    @property
    def ggml_type(self) -> str | None:
        return self._ggml_type if self.dtype == numpy.uint8 else None

    def __array_finalize__(self, source: Any) -> None:
        self._ggml_type = getattr(source, "_ggml_type", None)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        result = numpy.asarray(array)
        return result[()] if return_scalar or result.ndim == 0 else result

    def __reduce__(self) -> Any:
        # The method of the base class does not save attributes.
        made, arguments, state = super().__reduce__()
        return made, arguments, (*state, self._ggml_type)

    def __setstate__(self, state: Any) -> None:
        *rest, self._ggml_type = state
        super().__setstate__(tuple(rest))
