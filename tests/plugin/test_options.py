from __future__ import annotations

from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketize.errors import OptionError
from pocketize.plugin.options import (
    UnsupportedAnnotation,
    attribute_sentences,
    check_value,
    describe_annotation,
    read_text,
    split_options,
    to_jsonable,
    write_text,
)

Precision = Literal["bf16", "fp16"]


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("16", int, 16),
        ("-3", int, -3),
        ("1e-3", float, 1e-3),
        ("2", float, 2.0),
        ("true", bool, True),
        ("Off", bool, False),
        ("none", type(None), None),
        ("None", Optional[int], None),  # noqa: UP045
        ("16", Union[int, None], 16),  # noqa: UP007
        ("none", str | None, None),
        ("16", str | int, 16),
        ("1", bool | int, 1),
        ("yes", bool | int, True),
        ("sixteen", str | int, "sixteen"),
        ("encoder", str, "encoder"),
        ('"none"', str | None, "none"),
        ('"a,b"', str, "a,b"),
        ("BF16", Precision, "bf16"),
        ("2", Literal[1, 2], 2),
        ("a|b", tuple[str, ...], ("a", "b")),
        ("a", tuple[str, ...], ("a",)),
        ("", tuple[str, ...], ()),
        ("[]", tuple[str, ...], ()),
        ('["a", "b|c"]', tuple[str, ...], ("a", "b|c")),
        ("[ab]*.conv", tuple[str, ...], ("[ab]*.conv",)),
        ("1|2|3", tuple[int, ...], (1, 2, 3)),
        ("[1,2]", tuple[int, int], (1, 2)),
        ("1|x", tuple[int, str], (1, "x")),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        ('{"a": [1]}', Any, {"a": [1]}),
    ],
)
def test_text_is_read_by_the_annotation(text: str, annotation: Any, value: Any) -> None:
    read = read_text(text, annotation)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "message"),
    [
        ("wide", int, "expected int, got 'wide'"),
        ("1.5", int | None, "expected int or none, got '1.5'"),
        ("inf", float, "expected float, got 'inf'"),
        ("maybe", bool, "expected true or false, got 'maybe'"),
        ("fp8", Precision, "expected 'bf16' or 'fp16', got 'fp8'"),
        ("1|x", tuple[int, ...], r"expected list of int, got '1\|x'"),
        ('["a",b]', tuple[str, ...], "expected list of str, got "),
        ("[1,2,3]", tuple[int, int], "expected list of int, int, got "),
        ("[1]", dict[str, int], "expected mapping to int, got "),
        ("{a}", dict[str, int], "expected mapping to int, got "),
        ('"open', str, "expected str, got "),
        ("x", type(None), "expected none, got 'x'"),
    ],
)
def test_unreadable_text_says_what_was_expected(text: str, annotation: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_text(text, annotation)


@pytest.mark.parametrize(
    ("value", "annotation", "canonical"),
    [
        (["a"], tuple[str, ...], ("a",)),
        ("enc*", tuple[str, ...], ("enc*",)),
        ([1, "x"], tuple[int, str], (1, "x")),
        (3, float, 3.0),
        (3, float | None, 3.0),
        ({"a": [1, 2]}, dict[str, tuple[int, ...]], {"a": (1, 2)}),
        ([1, 2], tuple, (1, 2)),
        ("none", str | None, "none"),
    ],
)
def test_values_get_their_canonical_form(value: Any, annotation: Any, canonical: Any) -> None:
    checked = check_value(value, annotation)
    assert checked == canonical
    assert type(checked) is type(canonical)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("16", int),
        (True, int),
        (1, bool),
        (1.0, int),
        (float("nan"), float),
        (None, int),
        ([1], tuple[str, ...]),
        ("ab", tuple[int, ...]),
        ((1,), tuple[int, int]),
        ({1: 2}, dict[str, int]),
        (1, Literal[True]),
    ],
)
def test_values_of_the_wrong_type_are_refused_in_python(value: Any, annotation: Any) -> None:
    with pytest.raises(OptionError, match=r"expected .*, got "):
        check_value(value, annotation)


