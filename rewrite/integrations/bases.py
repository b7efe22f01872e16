"""The order of the bases of a class, which a mixin depends on."""

from __future__ import annotations

__all__ = ["refuse_behind"]


def refuse_behind(kind: type, mixin: type) -> None:
    """Refuse a class whose other bases hide what a mixin does.

    Args:
        kind: the class.
        mixin: one of its bases, which must come before those with the same methods.

    Raises:
        TypeError: a base before it has one of its methods.
    """
    order = kind.__mro__
    for base in order[: order.index(mixin)]:
        hides = [name for name in vars(mixin) if name in vars(base) and not name.startswith("__")]
        if hides and not issubclass(base, mixin):
            named = next((each for each in kind.__bases__ if issubclass(each, base)), base)
            raise TypeError(
                f"{kind.__name__}: write {mixin.__name__} before {named.__name__} among its bases, "
                f"whose {hides[0]} would run instead"
            )
