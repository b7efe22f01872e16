"""Records of layers with weights: convolutions, products of matrices, norms, attention."""

from __future__ import annotations

__all__ = ["numbers"]

from collections.abc import Mapping
from functools import partial
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


_convolutions = partial(define, weight="weight", keeps="input", heavy=True, window=_convolution)
_products = partial(define, keeps="input", heavy=True, window=None)
_norms = partial(
    define, data="input", weight="", keeps="input statistics", heavy=False, window=None
)

_convolutions(Kind.CONVOLUTION, "conv1d conv2d conv3d convolution _convolution", data="input")
_convolutions(
    Kind.TRANSPOSED_CONVOLUTION, "conv_transpose1d conv_transpose2d conv_transpose3d", data="input"
)
# What the convolutions run below autograd, on some devices.
_convolutions(Kind.CONVOLUTION, "cudnn_convolution mkldnn_convolution", data="self")
_convolutions(Kind.TRANSPOSED_CONVOLUTION, "cudnn_convolution_transpose", data="self")
_products(Kind.LINEAR, "linear", data="input", weight="weight")
_products(Kind.PRODUCT, "mm bmm", data="self", weight="mat2")
_products(Kind.PRODUCT, "matmul", data="self", weight="other")
_products(Kind.PRODUCT, "addmm", data="mat1", weight="mat2")
_products(Kind.PRODUCT, "baddbmm", data="batch1", weight="batch2")
_products(Kind.PRODUCT, "mv", data="self", weight="")
_products(Kind.PRODUCT, "addbmm addmv dot einsum vdot", data="", weight="", heavy=False)
define(
    Kind.ATTENTION,
    "scaled_dot_product_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable",
    data="query",
    weight="",
    keeps="input output statistics",
    heavy=True,
    window=None,
)
_norms(
    Kind.CHANNEL_NORM,
    "batch_norm instance_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm",
)
_norms(Kind.GROUP_NORM, "group_norm native_group_norm")
_norms(Kind.LAYER_NORM, "layer_norm native_layer_norm")
_norms(Kind.RMS_NORM, "rms_norm")
define(
    Kind.RECURRENT,
    "_cudnn_rnn _thnn_fused_lstm_cell gru lstm mkldnn_rnn_layer",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=True,
    window=None,
)
# Computations with weights that are nobody else's kind.
define(
    UNKNOWN,
    "_weight_norm _weight_norm_interface embedding",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=False,
    window=None,
)
define(
    UNKNOWN,
    *(f"fft_{kind}fft{n}" for kind in ("", "i", "r", "ir") for n in ("", "2", "n")),
    "_cdist_forward _fft_c2c _fft_c2r _fft_r2c fft_hfft fft_ihfft",
    data="",
    weight="",
    keeps=UNKNOWN,
    heavy=True,
    window=UNKNOWN,
)
