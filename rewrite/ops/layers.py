"""Records of layers with weights: convolutions, products of matrices, norms, attention."""

from __future__ import annotations

__all__ = ["numbers"]

from collections.abc import Mapping
from typing import Any

from pocketize.ops.record import UNKNOWN, Kind, Window, define


def numbers(given: Any, rank: int) -> tuple[int, ...]:
    """Return one number for each spatial axis, where one may stand for all."""
    many = [int(n) for n in given] if isinstance(given, list | tuple) else [int(given)]
    return tuple(many * rank if len(many) == 1 else many)


def _convolution(bound: Mapping[str, Any], rank: int) -> Window:
    weight = bound["weight"]
    shape = weight.shape if hasattr(weight, "shape") else weight.meta["val"].shape
    kernel = tuple(shape[2:])
    stride, dilation = numbers(bound["stride"], rank), numbers(bound["dilation"], rank)
    padding = bound["padding"]
    if padding == "same":  # with an odd sum, torch pads more behind
        around = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        around = numbers(0 if padding == "valid" else padding, rank)
    return Window(kernel, stride, around, dilation)


define(
    Kind.CONVOLUTION,
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "_convolution",
    data="input",
    weight="weight",
    keeps="input",
    heavy=True,
    window=_convolution,
)
define(
    Kind.TRANSPOSED_CONVOLUTION,
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    data="input",
    weight="weight",
    keeps="input",
    heavy=True,
    window=_convolution,
)
# What the convolutions run below autograd, on some devices.
define(
    Kind.CONVOLUTION,
    "cudnn_convolution",
    "mkldnn_convolution",
    data="self",
    weight="weight",
    keeps="input",
    heavy=True,
    window=_convolution,
)
define(
    Kind.TRANSPOSED_CONVOLUTION,
    "cudnn_convolution_transpose",
    data="self",
    weight="weight",
    keeps="input",
    heavy=True,
    window=_convolution,
)
define(
    Kind.LINEAR,
    "linear",
    data="input",
    weight="weight",
    keeps="input",
    heavy=True,
    window=None,
)
define(
    Kind.PRODUCT,
    "mm",
    "bmm",
    data="self",
    weight="mat2",
    keeps="input",
    heavy=True,
    window=None,
)
define(Kind.PRODUCT, "matmul", data="self", weight="other", keeps="input", heavy=True, window=None)
define(Kind.PRODUCT, "addmm", data="mat1", weight="mat2", keeps="input", heavy=True, window=None)
define(
    Kind.PRODUCT, "baddbmm", data="batch1", weight="batch2", keeps="input", heavy=True, window=None
)
define(Kind.PRODUCT, "mv", data="self", weight="", keeps="input", heavy=True, window=None)
define(
    Kind.PRODUCT,
    "addbmm",
    "addmv",
    "dot",
    "einsum",
    "vdot",
    data="",
    weight="",
    keeps="input",
    heavy=False,
    window=None,
)
define(
    Kind.ATTENTION,
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
    data="query",
    weight="",
    keeps="input output statistics",
    heavy=True,
    window=None,
)
define(
    Kind.CHANNEL_NORM,
    "batch_norm",
    "instance_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    data="input",
    weight="",
    keeps="input statistics",
    heavy=False,
    window=None,
)
define(
    Kind.GROUP_NORM,
    "group_norm",
    "native_group_norm",
    data="input",
    weight="",
    keeps="input statistics",
    heavy=False,
    window=None,
)
define(
    Kind.LAYER_NORM,
    "layer_norm",
    "native_layer_norm",
    data="input",
    weight="",
    keeps="input statistics",
    heavy=False,
    window=None,
)
define(
    Kind.RMS_NORM,
    "rms_norm",
    data="input",
    weight="",
    keeps="input statistics",
    heavy=False,
    window=None,
)
define(
    Kind.RECURRENT,
    "_cudnn_rnn",
    "_thnn_fused_lstm_cell",
    "gru",
    "lstm",
    "mkldnn_rnn_layer",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=True,
    window=None,
)
# Computations with weights that are nobody else's kind.
define(
    UNKNOWN,
    "_weight_norm",
    "_weight_norm_interface",
    "embedding",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=False,
    window=None,
)
define(
    UNKNOWN,
    "_cdist_forward",
    "_fft_c2c",
    "_fft_c2r",
    "_fft_r2c",
    *(f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n")),
    "fft_hfft",
    "fft_ihfft",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=True,
    window=UNKNOWN,
)
