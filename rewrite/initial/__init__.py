"""``weights="reset"``: draw a resized network anew, as if it had been built at its new width.

How the owner initialised the network (in constructors, by ``model.apply(init_fn)``) is not recorded
in it, so it is estimated from the values: :func:`infer_schemes` looks at the original, and
:meth:`Schemes.redraw` draws the resized copy by the same schemes at its own fans. Trained weights
follow no scheme; their layers get the default initialisation of their type.

Low to high: ``schemes`` (how a tensor is drawn), ``parameters`` (of a model), ``estimate`` (from
values to schemes), ``redraw``, ``infer``.
"""

from __future__ import annotations

__all__ = ["Schemes", "infer_schemes"]

from pocketize.initial.infer import infer_schemes
from pocketize.initial.redraw import Schemes
