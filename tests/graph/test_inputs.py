from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs, as_inputs, guess_inputs, to_model
from pocketize.memory import measure


class Keywords(nn.Module):
    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return image * scale


class OneArgument(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch


# -- forms ---------------------------------------------------------------------------------------


def test_a_tensor_is_one_positional_argument() -> None:
    x = torch.rand(2, 3)
    made = as_inputs(x)
    assert made.args[0] is x
    assert made.kwargs == {}


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_sequence_holds_the_positional_arguments(kind: type) -> None:
    x, y = torch.rand(2), torch.rand(3)
    made = as_inputs(kind([x, [y, 7], None]))
    assert made.args[0] is x
    assert made.args[1][0] is y
    assert made.args[1][1] == 7
    assert made.args[2] is None
    assert [id(t) for t in made.tensors()] == [id(x), id(y)]


def test_inputs_are_taken_as_they_are() -> None:
    made = Inputs((torch.rand(1),), {"scale": 2.0})
    assert as_inputs(made) is made


def test_a_dict_whose_keys_are_parameters_is_keyword_arguments() -> None:
    x = torch.rand(2)
    made = as_inputs({"image": x, "scale": 3.0}, Keywords())
    assert made.args == ()
    assert made.kwargs["image"] is x
    assert torch.equal(made.call(Keywords()), 3 * x)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ({"image": torch.ones(1), "unknown": 1}, Keywords()),
        ({"scale": torch.ones(1)}, Keywords()),  # the required argument is missing
        ({1: torch.ones(1)}, Keywords()),
        ({"image": torch.ones(1)}, OneArgument()),
        ({"image": torch.ones(1)}, None),
        (OrderedDict(image=torch.ones(1)), None),
    ],
    ids=["unknown key", "missing key", "no text", "other names", "no model", "ordered"],
)
def test_any_other_dict_is_one_positional_argument(given: Any, model: nn.Module | None) -> None:
    made = as_inputs(given, model)
    assert made.kwargs == {}
    assert made.args == (dict(given),)


def test_a_dict_fits_any_forward_that_takes_any_keyword() -> None:
    class Anything(nn.Module):
        def forward(self, **tensors: Tensor) -> Tensor:
            return tensors["a"]

    assert as_inputs({"a": torch.ones(1)}, Anything()).kwargs.keys() == {"a"}


@pytest.mark.parametrize(
    ("text", "shapes", "dtypes"),
    [
        ("1x1x64x64x64", [(1, 1, 64, 64, 64)], [torch.float32]),
        ("5", [(5,)], [torch.float32]),
        ("1x1x8x8, 1x3", [(1, 1, 8, 8), (1, 3)], [torch.float32, torch.float32]),
        ("1x3x8x8,1x7:int64", [(1, 3, 8, 8), (1, 7)], [torch.float32, torch.int64]),
        ("2x3:float64,2:bool", [(2, 3), (2,)], [torch.float64, torch.bool]),
        ("2:complex64,2:bfloat16", [(2,), (2,)], [torch.complex64, torch.bfloat16]),
    ],
)
def test_a_text_gives_tensors_of_these_shapes(
    text: str, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]
) -> None:
    tensors = as_inputs(text).tensors()
    assert [tuple(t.shape) for t in tensors] == shapes
    assert [t.dtype for t in tensors] == dtypes
    assert all(t.dtype in (torch.bool, torch.int64) or t.abs().sum() > 0 for t in tensors)


class Segment(nn.Module):
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return image * mask


def test_inputs_of_a_text_may_have_names() -> None:
    made = as_inputs("image=1x1x8x8,mask=1x1x8x8:int64", Segment())
    assert (made.args, list(made.kwargs)) == ((), ["image", "mask"])
    assert made.kwargs["mask"].dtype is torch.int64
    made = as_inputs("1x1x8x8, mask = 1x1x8x8", Segment())
    assert (len(made.args), list(made.kwargs)) == (1, ["mask"])
    (batch,) = as_inputs("image=1x1x8x8,label=1x3", nn.Identity()).args  # forward takes one dict
    assert list(batch) == ["image", "label"]
    with pytest.raises(InputError, match=r"which takes image, mask\. Did you mean 'mask'\?"):
        as_inputs("image=1x1x8x8,msk=1x1x8x8", Segment())
    with pytest.raises(InputError, match="forward of Segment, which takes image, mask"):
        as_inputs("image=1x1x8x8", Segment())
    with pytest.raises(InputError, match="names an input twice"):
        as_inputs("mask=1x1,mask=1x1", Segment())


@pytest.mark.parametrize("given", [(1, 1, 8, 8), [1, 1, 8, 8], torch.Size((1, 1, 8, 8))])
def test_a_shape_is_an_input(given: Any) -> None:
    (tensor,) = as_inputs(given).args
    assert torch.equal(tensor, as_inputs("1x1x8x8").args[0])


def test_an_input_without_values_gets_some_where_the_model_needs_them() -> None:
    given = as_inputs(torch.empty(1, 1, 8, device="meta"))
    assert to_model(given, nn.Linear(8, 2)).args[0].device.type == "cpu"
    assert to_model(given, nn.Linear(8, 2, device="meta")).args[0].is_meta
    assert measure(nn.Linear(8, 2), given.args[0], isolate=False).peak > 0


