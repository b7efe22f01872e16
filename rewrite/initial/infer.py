"""From a model's values to the initialisation scheme of each parameter."""

from __future__ import annotations

__all__ = ["infer_schemes"]

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pocketize.initial.estimate import UNEVEN, TensorStatistics, fit, resample, structure
from pocketize.initial.parameters import ParameterInfo, find_parameters, has_values, real
from pocketize.initial.redraw import Schemes, magnitude, padding_row
from pocketize.initial.schemes import Constant, IfResized, Keep, Random, Repeated, Scheme


class _Finding:
    """What is known of one parameter, which has finite values, on the way to its scheme."""

    def __init__(self, info: ParameterInfo) -> None:
        values, self.info, self.geometry = real(info.tensor.detach()), info, info.geometry
        padding = padding_row(info)
        if padding is not None and len(values) > 1:
            values = torch.cat([values[:padding], values[padding + 1 :]])
        self.repeats = _repeats(values)
        if self.repeats > 1:
            values = values[:: self.repeats]
            shape = tuple(values.shape)
            self.geometry = replace(self.geometry, shape=shape, weight=shape)
        self.values, self.known = values, TensorStatistics(values)
        self.scheme = structure(values, self.geometry.groups)
        # a single number is only a constant if somebody may have written it down
        if values.numel() == 1 and info.kind != "raw":
            value = float(values.reshape(-1)[0])
            if abs(float(f"{value:.1e}") - value) > 1e-6 * abs(value):
                self.scheme = None

    @property
    def population(self) -> tuple[str, ...]:
        """Tensors of one population are expected to have been initialised alike."""
        kind, role, shape = self.info.kind, self.info.role, self.info.tensor.shape
        if kind == "raw":
            role = "vector" if max(shape, default=1) == shape.numel() else ""
        centre = f"{self.known.mean:.1g}" if self.known.mean else ""
        return kind, role, "one-sided" if self.known.one_sided else centre


def infer_schemes(model: nn.Module) -> Schemes:
    """Find out how a model's parameters were initialised, from their values; changes nothing.

    Args:
        model: the model before any rewrite, fresh or trained. Large tensors are judged by a sample.

    Returns:
        A scheme for every floating or complex parameter. Without values, and with values that are
        not finite, the default of its layer.
    """
    parameters = find_parameters(model)
    with torch.no_grad():
        findings = [
            _Finding(info)
            for info in parameters
            if has_values(info.tensor) and bool(real(info.tensor).isfinite().all())
        ]
        open_ = [found for found in findings if found.scheme is None and not found.info.direction]
        _fit([found for found in open_ if found.info.starts_constant], fresh=True)
        trained = _is_trained(findings)
        for found in open_:
            # a scale or shift that alone is random was trained
            random = found.scheme
            if isinstance(random, Random) and (trained or random.singleton):
                found.scheme = None
        _fit([found for found in open_ if not found.info.starts_constant], fresh=not trained)
        by_name = {name: found for found in findings for name in found.info.names}
        schemes: dict[str, Scheme] = {}
        for info in parameters:
            scheme = _final(info, by_name, trained)
            schemes.update(dict.fromkeys(info.names, scheme))
    return Schemes(schemes, trained)


def _repeats(values: Tensor) -> int:
    """How many neighbouring slices of the first axis are equal throughout; 1 for none."""
    count = len(values) if values.dim() > 1 else 0
    if count < 4 or not torch.equal(values[0], values[1]):
        return 1
    same = (values == values[:1]).flatten(1).all(dim=1).tolist()
    times = same.index(False) if False in same else count
    if count % times or times == count:
        return 1
    blocks = values.reshape(-1, times, *values.shape[1:])
    return times if bool((blocks == blocks[:, :1]).all()) else 1


def _is_trained(findings: Sequence[_Finding]) -> bool:
    """Whether the values were trained; norms and the like are fitted already.

    Two signs: scales and shifts of norms, which begin as constants, differ and share no scheme; and
    channels differ in variance, which no initialisation makes.
    """
    constant = [found for found in findings if found.info.starts_constant]
    sizes = Counter(f.info.kind for f in constant if f.info.role == "weight")
    drawn = Counter(f.scheme for f in constant if isinstance(f.scheme, Random))

    def designed(found: _Finding) -> bool:
        if not isinstance(found.scheme, Random):
            return found.scheme is not None
        # an owner who draws scales at random draws all of them alike, and no shifts
        alike = drawn[found.scheme] >= max(3, 0.8 * sizes[found.info.kind])
        return alike and found.info.role == "weight"

    odd = sum(not designed(found) for found in constant)
    if odd and 2 * odd >= len(constant):
        return True
    judged = [
        found.scheme is None and found.known.uneven >= UNEVEN
        for found in findings
        if found.known.judged and not isinstance(found.scheme, Constant)
    ]
    return 2 * sum(judged) > len(judged)


def _fit(findings: Sequence[_Finding], *, fresh: bool) -> None:
    """Fit the populations, the largest first, so that small ones may share its schemes.

    In a trained net only schemes that explain most of a population hold: a few tensors match some
    usual scale by chance.
    """
    populations: dict[tuple[str, ...], list[_Finding]] = {}
    for found in findings:
        populations.setdefault(found.population, []).append(found)
    elsewhere: list[tuple[Random, str]] = []
    for members in sorted(populations.values(), key=lambda m: -sum(f.known.count for f in m)):
        judged = sum(found.known.judged for found in members)
        even = [found for found in members if found.known.uneven < UNEVEN]
        role = members[0].info.role
        schemes = fit(
            [found.known for found in even],
            [found.geometry for found in even],
            [(scheme, 0.5 if role == other else 2.5) for scheme, other in elsewhere],
            free=fresh,
        )
        counts = Counter(scheme for scheme in schemes if scheme and not scheme.singleton)
        for found, scheme in zip(even, schemes, strict=True):
            vouched = scheme is not None and 2 * counts[scheme] > max(judged, 2)
            found.scheme = scheme if fresh or vouched else None
        elsewhere += [(scheme, role) for scheme in counts if fresh]


def _final(info: ParameterInfo, findings: Mapping[str, _Finding], trained: bool) -> Scheme:
    """The scheme of a parameter, or what is done without one."""
    found = findings.get(info.name)
    if info.direction:
        # a magnitude follows its direction, unless it was set to one value (DINO's last layer)
        direction = findings.get(info.direction)
        if found and direction and isinstance(found.scheme, Constant):
            norm = magnitude(direction.info.tensor, info.tensor)
            if not torch.allclose(norm, info.tensor, rtol=1e-2):
                return found.scheme
        return Keep("the norm of its direction, which is renewed with it")
    if found is None:
        reason = "its values cannot be read"
        return info.default(reason) or Keep(reason)
    if found.scheme:
        return Repeated(found.scheme, found.repeats) if found.repeats > 1 else found.scheme
    scheme = _without_scheme(found, trained)
    return scheme if trained else IfResized(scheme, tuple(real(info.tensor).shape))


def _without_scheme(found: _Finding, trained: bool) -> Scheme:
    info, known, reason = found.info, found.known, "its values match no scheme"
    default = info.default(reason)
    # channels that are alike were not trained: the owner's scheme beats the layer's default
    alike = not trained and known.judged and known.uneven < UNEVEN
    if default is not None and not alike:
        return default
    if not info.tensor.requires_grad:
        return Keep(reason)
    if known.count == 1:
        return Constant(float(found.values.reshape(-1)[0]))
    if info.tensor.dim() == 1 and bool((found.values.diff() > 0).all()):
        return Keep("an ascending sequence")
    return resample(known, found.geometry)
