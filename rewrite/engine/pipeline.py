"""Plan, check, apply: how passes become a rewritten model.

A pass looks at the model and returns edits. The planner applies them to a copy on fake tensors and
compares what runs with the prediction. Where a channel group cannot be resized (because of a size
in a ``forward``, for instance), the planner freezes it and asks the pass again. Only a checked plan
is applied, to a copy of the caller's model.
"""

from __future__ import annotations

__all__ = [
    "PassPlan",
    "Plan",
    "history",
    "plan",
    "pocketize",
    "replay",
    "rewrite",
]

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from pocketize.calibration.calibrate import check_passes
from pocketize.calibration.options import Calibration
from pocketize.engine.calibrated import apply_calibrated, needs_calibration
from pocketize.engine.history import dry_run, replay
from pocketize.engine.order import check_order, passes_given
from pocketize.engine.planner import settle_proposal
from pocketize.engine.surgery import apply_edits
from pocketize.errors import NoEffectWarning, OptionError, RewriteError, UnreadWarning
from pocketize.graph.capture import settle_inputs
from pocketize.graph.clone import clone
from pocketize.graph.sizes import suggest_sizes
from pocketize.graph.variants import read_variants
from pocketize.plugin.base import Guarantee, Pass, PassRecord, Proposal
from pocketize.plugin.history import history, record_history
from pocketize.plugin.registry import get_pass
from pocketize.untrusted import markdown, one_line, printable
from pocketize.version import VERSION


