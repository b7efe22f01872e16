"""Records of operators that move, cut and join tensors, or reduce their axes."""

from __future__ import annotations

__all__: list[str] = []

from functools import partial

from pocketize.ops.record import UNKNOWN, Kind, define

_define = partial(define, weight="", heavy=False, window=None)
_moves = partial(_define, data="self", keeps="")

_moves(
    Kind.RESHAPE,
    "_reshape_alias _unsafe_view atleast_3d flatten ravel reshape reshape_as squeeze unflatten "
    "unsqueeze view view_as",
)
_moves(
    Kind.PERMUTATION, "matrix_H moveaxis movedim mT numpy_T permute swapaxes swapdims t transpose"
)
_moves(Kind.EXPANSION, "broadcast_to", "expand", "expand_as")
_moves(Kind.REPETITION, "repeat", "tile")
_moves(UNKNOWN, "fft_fftshift fft_ifftshift im2col repeat_interleave view_as_complex view_as_real")
_moves(Kind.ROTATION, "flip", "roll")
_moves(Kind.SHUFFLE, "channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle")
_moves(
    Kind.SPLIT,
    "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes",
)
_moves(Kind.SLICE, "narrow", "slice")
_moves(Kind.SELECTION, "select", "unbind")
_define(Kind.CONCATENATION, "cat", "concat", "concatenate", data="tensors", keeps="")
_define(Kind.STACK, "stack", data="tensors", keeps="")
_define(Kind.INDEXING, "index", "index_select", data="self", keeps=UNKNOWN)
_define(
    Kind.REDUCTION,
    "all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max "
    "mean median min nanmedian nansum norm prod std std_mean sum var var_mean",
    data="self",
    keeps=UNKNOWN,
)
_define(Kind.SORTING, "argsort", "kthvalue", "mode", data="self", keeps=UNKNOWN)
define(Kind.SORTING, "sort", "topk", data="self", weight="", keeps=UNKNOWN, heavy=True, window=None)
