"""The zoo of awkward nets: small modules, each with one habit that rewriters stumble over.

``nets()`` lists them, ``nets("norm")`` those with a tag, ``get("unet")`` one by name. What must
move and what must freeze in each was derived by hand from its forward; see :class:`Net`.
"""

from __future__ import annotations

from tests.models import (  # noqa: F401  (importing registers)
    attention,
    containers,
    convs,
    joins,
    norms,
    odd,
    opaque,
    positions,
    reuse,
    sizes,
    state,
    views,
)
from tests.models.registry import Net, get, image, nets

__all__ = ["Net", "get", "image", "nets"]