def test_tensors_from_text_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = as_inputs("2x3x4").args[0], as_inputs("2x3x4").args[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1x1xN", r"cannot read input shape '1x1xN' in '1x1xN'.*'1x1x96x96x96'"),
        ("1x3x8x8,", r"cannot read input shape '' in '1x3x8x8,'"),
        ("", r"cannot read input shape ''"),
        ("1×3×8", r"cannot read input shape"),
        ("-1x3", r"cannot read input shape '-1x3'"),
        ("1x3:int65", r"unknown dtype 'int65' in '1x3:int65'; try float32 or int64"),
        ("1x3:tensor", r"unknown dtype 'tensor'"),
        ("1x0x8", r"input shape '1x0x8' has an empty axis; every size must be at least 1"),
    ],
)
def test_a_text_that_cannot_be_read_says_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        as_inputs(text)


@pytest.mark.parametrize("given", [3, 2.5, object(), {1, 2}])
def test_a_type_that_is_no_input_is_named(given: Any) -> None:
    with pytest.raises(
        InputError, match=f"tensor, a tuple, a dict, a shape or a text.*{type(given).__name__}"
    ):
        as_inputs(given)


@pytest.mark.parametrize("given", [(), [], {}, (3, "x"), {"a": None}])
def test_inputs_without_a_tensor_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="hold no tensor"):
        as_inputs(given)


# -- what inputs can do --------------------------------------------------------------------------


def test_map_reaches_every_tensor_and_keeps_the_containers() -> None:
    given = Inputs((torch.ones(2), [torch.ones(3), "x"]), {"k": {"deep": (torch.ones(1), 4)}})
    mapped = given.map(lambda t: t * 2)
    assert [float(t[0]) for t in mapped.tensors()] == [2.0, 2.0, 2.0]
    assert mapped.args[1][1] == "x"
    assert isinstance(mapped.kwargs["k"]["deep"], tuple)
    assert [float(t[0]) for t in given.tensors()] == [1.0, 1.0, 1.0]


def test_describe_says_shapes_and_dtypes() -> None:
    given = Inputs((torch.ones(2, 3),), {"n": torch.tensor(3), "mask": torch.ones(4).bool()})
    assert given.describe() == "2x3 float32, n=scalar int64, mask=4 bool"


def test_inputs_take_the_floating_dtype_of_the_model_and_others_stay() -> None:
    model = nn.Linear(3, 3).double()
    given = as_inputs((torch.ones(2, 3), torch.ones(2).long(), torch.ones(1, dtype=torch.cfloat)))
    moved = to_model(given, model)
    assert [t.dtype for t in moved.tensors()] == [torch.float64, torch.int64, torch.complex64]


def test_inputs_go_to_the_device_of_the_model() -> None:
    moved = to_model(
        as_inputs((torch.ones(2, 3), torch.ones(2).long())), nn.Linear(3, 3).to("meta")
    )
    assert [t.device.type for t in moved.tensors()] == ["meta", "meta"]


def test_a_buffer_decides_where_there_is_no_parameter_and_nothing_where_there_is_neither() -> None:
    model = nn.BatchNorm2d(3, affine=False).half()
    assert to_model(as_inputs(torch.ones(1)), model).args[0].dtype == torch.float16
    given = as_inputs(torch.ones(1).double())
    assert to_model(given, nn.ReLU()) is given


# -- guesses -------------------------------------------------------------------------------------


def shapes_of(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(guess.tensors()[0].shape) for guess in guess_inputs(model)]


@pytest.mark.slow
@pytest.mark.parametrize(("conv", "rank"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_rank_and_channels_come_from_the_first_convolution(conv: Any, rank: int) -> None:
    model = nn.Sequential(
        nn.Linear(9, 9), nn.ConvTranspose2d(7, 7, 2), conv(5, 8, 3), conv(8, 2, 1)
    )
    assert shapes_of(model)[0] == (2, 5, *[32] * rank)


def test_guesses_have_batch_two_and_grow() -> None:
    model = nn.Conv2d(3, 8, 3)
    assert shapes_of(model) == [(2, 3, n, n) for n in (32, 64, 96, 128, 224, 256)]


def test_a_model_without_convolutions_is_guessed_from_its_first_linear_layer() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(7, 4), nn.Linear(4, 2))
    assert shapes_of(model) == [(2, 7), (2, 16, 7)]


def test_a_model_with_neither_is_told_so() -> None:
    with pytest.raises(InputError, match=r"Embedding.*no convolution and no linear.*inputs=\.\.\."):
        list(guess_inputs(nn.Embedding(3, 4)))


def test_several_required_arguments_are_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image: Tensor, time: Tensor, scale: float = 1.0, *more: Tensor) -> Tensor:
            return self.conv(image) * time

    with pytest.raises(InputError, match=r"Two: forward needs 2 arguments \(image, time\)"):
        list(guess_inputs(Two()))


def test_optional_arguments_are_left_to_the_model() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(
            self, image: Tensor, mask: Tensor | None = None, *args: Any, **kw: Any
        ) -> Tensor:
            return self.conv(image)

    guess = next(guess_inputs(Optional()))
    assert len(guess.args) == 1
    assert guess.kwargs == {}
