"""Arrays of GGUF blocks. Imports NumPy, so it is imported on first use."""

from __future__ import annotations

from typing import Any

import numpy


class Blocks(numpy.ndarray[Any, Any]):
    """The bytes of ggml blocks, as an array of ``uint8``. Slices keep the type.

    - ``ggml_type``: the type of the blocks, such as ``Q4_K``.
    """

    ggml_type: str | None

    def __array_finalize__(self, source: Any) -> None:
        self.ggml_type = getattr(source, "ggml_type", None)

    def __reduce__(self) -> Any:
        # The base class's method saves no attributes.
        made, arguments, state = super().__reduce__()
        return made, arguments, (*state, self.ggml_type)

    def __setstate__(self, state: Any) -> None:
        *rest, self.ggml_type = state
        super().__setstate__(tuple(rest))
