"""What the three swaps have in common: which convolutions, at what cost, and what the plan says."""

from __future__ import annotations

__all__ = ["Swap", "Swapped"]

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pocketize._torch import ConvNd
from pocketize.channels.levels import find_sides
from pocketize.engine.dry_run import DryRun
from pocketize.errors import OptionError
from pocketize.initial.parameters import has_values
from pocketize.passes.shared import RESIZING
from pocketize.passes.shared.patterns import matching
from pocketize.passes.swaps.blocks import ConvBlock
from pocketize.passes.swaps.decompositions import folded, relative_error, rounding_of
from pocketize.passes.swaps.intermediate import Intermediate, Intermediates
from pocketize.passes.swaps.ranks import RankTable, allot, read_ratio
from pocketize.passes.swaps.sites import ConvSite, SwapCost, find_sites, swap_cost
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.edits import Convert, Edit, Redraw
from pocketize.units import bytes_text

_SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class Swapped:
    """One convolution that is to be a block.

    Attributes:
        site: the convolution.
        ranks: of the block.
        cost: what it costs and saves.
        error: relative error of the block's weight; None where the block gets new weights.
        inner: norm and activation inside the block.
        edit: the conversion.
    """

    site: ConvSite
    ranks: tuple[int, ...]
    cost: SwapCost
    error: float | None
    inner: Intermediate
    edit: Convert


@dataclass(frozen=True)
class _Possible:
    """One convolution that may become a block.

    Attributes:
        site: the convolution.
        inner: norm and activation inside the block.
        forced: swap it even if that saves nothing.
    """

    site: ConvSite
    inner: Intermediate
    forced: bool

    @property
    def conv(self) -> ConvNd:
        assert self.site.conv is not None  # of what is not refused
        return self.site.conv


