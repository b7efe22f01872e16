"""The networks of the papers that pocketize grew from, in plain PyTorch, to be read beside them.

::

    from pocketize import zoo
    zoo.list_models("*3d*")                                 # fnmatch; no pattern lists them all
    model = zoo.build("pocketnet_unet3d", pocket=True)      # freshly initialised, in train mode
    x = zoo.example_input("pocketnet_unet3d", small=True)   # a random batch of one that fits it
    zoo.describe("pocketnet_unet3d").parameters             # the paper's count; options, shapes

There is a file per paper:

=================  ============================================================================
`pocketnet`        ``pocketnet_{unet,resnet,densenet}3d`` (NFBS, BraTS), ``..2d`` (LiTS) and
                   ``pocketnet_encoder2d`` (COVIDx8B); each full, or with ``pocket=True``
`patchwise`        ``patchwise_unet3d``, for volumes, slabs of them and cascades
`complexity`       ``complexity_{unet,ucunet,cumedvision}2d``, each with ``widths=``
`memory_fcn`       ``memory_fcn3d`` and its variants ``_bottleneck``, ``_separable``, ``_compact``
=================  ============================================================================

All of them return logits and take any spatial size that survives their poolings. All take
`in_channels`; what else, `describe` says, and the constructor's docstring explains. On the command
line ``zoo:NAME`` stands for a network and ``--kwargs`` for its options.

Errors are `ZooError` (a ValueError): `UnknownModelError` or `ModelOptionError`.
"""

from __future__ import annotations

__all__ = [
    "ModelInfo",
    "ModelOptionError",
    "UnknownModelError",
    "ZooError",
    "build",
    "describe",
    "example_input",
    "list_models",
    "register",
]

from pocketize.zoo import complexity, memory_fcn, patchwise, pocketnet  # noqa: F401  (importing registers)
from pocketize.zoo.registry import (
    ModelInfo,
    ModelOptionError,
    UnknownModelError,
    ZooError,
    build,
    describe,
    example_input,
    list_models,
    register,
)
