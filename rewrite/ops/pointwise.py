"""Records of operators that treat all entries alike: activations, dropout, copies, factories."""

from __future__ import annotations

__all__: list[str] = []

from functools import partial

from pocketize.ops.record import UNKNOWN, Kind, define

_define = partial(define, weight="", heavy=False, window=None)

# -- activations: element by element, of one tensor ------------------------------------------

_define(Kind.ACTIVATION, "relu", "sigmoid", "tanh", data="self", keeps="output")
_define(
    Kind.ACTIVATION,
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid mish relu6 "
    "rrelu rrelu_with_noise selu silu softplus softshrink threshold",
    data="self",
    keeps="input",
)
_define(Kind.PRELU, "prelu", data="self", keeps="input")
_define(UNKNOWN, "_prelu_kernel", data="self", keeps="input")
_define(Kind.SOFTMAX, "softmax _softmax log_softmax _log_softmax", data="self", keeps="output")
_define(Kind.SCAN, "cumsum", data="self", keeps="")
_define(Kind.SCAN, "cumprod", "logcumsumexp", data="self", keeps="input output")
_define(Kind.GATE, "glu", data="self", keeps="input")
_define(
    Kind.DROPOUT,
    "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout",
    data="input",
    keeps="mask",
)

# -- element by element, of several tensors (torch tags others as such, which need no record) -

_define(Kind.POINTWISE, "mul", "multiply", "square", data="", keeps="input")
_define(
    Kind.POINTWISE,
    "__and__ __or__ absolute addcdiv addcmul arccos arcsin arctan bernoulli complex conj div "
    "divide fake_quantize_per_tensor_affine fix floor_divide greater greater_equal imag lerp "
    "less less_equal masked_fill nan_to_num negative not_equal polar real rsub special_erf "
    "special_exp2 special_expit special_log1p subtract true_divide where",
    data="",
    keeps=UNKNOWN,
)
_define(Kind.ASSIGNMENT, "copy", "fill", "zero", data="self", keeps="")
_define(UNKNOWN, "broadcast_tensors", data="", keeps="")
_define(Kind.LOSS, "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", data="", keeps="input")

# -- the same numbers, or numbers of nobody's ------------------------------------------------

_define(
    Kind.COPY,
    "alias clone contiguous detach lift_fresh lift_fresh_copy to _to_copy type_as",
    data="self",
    keeps="",
)
_define(
    Kind.LIKE,
    "empty_like full_like ones_like rand_like randn_like zeros_like",
    data="self",
    keeps="",
)
_define(
    Kind.FACTORY,
    "arange empty eye full linspace new_empty new_full new_ones new_zeros ones rand randn "
    "scalar_tensor zeros",
    data="",
    keeps="",
)
_define(Kind.STORAGE, "resize", "set", data="self", keeps=UNKNOWN)
_define(
    Kind.SCALAR,
    "_assert_async _assert_tensor_metadata _has_compatible_shallow_copy_type is_nonzero item "
    "_local_scalar_dense set_data sym_size",
    data="",
    keeps="",
)