@dataclass(frozen=True, kw_only=True)
class Swap(Pass):
    """Replace convolutions by blocks with fewer parameters; the conversion is named as the pass.

    Attributes:
        keep: patterns of module paths (fnmatch) whose convolutions stay.
        min_channels: convolutions with fewer channels in or out stay.
        where: "all", "encoder", "decoder", or patterns of the module paths to swap.
        inner_norm: norm and activation after every inner layer, of the kinds that follow the
            convolution, or else are usual in the network.
        weights: "decompose" starts the block as an approximation of the convolution, "reset" draws
            it anew.
        activations: "weighed" swaps where weights, gradients and Adam's moments save at least the
            bytes that the activations inside cost, "any" wherever parameters are saved.
        force: patterns of the module paths to swap even where that saves nothing.
        ratio: output channels for one channel inside, or a rule. "energy:0.95": the fewest
            parameters that keep that share of the squared norm of each weight. "params:0.25": the
            convolutions together keep that share of their parameters, spread over them so that the
            product of the shares of their squared norms is largest; those that other options leave
            out, or whose blocks save nothing, do not count.
    """

    after: ClassVar[tuple[str, ...]] = RESIZING
    #: Class of the blocks.
    block: ClassVar[type[ConvBlock]]

    keep: tuple[str, ...] = ()
    min_channels: int = 8
    where: tuple[str, ...] = ("all",)
    inner_norm: bool = False
    weights: Literal["decompose", "reset"] = "decompose"
    activations: Literal["weighed", "any"] = "weighed"
    force: tuple[str, ...] = ()
    ratio: int | str | None = None

    def validate(self) -> None:
        """Refuse options that choose nothing, and ratios that are no number and no share."""
        if not self.where:
            raise OptionError(
                f"{self.name}: option 'where' must name 'all', 'encoder', 'decoder' or patterns"
            )
        try:
            read_ratio(self.ratio)
        except ValueError:
            raise OptionError(
                f"{self.name}: option 'ratio': expected a whole number of at least 1, or "
                "'energy:SHARE' or 'params:SHARE' with a share above 0 and at most 1 such as "
                f"'energy:0.95', got {self.ratio!r}"
            ) from None
        for option in ("min_channels", "multiplier"):
            if (value := getattr(self, option, 1)) < 1:
                raise OptionError(f"{self.name}: option {option!r} must be at least 1, not {value}")

    @property
    def guarantee(self) -> Guarantee:
        """An approximation, unless the block has layers of its own or new weights."""
        carried = self.weights == "decompose" and not self.inner_norm
        return Guarantee.APPROXIMATE if carried else Guarantee.RETRAIN

    def ranks(self, conv: ConvNd) -> tuple[int, ...]:
        """Return the ranks of the block for a convolution by itself."""
        rule = read_ratio(self.ratio)
        if rule is None:
            o, i, *kernel = conv.weight.shape
            return self.given_ranks(o, i, torch.Size(kernel).numel())
        return self.ranks_by_energy(folded(conv.weight), rule[1], rounding_of(conv.weight.dtype))

    @abc.abstractmethod
    def given_ranks(self, o: int, i: int, taps: int) -> tuple[int, ...]:
        """Return the ranks that the options name.

        Args:
            o: channels out.
            i: channels in.
            taps: size of the kernel.
        """

    @abc.abstractmethod
    def table(self, weight: Tensor) -> RankTable:
        """Return what all ranks keep of a weight (o, i, k) in float64, and what they cost."""

    def ranks_by_energy(self, weight: Tensor, share: float, rounding: float) -> tuple[int, ...]:
        """Return the ranks with the fewest parameters that keep enough.

        Args:
            weight: (o, i, k) in float64.
            share: of the energy that is to be kept.
            rounding: how much less than that is still enough.
        """
        return self.table(weight).cheapest(share, rounding)

    @abc.abstractmethod
    def describe(self, ranks: Sequence[int]) -> str:
        """Say the ranks, for the plan."""

    def approximation(self, weight: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return the weight (o, i, k) that a block of these ranks has before training."""
        return self.block.decompose(weight, *ranks).composed()

    def propose(self, target: Target) -> Proposal:
        """Choose the convolutions.

        Raises:
            PatternError: a pattern matches no module.
        """
        model = target.model
        kept = matching(model, self.keep, f"{self.name}: keep")
        forced = matching(model, self.force, f"{self.name}: force")
        patterns = [word for word in self.where if word not in ("all", *_SIDES)]
        wanted = set(matching(model, patterns, f"{self.name}: where"))
        sides = set(self.where).intersection(_SIDES)
        if sides:
            found = find_sides(target.traced())
            wanted |= {path for path, side in found.items() if side in sides}
        inside = Intermediates(model, target.traced()) if self.inner_norm else None
        possible: list[_Possible] = []
        swapped: list[Swapped] = []
        refused: list[Refusal] = []
        for site in find_sites(model, target.traces()):
            why = site.refused
            if not why and site.path in kept:
                why = f"kept by keep={kept[site.path]!r}"
            if not why and "all" not in self.where and site.path not in wanted:
                why = f"where={'|'.join(self.where)} leaves it out"
            if not why:
                why = self._unsuitable(site, site.path in forced)
            if why:
                refused.append(Refusal(site.path, why))
            else:
                inner = inside.of(site.path) if inside else Intermediate({}, {})
                possible.append(_Possible(site, inner, site.path in forced))
        for one, result in zip(possible, self._weighed(possible), strict=True):
            if isinstance(result, Swapped):
                swapped.append(result)
            else:
                refused.append(Refusal(one.site.path, result))
        broken = DryRun(model, target.inputs, target.variants).errors([one.edit for one in swapped])
        refused += [
            Refusal(path, f"with a block in its place the model does not run as before: {why}")
            for path, why in broken.items()
        ]
        swapped = [one for one in swapped if one.site.path not in broken]
        return Proposal(
            (*(one.edit for one in swapped), *self._redrawn(swapped)),
            tuple(self._rows(model, swapped)),
            tuple(refused),
            tuple(self._notes(target, swapped, inside)),
        )

    def _unsuitable(self, site: ConvSite, forced: bool) -> str:
        """Say why a convolution is not swapped whatever the ranks; "" if it may be."""
        assert site.conv is not None  # of what is not refused
        narrow = min(site.conv.in_channels, site.conv.out_channels)
        if narrow < self.min_channels and not forced:
            return f"channels in or out: {narrow}, fewer than min_channels={self.min_channels}"
        if read_ratio(self.ratio) and not has_values(site.conv.weight):
            return (
                f"ratio={self.ratio!r} needs the weight's values, and it has none (it is on the "
                "meta device); give a number"
            )
        return ""

    def _weighed(self, possible: Sequence[_Possible]) -> list[Swapped | str]:
        """Return the swap of each convolution, or why it is not worth it.

        Raises:
            OptionError: ratio is a share of parameters that blocks cannot come down to.
        """
        rule = read_ratio(self.ratio)
        if rule is None or rule[0] == "energy":
            return [self._swap(one, self.ranks(one.conv)) for one in possible]
        tables = [self.table(folded(one.conv.weight)) for one in possible]
        before = [one.conv.weight.numel() for one in possible]
        found: list[Swapped | str] = [""] * len(possible)
        left = list(range(len(possible)))
        while True:  # what is not worth its activations does not count, and is not swapped
            most = int(rule[1] * sum(before[index] for index in left))
            least = sum(int(tables[index].cost.min()) for index in left)
            if least > most:
                raise OptionError(
                    f"{self.name}: ratio={self.ratio!r} leaves {most:,} parameters to "
                    f"{len(left)} convolutions, whose blocks have at least {least:,}; give a "
                    "larger share"
                )
            limits = [math.inf if possible[index].forced else before[index] for index in left]
            ranks = allot([tables[index] for index in left], limits, most)
            out = set()
            for index, each in zip(left, ranks, strict=True):
                found[index] = "its block would err too much for the parameters that it saves"
                if each is not None:
                    found[index] = self._swap(possible[index], each)
                    out |= {index} if isinstance(found[index], str) else set()
            if not out:
                return found
            left = [index for index in left if index not in out]

    def _swap(self, one: _Possible, ranks: tuple[int, ...]) -> Swapped | str:
        """Return the swap of a convolution, or why it is not worth it."""
        site, inner, forced, conv = one.site, one.inner, one.forced, one.conv
        options = {
            "ranks": list(ranks),
            "shape": list(conv.weight.shape),
            "weights": self.weights,
            "norm": dict(inner.norm),
            "activation": dict(inner.activation),
        }
        cost = swap_cost(conv, site.calls, self.name, options)
        if cost.after >= cost.before and not forced:
            return f"no parameters saved: {cost.before:,} -> {cost.after:,}"
        if self.activations == "weighed" and cost.saved < cost.added and not forced:
            return (
                f"{bytes_text(cost.added)} more activations, {bytes_text(cost.saved)} less of "
                "weights, gradients and Adam's moments; activations='any' swaps it"
            )
        error = None
        if self.weights == "decompose" and has_values(conv.weight):
            with torch.inference_mode(False), torch.no_grad():
                weight = folded(conv.weight)
                error = relative_error(weight, self.approximation(weight, ranks))
        edit = Convert(site.path, self.name, options)
        return Swapped(site, ranks, cost, error, inner, edit)

    def _redrawn(self, swapped: Sequence[Swapped]) -> Iterator[Edit]:
        return (Redraw(one.site.path) for one in swapped if self.weights == "reset")

    def _rows(self, model: nn.Module, swapped: Sequence[Swapped]) -> Iterator[Change]:
        modules = dict(model.named_modules())
        for one in swapped:
            path, conv, cost = one.site.path, one.site.conv, one.cost
            assert conv is not None
            kernel = "x".join(map(str, conv.kernel_size))
            what = (
                f"{type(conv).__name__} {conv.in_channels} -> {conv.out_channels}, {kernel}: "
                f"{cost.before:,} -> {cost.after:,} parameters, {self.describe(one.ranks)}"
            )
            if str(one.inner):
                what += f", {one.inner} inside"
            reasons = [] if one.error is None else [f"relative error {one.error:.3g}"]
            reasons.append(
                f"activations +{bytes_text(cost.added)}, weights, gradients and Adam's moments "
                f"{'-' if cost.saved >= 0 else '+'}{bytes_text(abs(cost.saved))}"
            )
            yield Change(path, what, "; ".join(reasons))
            for other, module in model.named_modules(remove_duplicate=False):
                if module is modules[path] and other != path:
                    yield Change(other, "the same layer", f"it is {path}")

    def _notes(
        self, target: Target, swapped: Sequence[Swapped], inside: Intermediates | None
    ) -> Iterator[str]:
        if not swapped:
            return
        before, after = (sum(getattr(s.cost, n) for s in swapped) for n in ("before", "after"))
        yield f"{len(swapped)} convolutions of {before:,} parameters become blocks of {after:,}"
        added, saved = (sum(getattr(s.cost, n) for s in swapped) for n in ("added", "saved"))
        yield (
            f"a training step keeps {bytes_text(added)} more activations at "
            f"{target.inputs.describe()}, and {bytes_text(max(saved, 0))} less of weights, "
            "gradients and Adam's moments"
        )
        if inside is not None and not any(str(one.inner) for one in swapped):
            yield "the network has no norm and no activation that could be copied into the blocks"
        if self.weights == "reset":
            yield "the blocks are initialised as the convolutions were; all other weights stay"
        elif any(one.error is None for one in swapped):
            yield "weights without values cannot be decomposed: only shapes are planned"
