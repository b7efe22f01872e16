"""Running statistics of norms, which one forward brings up to date once, however many tiles it has.

On the copy that is recorded the norms of torch track nothing, so that what is recorded is the
operator on the statistics of the batch alone. Those are gathered over all tiles like any norm's,
and when the forward is done they are added to the running ones as torch would do it.
"""

from __future__ import annotations

__all__ = ["stop_tracking", "tracking_norms", "update_running", "updates_of"]

from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from pocketize._torch import BatchNorm, NormBase
from pocketize.ops.schema import operator_name
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.network import TiledGraph, TilingError
from pocketize.passes.tiling.statistics import Moments

#: Norms, and the operators that take the statistics.
Updates: TypeAlias = list[tuple[NormBase, fx.Node]]

_FORWARDS = (nn.BatchNorm1d.forward, nn.InstanceNorm1d.forward)
_NORMS = ("batch_norm", "instance_norm")


def tracking_norms(model: nn.Module) -> dict[str, NormBase]:
    """Return the norms that would update running statistics in a forward, by path.

    Raises:
        TilingError: one has a forward of its own, which may do something else.
    """
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, NormBase) or not module.training or module.running_mean is None:
            continue
        if "forward" in vars(module) or type(module).forward not in _FORWARDS:
            raise TilingError(
                f"{path or 'the model'} ({type(module).__name__}) is in training mode and updates "
                "its running statistics in a forward that is not torch's, which training by tiles "
                "cannot do for it; put it into evaluation mode, or train the volume whole "
                "(train=False)"
            )
        found[path] = module
    return found


def stop_tracking(copy: nn.Module) -> None:
    """Let the norms of a copy take the statistics of the batch and update nothing.

    Raises:
        TilingError: as :func:`tracking_norms`.
    """
    for module in tracking_norms(copy).values():
        module.running_mean = module.running_var = module.num_batches_tracked = None
        module.track_running_stats = False


def updates_of(graph: TiledGraph, model: nn.Module) -> Updates:
    """Return which norms an execution updates, in order; one that is called twice is there twice.

    Args:
        graph: of the model, in the modes in which it is.
        model: whose norms they are.

    Raises:
        TilingError: nothing that is returned depends on one, so that it is not computed.
    """
    norms = {id(module) for module in tracking_norms(model).values()}
    found: Updates = []
    for node in graph.captured.operators():
        if operator_name(node.target).rpartition(".")[2] not in _NORMS:
            continue
        module = model.get_submodule(node.meta["module"] or "")
        if id(module) not in norms or not isinstance(module, NormBase):
            continue
        if not isinstance(graph.gathered.get(node), Moments):
            raise TilingError(
                f"{node.meta['module']} updates its running statistics and nothing that is "
                "returned depends on it, so that training by tiles does not compute it; put it "
                "into evaluation mode, or train the volume whole (train=False)"
            )
        found.append((module, node))
    return found


def update_running(execution: Execution, updates: Updates) -> None:
    """Add the statistics of a forward that has run, with ``retain``, to the running ones."""
    with torch.no_grad():
        for module, node in updates:
            _update(module, *_statistics(execution, node))


def _statistics(execution: Execution, node: fx.Node) -> tuple[Tensor, int]:
    """Return mean and biased variance, (2, channels), and of how many values they are."""
    moments = execution.graph.gathered[node]
    assert isinstance(moments, Moments)
    made = execution.norms.get(node)
    if made is None:  # it ran whole
        made = moments.finish(moments.measure(execution.value(moments.source)))
    return made.mean(1), moments.count


def _update(module: NormBase, statistics: Tensor, count: int) -> None:
    assert module.running_mean is not None
    assert module.running_var is not None
    factor: float | Tensor = 0.0 if module.momentum is None else module.momentum
    if isinstance(module, BatchNorm) and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            factor = 1.0 / module.num_batches_tracked.double()
    mean, variance = statistics[0], statistics[1] * (count / max(1, count - 1))
    for running, new in ((module.running_mean, mean), (module.running_var, variance)):
        running.add_(((new.to(running.dtype) - running) * factor).to(running.dtype))