@dataclass(frozen=True)
class PassPlan(Proposal):
    """What one pass will do: its proposal, checked.

    Attributes:
        rewrite: the pass.
        variants: the settings of attributes that the model was recorded with, besides its own.
    """

    rewrite: Pass = field(kw_only=True)
    variants: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)

    @property
    def name(self) -> str:
        """Name of the pass."""
        return self.rewrite.name

    @property
    def guarantee(self) -> Guarantee:
        """What the pass keeps."""
        return self.rewrite.guarantee

    @property
    def sentences(self) -> tuple[str, ...]:
        """Notes and warnings."""
        return self.notes + self.warnings

    def record(self) -> PassRecord:
        """Return the record that :func:`history` will return."""
        return PassRecord(
            name=self.name,
            options=self.rewrite.options(),
            guarantee=self.guarantee.value,
            version=VERSION,
            edits=tuple(edit.to_json() for edit in self.edits),
            changes=self.changes,
            refused=self.refused,
            notes=self.sentences,
            variants=tuple(dict(settings) for settings in self.variants),
        )

    def __str__(self) -> str:
        counts = f"{len(self.changes)} changed, {len(self.refused)} left alone"
        return f"{self.rewrite} ({self.guarantee}): {counts}"

    def _tables(self, style: str, cell: Callable[[str], str]) -> Iterator[str]:
        def table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
            # names and reasons are text, even if they look like numbers
            cells = [[cell(text) for text in row] for row in rows]
            return tabulate(cells, headers=headers, tablefmt=style, disable_numparse=True)

        if self.changes:
            rows = [(c.path or "(model)", c.what, c.why) for c in self.changes]
            yield table(("layer", "change", "why"), rows)
        if self.refused:
            left = [(r.path or "(model)", r.why) for r in self.refused]
            yield table(("left alone", "why"), left)

    def _render(self, style: str) -> str:
        github = style == "github"
        cell = markdown if github else one_line
        heading = cell(f"{self.rewrite} ({self.guarantee})")
        notes = [markdown(n, paragraph=True) if github else printable(n) for n in self.sentences]
        parts = [f"### {heading}" if github else heading, *notes]
        if not self.changes:
            parts.append("nothing to change")
        return "\n\n".join((*parts, *self._tables(style, cell)))


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked plan; nothing has been changed yet.

    Attributes:
        model: the caller's model.
        passes: one plan for each pass, in the order in which they are applied; more than one where
            a pass had something left to do on its own result.
        seed: seed of whatever is drawn at random, ``None`` for torch's own generator.
        init: initialises what ``weights="reset"`` draws anew; ``None`` leaves that to
            :mod:`pocketize.initial`.
    """

    model: nn.Module
    passes: tuple[PassPlan, ...]
    seed: int | None = None
    init: Callable[[nn.Module], object] | None = None

    def __str__(self) -> str:
        return "\n\n".join(p._render("simple") for p in self.passes)

    def __repr__(self) -> str:
        return f"<Plan for {type(self.model).__name__}: {'; '.join(map(str, self.passes))}>"

    def _repr_html_(self) -> str:
        return "".join(
            f"<details><summary>{escape(printable(str(each)))}</summary>"
            f"{''.join(f'<p>{escape(printable(note))}</p>' for note in each.sentences)}"
            f"{''.join(each._tables('html', one_line))}</details>"
            for each in self.passes
        )

    def to_markdown(self) -> str:
        """Return the plan as Markdown."""
        return "\n\n".join(p._render("github") for p in self.passes)

    def apply(self, *, inplace: bool = False) -> nn.Module:
        """Apply the plan.

        Args:
            inplace: change the caller's model instead of a copy, after a dry run on a fake copy.

        Returns:
            The rewritten model: the copy, or the caller's.

        Raises:
            RewriteError: the model is no longer the one that was planned for; it is unchanged.
        """
        steps = [p.edits for p in self.passes]
        if inplace:
            dry_run(self.model, steps)
        model = self.model if inplace else clone(self.model)
        generator = _generator(model, self.seed)
        for edits in steps:
            apply_edits(model, edits, generator=generator, init=self.init)
        records = tuple(p.record() for p in self.passes if p.edits)
        if records:
            record_history(model, history(self.model) + records)
        return model


def pocketize(
    model: nn.Module,
    width: int | None = None,
    *,
    inputs: Any = None,
    variants: Sequence[Mapping[str, Any]] = (),
    keep: str | Sequence[str] = (),
    weights: str = "slice",
    init: Callable[[nn.Module], object] | None = None,
    seed: int | None = None,
    inplace: bool = False,
    calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Clamp the widths of a network to that of its finest resolution (PocketNet).

    Args:
        model: any module; unchanged unless ``inplace``.
        width: the most channels a group may keep; ``None`` for the width of the features at the
            finest resolution, which the plan names.
        inputs: example inputs: a tensor, tuple, dict, or a text such as ``"1x1x96x96x96"``;
            ``None`` guesses from the first convolution.
        variants: as in :func:`rewrite`.
        keep: path patterns (``fnmatch``) of modules that keep their channels, or one.
        weights: ``"slice"`` keeps the strongest channels of a trained net, ``"reset"`` draws all
            weights anew as if the net had been built at this width.
        init: for ``"reset"``: called with the resized network to initialise it as its author did,
            ``lambda net: net.apply(init_fn)`` say. What it leaves alone, and everything without it,
            is drawn by the scheme that the values of ``model`` tell.
        seed: seed of what ``"reset"`` draws; ``None`` draws from torch's own generator.
        inplace: change ``model`` itself, once everything has succeeded.
        calibration: a few images without labels, so that a trained net works; see :func:`rewrite`.

    Returns:
        The rewritten model, of the same class and with the same keys.

    Raises:
        OptionError: an option is out of range.
        PatternError: a pattern in ``keep`` matches nothing.
        CaptureError: the model does not run on the inputs.
        InputError: the inputs cannot be read or guessed.
        RewriteError: the rewrite failed; ``model`` is unchanged.

    Source: Celaya et al., "PocketNet: A Smaller Neural Network for Medical Image Analysis",
    IEEE TMI 2022.
    """
    patterns = [keep] if isinstance(keep, str) else list(keep)
    pocket = get_pass("pocket").from_options({"width": width, "keep": patterns, "weights": weights})
    return rewrite(
        model,
        pocket,
        inputs=inputs,
        variants=variants,
        init=init,
        seed=seed,
        inplace=inplace,
        calibration=calibration,
    )


