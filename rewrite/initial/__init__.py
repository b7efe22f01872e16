"""``weights="reset"``: draw a resized network anew, as if it had been built at its new width.

How the owner initialised the network (in constructors, by ``model.apply(init_fn)``) cannot be run
again, so the laws are read off the values: :func:`infer_laws` looks at the original, and
:meth:`Laws.redraw` draws the resized copy from the same laws at its own fans. Trained weights obey
no law; their layers get the default initialisation of their type.

Low to high: ``families`` (distributions), ``laws`` (distributions whose scale depends on fans),
``moments`` (statistics of a tensor), ``structure`` (constants, orthogonal matrices), ``table``,
``catalogue`` and ``fit`` (the law of a population), ``slots`` (a model's parameters), ``redraw``,
``inherit`` (the laws of modules that a conversion makes), ``infer``.
"""

from __future__ import annotations

__all__ = ["Laws", "infer_laws"]

from pocketize.initial.infer import Laws, infer_laws
