"""From a model's values to its laws: every parameter looked at, populations fitted, leftovers."""

from __future__ import annotations

__all__ = ["Laws", "infer_laws"]

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pocketize.errors import PatternError, nearest
from pocketize.initial.families import gather_family
from pocketize.initial.fit import TINY, fit_population
from pocketize.initial.inherit import inherit, names_inside
from pocketize.initial.laws import (
    Constant,
    Geometry,
    Keep,
    KeepUnlessResized,
    Law,
    NormOf,
    Orthogonal,
    OwnReset,
    Random,
    Repeated,
    Resampled,
    ZeroRow,
)
from pocketize.initial.moments import JUDGED, UNEVEN, Array, Moments, measure, sample
from pocketize.initial.redraw import magnitude, redraw
from pocketize.initial.slots import Slot, find_slots, has_own_reset, has_values, real, stock_law
from pocketize.initial.structure import find_repeats, find_structure, is_lone_orthogonal
from pocketize.initial.table import Table

#: Elements of a tensor in a trained model from which a match with a known law is no accident.
SURE = 4096


@dataclass(frozen=True)
class Laws:
    """The laws that a model's parameters were drawn from; made by :func:`infer_laws`.

    Attributes:
        laws: One law per parameter name, aliases included.
        trained: Whether most weights obey no law, as after training.
    """

    laws: Mapping[str, Law]
    trained: bool

    def explain(self, name: str) -> str:
        """Say how a parameter will be drawn: ``"kaiming_normal(fan_in, gain 1.414), from ..."``.

        Raises:
            PatternError: If the model has no such parameter.
        """
        if name not in self.laws:
            raise PatternError(
                f"weights='reset': the model has no parameter {name!r}.{nearest(name, self.laws)}"
            )
        return str(self.laws[name])

    def notes(self) -> tuple[str, ...]:
        """Which laws were found and for how many parameters, most frequent first."""
        counts = Counter(map(str, self.laws.values()))
        return tuple(f"{law}: {count} parameters" for law, count in counts.most_common())

    def redraw(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw a model's parameters anew, in place, at the shapes they have now.

        Running statistics of norms are reset, and the vectors of spectral norms drawn. Parameters
        keep their identity, dtype, device, memory format and ``requires_grad``; tied ones are drawn
        once. Other buffers stay as they are.

        Args:
            model: The model, or a resized copy of it: parameters are known by name.
            names: Parameters and buffers to draw; all if None.
            generator: Where randomness comes from. With one, the global generators stay untouched.

        Raises:
            PatternError: If the model has no parameter or buffer of a given name.
        """
        redraw(model, self.laws, names, generator)

    def redraw_made(
        self,
        model: nn.Module,
        paths: Sequence[str],
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the parameters of modules that conversions have put into a model, and no others.

        Args:
            model: The model with the new modules in it.
            paths: Where they stand. Their layers inherit the laws of the weight and the bias that
                stood there, at their own fans.
            generator: Where randomness comes from. With one, the global generators stay untouched.
        """
        laws = dict(self.laws)
        for path in paths:
            laws |= inherit(self.laws, model, path)
        names = [name for path in paths for name in names_inside(model, path)]
        redraw(model, laws, names, generator)


@dataclass
class _Finding:
    """What is known of one parameter on the way to its law."""

    slot: Slot
    values: Tensor
    geometry: Geometry
    moments: Moments
    law: Law | None = None
    repeats: int = 1
    hole: int | None = None


def infer_laws(model: nn.Module) -> Laws:
    """Find out how a model's parameters were initialised, from their values; changes nothing.

    Args:
        model: The model before any rewrite, fresh or trained. Linear time: large tensors are
            judged by a sample.

    Returns:
        A law for every floating or complex parameter. For tensors on the meta device, and those
        with values that are not finite, the default of their layer's type.
    """
    slots = find_slots(model)
    with torch.no_grad():
        findings = [found for slot in slots if (found := _look(slot)) is not None]
        _settle_lone_orthogonals(findings)
        unexplained = [found for found in findings if found.law is None]
        _fit([found for found in unexplained if _expects_constant(found)])
        trained = _is_trained(findings)
        _fit([found for found in unexplained if not _expects_constant(found)], free=not trained)
        _distrust(findings, trained)
    by_name = {name: found for found in findings for name in found.slot.names}
    laws: dict[str, Law] = {}
    for slot in slots:
        found = by_name.get(slot.name)
        if slot.direction:
            law = _magnitude_law(slot.direction, found, by_name.get(slot.direction))
        else:
            law = _final(slot, found, trained)
        laws.update(dict.fromkeys(slot.names, law))
    return Laws(laws, trained)


def _look(slot: Slot) -> _Finding | None:
    """Statistics of one parameter, and its law if it is no random sample."""
    values = real(slot.tensor.detach())
    if not has_values(values):
        return None
    hole = getattr(slot.owner, "padding_idx", None) if slot.kind == "embedding" else None
    if hole is not None and len(values) > 1 and not bool(values[hole].any()):
        values = torch.cat([values[:hole], values[hole + 1 :]])
    else:
        hole = None
    geometry, repeats = slot.geometry, find_repeats(values)
    if repeats > 1:
        values = values[::repeats]
        geometry = replace(geometry, weight=tuple(values.shape))
    elements = sample(values)
    if not np.isfinite(elements).all():
        return None
    found = _Finding(slot, values, geometry, measure(values, elements))
    found.repeats, found.hole = repeats, hole
    found.law = find_structure(values, elements, geometry.groups, _gates(slot))
    # a single number is only a constant if somebody may have written it down
    if len(elements) == 1 and not _is_round(float(elements[0])) and slot.kind != "raw":
        found.law = None
    return found


def _gates(slot: Slot) -> int:
    shape, hidden = slot.geometry.shape, slot.geometry.hidden
    if slot.kind == "rnn" and hidden:
        return shape[0] // hidden
    return 3 if slot.kind == "attention" and len(shape) == 2 and shape[0] == 3 * shape[1] else 1


def _is_round(value: float) -> bool:
    return abs(float(f"{value:.1e}") - value) <= 1e-6 * abs(value)


def _settle_lone_orthogonals(findings: Sequence[_Finding]) -> None:
    gains = {1.0, 2**0.5} | {f.law.gain for f in findings if isinstance(f.law, Orthogonal)}
    for found in findings:
        if found.law is None and found.slot.tensor.dim() > 1:
            gain = is_lone_orthogonal(found.values, sorted(gains))
            if gain is not None:
                found.law = Orthogonal(gain)


def _expects_constant(found: _Finding) -> bool:
    return isinstance(stock_law(found.slot), Constant)


def _is_trained(findings: Sequence[_Finding]) -> bool:
    """Whether the values were trained; norms and the like are fitted already.

    Two signs: scales and shifts of norms, which begin as constants, differ and share no law; and
    channels differ in variance, which no initialisation makes.
    """
    constant = [found for found in findings if _expects_constant(found)]
    drawn = Counter(f.slot.population for f in constant if not _is_fixed(f.law))
    shared = Counter((f.slot.population, f.law) for f in constant if isinstance(f.law, Random))
    # an owner who draws scales at random draws most of them alike
    alike = {key for (key, law), n in shared.items() if not law.lone and n > 0.8 * drawn[key]}
    lawless = [not _is_fixed(f.law) and f.slot.population not in alike for f in constant]
    if any(lawless) and 2 * sum(lawless) >= len(lawless):
        return True
    judged = [
        found.law is None and found.moments.uneven >= UNEVEN
        for found in findings
        if found.moments.count >= JUDGED and not isinstance(found.law, Constant)
    ]
    return 2 * sum(judged) > len(judged)


def _is_fixed(law: Law | None) -> bool:
    return law is not None and not isinstance(law, Random)


def _fit(findings: Sequence[_Finding], *, free: bool = True) -> None:
    """Fit the populations, the largest first, so that small ones may follow its laws."""
    populations: dict[tuple[str, str], list[_Finding]] = {}
    for found in findings:
        if not found.slot.direction:
            populations.setdefault(found.slot.population, []).append(found)
    carried: dict[tuple[str, str, float], tuple[Random, str]] = {}
    for members in sorted(populations.values(), key=lambda m: -sum(f.moments.count for f in m)):
        stock = next((law for f in members if isinstance(law := stock_law(f.slot), Random)), None)
        table = Table(
            [f.moments for f in members],
            [f.geometry for f in members],
            likeliest=stock.fan if stock else "fan_in",
        )
        laws = fit_population(
            table,
            stock,
            [(law, 0.5 if role == members[0].slot.role else 2.5) for law, role in carried.values()],
            free=free,
            samples=_sampler(members),
        )
        for found, law in zip(members, laws, strict=True):
            found.law = law
            if law is not None and not law.lone:
                key = law.family.name, law.fan, law.gain
                carried[key] = replace(law, source=""), found.slot.role
        _follow(members, stock, free)


def _sampler(members: Sequence[_Finding]) -> Callable[[int], Array]:
    return lambda index: sample(members[index].values)


def _follow(members: Sequence[_Finding], stock: Random | None, fresh: bool) -> None:
    """Let tensors that are too small to judge, or nearly lawful, follow the commonest law."""
    laws = [f.law for f in members if isinstance(f.law, Random) and not f.law.lone]
    keys = Counter((law.family.name, law.fan, law.gain) for law in laws)
    leaders = sorted(laws, key=lambda law: -keys[law.family.name, law.fan, law.gain])[:1]
    for found in members:
        moments = found.moments
        if found.law is None and moments.count < TINY:
            for law in [*leaders, *([stock] if stock else [])]:
                centre, std = law.location, law.std(found.geometry)
                reach = float(np.abs(sample(found.values) - centre - law.family.offset * std).max())
                if reach <= min(law.family.bound, 6.0) * std * (1 + moments.rounding):
                    found.law = replace(law, source="as others of its kind, too few to tell")
                    break
        elif found.law is None and fresh and leaders:
            # one in many thousands is an outlier by chance
            std = leaders[0].std(found.geometry)
            if abs(moments.variance**0.5 / std - 1) < 0.1 + 2 / moments.count**0.5:
                found.law = replace(leaders[0], source="as others of its kind, if not quite")


def _distrust(findings: Sequence[_Finding], trained: bool) -> None:
    """Take back laws that values seem to obey where chance is likelier than a law."""
    weights = {f.slot.path: f for f in findings if f.slot.leaf == "weight"}
    for found in findings:
        weight = weights.get(found.slot.path)
        # a layer is trained as a whole: only a large, lawful weight vouches for the rest
        vouched = weight is not None and weight.law is not None and weight.moments.count >= SURE
        law = found.law
        if isinstance(law, Random) and _expects_constant(found):
            doubtful = trained or law.lone
        else:
            chance = isinstance(law, Random) or found.moments.count == 1
            doubtful = chance and trained and not vouched and stock_law(found.slot) is not None
        if doubtful:
            found.law = None


def _magnitude_law(name: str, found: _Finding | None, direction: _Finding | None) -> Law:
    """A magnitude follows its direction, unless it was set to one value (DINO's last layer)."""
    if found is not None and isinstance(found.law, Constant) and direction is not None:
        norm = magnitude(direction.slot.tensor, found.slot.tensor)
        if not torch.allclose(norm, found.slot.tensor, rtol=1e-2):
            return found.law
    return NormOf(name)


def _final(slot: Slot, found: _Finding | None, trained: bool) -> Law:
    """The law of a slot, or what is done without one."""
    if found is None or found.law is None:
        return _without_law(slot, found, trained)
    law = found.law
    if found.repeats > 1:
        law = Repeated(law, found.repeats)
    return law if found.hole is None else ZeroRow(law, found.hole)


def _without_law(slot: Slot, found: _Finding | None, trained: bool) -> Law:
    reason = "its values match no law" if found else "its values cannot be read"
    stock = stock_law(slot)
    fresh = found is not None and not trained
    # channels that are alike were not trained: the owner's scheme beats the layer's default
    alike = found is not None and found.moments.count >= JUDGED and found.moments.uneven < UNEVEN
    law: Law
    if isinstance(stock, (Random, Constant)) and not (fresh and alike):
        law = replace(stock, source=f"torch's default, as {reason}")
    elif has_own_reset(slot):
        law = OwnReset(reason)
    elif found is None or not slot.tensor.requires_grad:
        return Keep(reason)
    elif found.moments.count == 1:
        return Constant(found.moments.mean)
    elif slot.tensor.dim() == 1 and bool((found.values.diff() > 0).all()):
        return Keep("an ascending sequence")
    else:
        own = Random(
            gather_family(sample(found.values)),
            "constant",
            found.moments.variance**0.5,
            found.moments.mean,
        )
        law = Resampled(own, slot.geometry)
    if found and found.hole is not None:
        law = ZeroRow(law, found.hole)
    return KeepUnlessResized(law, tuple(real(slot.tensor).shape)) if fresh else law