def rewrite(
    model: nn.Module,
    *args: Pass | str,
    passes: Sequence[Pass | str] = (),
    inputs: Any = None,
    variants: Sequence[Mapping[str, Any]] = (),
    init: Callable[[nn.Module], object] | None = None,
    seed: int | None = None,
    inplace: bool = False,
    strict: bool = False,
    calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Apply passes to a model, one after the other.

    Args:
        model: any module; unchanged unless ``inplace``.
        args: passes, or texts such as ``"pocket"`` or ``"pocket:width=16"``.
        passes: the same as a keyword, for configuration files, which cannot say ``*args``.
        inputs: example inputs; ``None`` guesses from the first convolution.
        variants: other settings of the model's attributes that the result is to work in too, such
            as ``[{"decoder.deep_supervision": True}, {"decoder.deep_supervision": False}]``. The
            model is recorded as it is and in each of these; what any of them couples moves
            together. Attributes of ``model`` are not touched.
        init: for passes with ``weights="reset"``, as in :func:`pocketize`: called with the network,
            or with each new module, in the end.
        seed: seed of whatever is drawn at random.
        inplace: change ``model`` itself, once everything has succeeded.
        strict: raise where a pass changes nothing, instead of warning.
        calibration: a few images without labels: channels that stay are chosen on them, and layers
            solved, see :func:`~pocketize.calibrate`, so that the rewritten model computes what
            ``model`` does; or :class:`~pocketize.Calibration`, with options. Ignored, with a
            warning, where all passes are exact.

    Returns:
        The rewritten model.

    Raises:
        InputError: there are no images to calibrate on, or they do not suit the model.
        OptionError: ``init`` is given, and no pass has ``weights="reset"``; ``calibration`` is
            given, and a pass has, or ``inplace``; passes are given both ways; or a variant names an
            attribute that is not there.
        OrderError: the passes exclude each other or need another order.
        RewriteError: a rewrite failed, or changed nothing under ``strict``; ``model`` is unchanged.
    """
    planned = plan(
        model, *args, passes=passes, inputs=inputs, variants=variants, init=init, seed=seed
    )
    if calibration is not None:
        check_passes([p.rewrite for p in planned.passes], inplace=inplace)
    for p in planned.passes:
        if not p.edits:
            text = f"{p.name} changed nothing in {type(model).__name__}"
            reasons = {r.why for r in p.refused}
            if reasons:
                text += f"; reasons given: {'; '.join(sorted(reasons)[:3])}"
            if strict:
                raise RewriteError(text)
            warnings.warn(text, NoEffectWarning, stacklevel=_outside())
    if calibration is None or not needs_calibration(planned):
        if calibration is not None:
            text = "nothing was calibrated: the passes keep what the network computes"
            warnings.warn(text, NoEffectWarning, stacklevel=_outside())
        return planned.apply(inplace=inplace)
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration, seed=seed or 0)
    return apply_calibrated(planned, settle_inputs(model, inputs), calibration).model


def plan(
    model: nn.Module,
    *args: Pass | str,
    passes: Sequence[Pass | str] = (),
    inputs: Any = None,
    variants: Sequence[Mapping[str, Any]] = (),
    init: Callable[[nn.Module], object] | None = None,
    seed: int | None = None,
) -> Plan:
    """Find out what passes would do, and change nothing.

    Args:
        model: any module; unchanged.
        args: passes, or texts such as ``"pocket:width=16"``.
        passes: the same as a keyword, as in :func:`rewrite`.
        inputs: example inputs; ``None`` guesses.
        variants: other settings of the model's attributes, as in :func:`rewrite`.
        init: initialisation for :meth:`Plan.apply`, as in :func:`rewrite`.
        seed: seed for :meth:`Plan.apply`.

    Raises:
        OptionError: ``init`` is given, and no pass has ``weights="reset"``; or passes are given
            both ways; or a variant names an attribute that is not there.
        OrderError: the passes exclude each other or need another order.
        RewriteError: no pass was given, or a rewrite would fail.
    """
    made = passes_given(args, passes)
    if init is not None and not any(p.options().get("weights") == "reset" for p in made):
        raise OptionError(
            "init= initialises weights that a pass draws anew; give a pass weights='reset'"
        )
    check_order(made)
    settled = settle_inputs(model, inputs)
    calls = read_variants(model, settled, variants)
    plans: list[PassPlan] = []
    current = model
    queue = list(made)
    repeated = False
    while queue:
        given = queue.pop(0)
        with suggest_sizes(model, settled), _own_randomness(current, seed) as generator:
            proposal = settle_proposal(current, given, settled, generator, calls)
        if proposal.edits or not repeated:
            told = tuple(call.settings for call in calls)
            plans.append(PassPlan(**vars(proposal), rewrite=given, variants=told))
            for text in proposal.warnings:
                warnings.warn(f"{given.name}: {text}", UnreadWarning, stacklevel=_outside())
        repeated = bool(proposal.again and proposal.edits)
        if repeated:
            queue.insert(0, proposal.again if isinstance(proposal.again, Pass) else given)
        if proposal.edits and queue:
            current = clone(current)
            with _own_randomness(current, seed) as generator:
                apply_edits(current, proposal.edits, generator=generator, init=init)
    return Plan(model, tuple(plans), seed, init)


def _generator(model: nn.Module, seed: int | None) -> torch.Generator | None:
    if seed is None:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def _own_randomness(model: nn.Module, seed: int | None) -> Iterator[torch.Generator | None]:
    """Yield a generator for planning; the caller's random state does not advance."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield _generator(model, seed)


def _outside() -> int:
    """Return the stack level of the caller's own code, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pocketize."):
        frame, level = frame.f_back, level + 1
    return level
