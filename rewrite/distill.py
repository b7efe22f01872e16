"""Distillation: a smaller network learns what the network it was made of computes.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (temperature);
Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (features through an adapter).
"""

from __future__ import annotations

__all__ = ["Distillation", "distillation_loss", "feature_layers"]

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.channels.analysis import analyse
from pocketize.channels.levels import find_levels
from pocketize.errors import InputError, OptionError, PatternError, nearest
from pocketize.graph.inputs import as_inputs, find_tensors, to_model

_CONVS: dict[int, type[nn.Module]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def distillation_loss(student: Any, teacher: Any, temperature: float = 2.0) -> Tensor:
    """Return how far the student's class probabilities are from the teacher's.

    Args:
        student: logits ``(N, classes, *spatial)``, or any nest of them, as of deep supervision. A
            single class is that of a sigmoid. Tensors of integers, such as labels, do not count.
        teacher: the same of the teacher.
        temperature: T, by which logits are divided.

    Returns:
        ``T^2 KL(teacher || student)``, in float32: the mean over batch and positions, and over the
        nest. A scalar.

    Raises:
        InputError: shapes differ, or there are no logits.
        OptionError: the temperature is not positive.
    """
    _check_positive(temperature=temperature)
    found, wanted = (
        [each for each in find_tensors(side) if each.is_floating_point()]
        for side in (student, teacher)
    )
    shapes = [[tuple(each.shape) for each in side] for side in (found, wanted)]
    if not found or shapes[0] != shapes[1] or any(len(shape) < 2 for shape in shapes[0]):
        raise InputError(
            f"distillation needs logits (N, classes, ...) of the same shapes, got {shapes[0]} of "
            f"the student and {shapes[1]} of the teacher, which runs in evaluation mode"
        )
    losses = []
    for ours, theirs in zip(found, wanted, strict=True):
        pair = [(each.float() / temperature).movedim(1, -1) for each in (ours, theirs.detach())]
        if ours.shape[1] == 1:  # the other class has the logit 0
            pair = [torch.cat([each, torch.zeros_like(each)], -1) for each in pair]
        logs = [each.log_softmax(-1).flatten(0, -2) for each in pair]
        losses.append(F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True))
    return temperature**2 * torch.stack(losses).mean()


def feature_layers(model: nn.Module, inputs: Any = None) -> tuple[str, ...]:
    """Return the last layer at each resolution of a network, finest first, without its last layer.

    Args:
        model: the teacher.
        inputs: example inputs, as for :func:`~pocketize.rewrite`.
    """
    channels = analyse(model, inputs)
    levels = find_levels(channels)
    layers = {path for level in levels for path in level.layers}
    order = [site.module for site in channels.producers if site.module in layers]
    head = order[-1] if order else ""
    chosen = [[path for path in level.layers if path != head] for level in levels]
    return tuple(max(paths, key=order.index) for paths in chosen if paths)


class Distillation(nn.Module):
    """Runs student and teacher on the same inputs, and says how far they are apart.

    Its parameters are the adapters of features: give them to the optimizer. Neither network is a
    submodule; both must be where the inputs are.

    Args:
        teacher: the network as it was; it runs in evaluation mode, without gradients.
        student: what :func:`~pocketize.rewrite` made of it, or any network with the same outputs.
        inputs: example inputs, needed for ``features`` only: they tell the widths.
        temperature: see :func:`distillation_loss`.
        features: paths of layers, in both networks, whose outputs ``(N, channels, *spatial)`` are
            matched, through a 1x1 convolution where widths differ; such as what
            :func:`feature_layers` returns.
        feature_weight: of their loss, the mean square of the difference over the variance of the
            teacher's features.

    Raises:
        InputError: features are given without inputs, or their shapes do not match.
        OptionError: the temperature or the weight is not positive, or ``features`` is one text.
        PatternError: a network has no such layer.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        inputs: Any = None,
        *,
        temperature: float = 2.0,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check_positive(temperature=temperature, feature_weight=feature_weight)
        if isinstance(features, str):
            raise OptionError(f"features must be paths of layers, such as ({features!r},)")
        self.temperature, self.feature_weight = temperature, feature_weight
        self.features = tuple(features)
        self._networks = (teacher, student)  # a tuple: no submodules
        self.adapters = nn.ModuleList()
        if features:
            if inputs is None:
                raise InputError("distillation of features needs example inputs: inputs=...")
            self.adapters = nn.ModuleList(self._adapters(inputs))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run both networks.

        Args:
            args: what the networks take.
            kwargs: the same.

        Returns:
            The student's outputs, and the loss of the distillation, a scalar: add it to your own.
        """
        teacher, student = self._networks
        with _evaluated(teacher), torch.no_grad(), _seen(teacher, self.features) as wanted:
            targets = teacher(*args, **kwargs)
        with _seen(student, self.features) as found:
            outputs = student(*args, **kwargs)
        loss = distillation_loss(outputs, targets, self.temperature)
        for path, adapter in zip(self.features, self.adapters, strict=True):
            ours, theirs = _feature(found, path).float(), _feature(wanted, path).float()
            variance = theirs.var().clamp(min=torch.finfo(torch.float32).tiny)
            loss = loss + self.feature_weight * F.mse_loss(adapter(ours), theirs) / variance
        return outputs, loss

    def _adapters(self, inputs: Any) -> Iterator[nn.Module]:
        shapes = []
        for network in self._networks:
            given = to_model(as_inputs(inputs, network), network)
            with _evaluated(network), torch.no_grad(), _seen(network, self.features) as seen:
                given.call(network)
            shapes.append([_feature(seen, path) for path in self.features])
        for path, theirs, ours in zip(self.features, *shapes, strict=True):
            if theirs.shape[2:] != ours.shape[2:] or theirs.dim() not in _CONVS:
                raise InputError(
                    f"features of {path} are {tuple(theirs.shape)} in the teacher and "
                    f"{tuple(ours.shape)} in the student; only channels, axis 1, may differ"
                )
            if theirs.shape[1] == ours.shape[1]:
                yield nn.Identity()
                continue
            kernel = () if theirs.dim() == 2 else (1,)
            kind: Any = _CONVS[theirs.dim()]
            made = kind(ours.shape[1], theirs.shape[1], *kernel, device=ours.device)
            yield made.float()  # as features are compared


def _check_positive(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise OptionError(f"distillation: {name} must be a positive number, got {value!r}")


def _feature(seen: Mapping[str, Any], path: str) -> Tensor:
    if not isinstance(seen.get(path), Tensor):
        raise InputError(
            f"distillation: the forward does not call {path}, or it returns no tensor; in a "
            "compiled network layers are not called one by one"
        )
    feature: Tensor = seen[path]
    return feature


@contextlib.contextmanager
def _seen(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Hold what layers return within; the last of several calls."""
    seen: dict[str, Any] = {}

    def see(path: str, _: nn.Module, __: Any, output: Any) -> None:
        seen[path] = output

    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                layer = network.get_submodule(path)
            except AttributeError:
                known = [name for name, _ in network.named_modules()]
                raise PatternError(
                    f"distillation: {type(network).__name__} has no layer {path!r}."
                    f"{nearest(path, known)}"
                ) from None
            hook = layer.register_forward_hook(functools.partial(see, path))
            stack.callback(hook.remove)
        yield seen


@contextlib.contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