def test_a_file_may_say_none_and_numbers_as_text_where_text_is_no_option() -> None:
    assert check_value("none", int | None, from_file=True) is None
    assert check_value("16", int, from_file=True) == 16
    assert check_value("none", str | None, from_file=True) == "none"


@pytest.mark.parametrize("annotation", [object, bytes, set[int]])
def test_an_annotation_without_a_textual_form_is_the_authors_mistake(annotation: Any) -> None:
    for read in (check_value, read_text):
        with pytest.raises(
            UnsupportedAnnotation, match="cannot be the type of an option: use bool"
        ):
            read("x", annotation)


def test_annotations_are_put_into_words() -> None:
    assert describe_annotation(tuple[str, ...]) == "list of str"
    assert describe_annotation(tuple) == "list"
    assert describe_annotation(dict) == "mapping"
    assert describe_annotation(Any) == "any value"
    assert describe_annotation(Literal["a", "b", "c"]) == "'a', 'b' or 'c'"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", {}),
        ("  ", {}),
        ("width=16", {"width": "16"}),
        ("width = 16 , keep=a|b", {"width": "16", "keep": "a|b"}),
        ('keep=["a","b"],width=2', {"keep": '["a","b"]', "width": "2"}),
        ('a={"x":[1,2]},b="1,\\",2"', {"a": '{"x":[1,2]}', "b": '"1,\\",2"'}),
        ("keep=[ab]*,x=1", {"keep": "[ab]*", "x": "1"}),
        ("note=a=b", {"note": "a=b"}),
        ("keep=", {"keep": ""}),
    ],
)
def test_options_are_split_at_commas_outside_brackets_and_quotes(
    text: str, pieces: dict[str, str]
) -> None:
    assert split_options(text) == pieces


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16", "'16' is not of the form option=value"),
        ("=16", "'=16' is not of the form option=value"),
        ("width=1,", "'' is not of the form option=value"),
        ("keep=a,keep=b", r"option 'keep' is given twice; a list is written keep=a\|b"),
        ("keep=[a", r"a \] is missing in 'keep=\[a'"),
        ('keep="a', 'a " is missing in '),
        ("keep={[}", r"a \] is missing"),
    ],
)
def test_what_cannot_be_split_is_quoted(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        split_options(text)


@given(st.text())
def test_written_text_is_read_back(value: str) -> None:
    assert read_text(write_text(value), str) == value
    assert split_options(f"a={write_text(value)},b=1").keys() == {"a", "b"}


@given(st.lists(st.text()).map(tuple))
def test_written_lists_are_read_back(value: tuple[str, ...]) -> None:
    written = split_options(f"a={write_text(value)},b=1")
    assert read_text(written["a"], tuple[str, ...]) == value


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-1e9, 1e9)))
def test_written_scalars_are_read_back(value: Any) -> None:
    read = read_text(write_text(value), bool | int | float | None)
    assert read == value
    assert type(read) is type(value)


@given(st.dictionaries(st.text(), st.integers()))
def test_written_mappings_are_read_back(value: dict[str, int]) -> None:
    assert read_text(write_text(value), dict[str, int]) == value


def test_tuples_become_lists_in_json() -> None:
    assert to_jsonable({"a": (1, ("x",)), "b": None}) == {"a": [1, ["x"]], "b": None}


class Documented:
    """One thing.

    Attributes:
        first: words that
            go on.
        second (int): with a type.

    Raises:
        Nothing: ever.
    """


class Derived(Documented):
    """Another.

    Attributes:
        second: said again.
    """


def test_explanations_come_from_the_attributes_section() -> None:
    assert attribute_sentences(Documented) == {
        "first": "words that go on.",
        "second": "with a type.",
    }
    assert attribute_sentences(Derived)["second"] == "said again."
