"""Alpha as plain numbers: every spelling of it, and every one that is refused. No model is needed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from proxytune.errors import AlphaError
from proxytune.recipe.alpha import alpha_rows, finite_alpha, resolve_alpha, take_alpha
from support import tiny

AB = ["a", "b"]
DEFAULT = [1.0, 0.4]
LARGEST = 3.4e38


def refused(call, *args):
    """The one sentence with which a call is refused."""
    with pytest.raises(AlphaError) as caught:
        call(*args)
    return str(caught.value)


# -- one number -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0, -2, 0.25, LARGEST, -LARGEST, 3 * 10**38], ids=repr)
def test_a_finite_number_is_a_float(alpha):
    found = finite_alpha(alpha)
    assert type(found) is float
    assert found == float(alpha)


@pytest.mark.parametrize(
    "alpha",
    [math.nan, math.inf, -math.inf, True, "1", None, [1.0], 10**400, 3.5e38, -3.5e38, Fraction(1, 2), 1j],
    ids=repr,
)
def test_anything_else_is_refused(alpha):
    assert refused(finite_alpha, alpha) == f"alpha must be a finite number, not {alpha!r}"
    assert refused(finite_alpha, alpha, "it") == f"it must be a finite number, not {alpha!r}"


# -- one alpha an expert --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, (1.0, 0.4)),
        (2, (2.0, 2.0)),
        (0, (0.0, 0.0)),
        ([2, -1], (2.0, -1.0)),
        ((2, -1), (2.0, -1.0)),
        ({}, (1.0, 0.4)),
        ({"b": 0}, (1.0, 0.0)),
        ({"b": 3, "a": 2}, (2.0, 3.0)),
    ],
    ids=repr,
)
def test_every_form_of_alpha(alpha, expected):
    found = resolve_alpha(alpha, AB, DEFAULT)
    assert found == expected
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"c": 1.0}, "no expert is called 'c'; the recipe has a, b"),
        ([1.0], "1 alpha for 2 experts (a, b)"),
        ((1.0, 2.0, 3.0), "3 alphas for 2 experts (a, b)"),
        ([1.0, "x"], "alpha of expert 'b' must be a finite number, not 'x'"),
        ({"a": None}, "alpha of expert 'a' must be a finite number, not None"),
        ("x", "alpha must be a finite number, not 'x'"),
        ({"b": [1.0]}, "alpha of expert 'b' must be a finite number, not [1.0]"),
        ([[1.0], [2.0]], "alpha of expert 'a' must be a finite number, not [1.0]"),
    ],
    ids=repr,
)
def test_every_alpha_error(alpha, message):
    assert refused(resolve_alpha, alpha, AB, DEFAULT) == message


def test_without_experts_there_is_no_alpha():
    """A model alone, as a composite."""
    for alpha in (None, [], {}, [[]], torch.zeros(2, 0)):
        assert alpha_rows(alpha, [], [], 2) == [(), ()]
    for alpha in (0.5, [0.5], [[0.5], [0.5]], [[0.5, 1.0]], torch.ones(2), {"a": 1.0}):
        assert refused(alpha_rows, alpha, [], [], 2) == (
            "there are no experts, so alpha would change nothing; leave it out"
        )


# -- by an argument's name ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("said", "alphas"), tiny.SPELLINGS, ids=repr)
def test_spellings_that_every_engine_takes(said, alphas):
    arguments = {**said, "other": 1}
    alpha = arguments.pop("alpha", None)
    assert list(resolve_alpha(take_alpha(arguments, AB, alpha), AB, DEFAULT)) == alphas
    assert arguments == {"other": 1}, "what is no alpha stays"


@pytest.mark.parametrize("alpha", [None, 0.5, [1.0, 2.0], {"a": 1.0}, torch.ones(1, 2), "x"], ids=repr)
def test_without_names_alpha_stays_what_it_is(alpha):
    assert take_alpha({"other": 1}, AB, alpha) is alpha


def test_names_make_a_mapping_and_leave_the_callers_alone():
    given = {"a": 0.5, "b": 0.6}
    assert take_alpha({"alpha.b": 2.0}, AB) == {"b": 2.0}
    assert take_alpha({"alpha.b": 2.0}, AB, given) == {"a": 0.5, "b": 2.0}
    assert given == {"a": 0.5, "b": 0.6}
    assert take_alpha({"alpha.b": 2.0}, AB, (7, 8)) == {"a": 7, "b": 2.0}
    assert take_alpha({"alpha.b": 2.0}, AB, [7, 8]) == {"a": 7, "b": 2.0}
    assert take_alpha({"alpha.b": 2.0}, AB, 7) == {"a": 7, "b": 2.0}
    rows = [0.0, 1.0, -1.5]  # one per row: the composite takes that
    assert take_alpha({"alpha.a": rows}, AB, 0.5) == {"a": rows, "b": 0.5}


@pytest.mark.parametrize(
    ("arguments", "alpha", "message"),
    [
        ({"alpha.c": 1.0}, None, "no expert is called 'c'; the recipe has a, b"),
        ({"alpha.": 1.0}, None, "no expert is called ''; the recipe has a, b"),
        ({"alpha.alpha.a": 1.0}, None, "no expert is called 'alpha.a'; the recipe has a, b"),
        ({"alpha.a": 1.0}, [1.0], "1 alpha for 2 experts (a, b)"),
        (
            {"alpha.b": 1.0, "alpha.a": 1.0},
            torch.ones(1, 2),
            "together with 'alpha.b', alpha must be a number, a list in order or a mapping",
        ),
        ({"alpha.a": 1.0}, "x", "together with 'alpha.a', alpha must be a number, a list in order or a mapping"),
    ],
    ids=repr,
)
def test_names_that_cannot_be_are_refused(arguments, alpha, message):
    assert refused(take_alpha, dict(arguments), AB, alpha) == message


# -- alpha in all its forms -----------------------------------------------------------------------------------
THREE = {"default": [1.0, 2.0], "names": ["a", "b"], "n_rows": 3}
ONLY = {"default": [1.5], "names": ["a"], "n_rows": 3}


@pytest.mark.parametrize(
    ("alpha", "of", "expected"),
    [
        (None, THREE, [[1, 2]] * 3),
        (None, {**THREE, "default": [1, 2]}, [[1, 2]] * 3),  # as a recipe's JSON may say it
        ({"b": 0.5}, {**THREE, "default": [1, 2]}, [[1, 0.5]] * 3),
        (0.5, THREE, [[0.5, 0.5]] * 3),
        (0, THREE, [[0, 0]] * 3),
        (-2, THREE, [[-2, -2]] * 3),
        ([0.1, 0.2], THREE, [[0.1, 0.2]] * 3),
        (torch.tensor([0.1, 0.2]), THREE, [[0.1, 0.2]] * 3),
        (np.array([0.1, 0.2]), THREE, [[0.1, 0.2]] * 3),
        ([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], THREE, [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
        (torch.tensor([[0.1], [0.2], [0.3]]), THREE, [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]),
        (torch.tensor([[0.1, 0.2]], dtype=torch.float64), THREE, [[0.1, 0.2]] * 3),
        ({"b": 0.5}, THREE, [[1, 0.5]] * 3),
        ({"b": [0.5, 0.6, 0.7], "a": 0}, THREE, [[0, 0.5], [0, 0.6], [0, 0.7]]),
        ({}, THREE, [[1, 2]] * 3),
        (None, ONLY, [[1.5]] * 3),
        ([0.1, 0.2, 0.3], ONLY, [[0.1], [0.2], [0.3]]),
        ([0.1], ONLY, [[0.1]] * 3),
        (torch.tensor(0.25), ONLY, [[0.25]] * 3),
    ],
)
def test_every_form_of_alpha_of_rows(alpha, of, expected):
    rows = alpha_rows(alpha, **of)
    assert [pytest.approx(row) for row in expected] == [list(row) for row in rows]


@pytest.mark.parametrize(
    ("alpha", "of", "message"),
    [
        (math.nan, THREE, "alpha must be a finite number, not nan"),
        (math.inf, ONLY, "alpha must be a finite number, not inf"),
        (torch.tensor(1e39, dtype=torch.float64), THREE, "alpha must be a finite number, not 1e"),  # not in float32
        ([1.0, -math.inf], THREE, "must be a finite number"),
        ({"a": math.nan}, THREE, "must be a finite number"),
        ("strong", THREE, "must be a finite number, not 'strong'"),
        ([[1.0], [1.0, 2.0]], THREE, "3 rows of one value for each of 2 experts"),
        ({"c": 1.0}, THREE, "no expert is called 'c'; the recipe has a, b"),
        ({"a": [1.0, 2.0]}, THREE, "alpha of 'a' must be a number or 3 values, one per row"),
        ({"a": [[1.0, 2.0, 3.0]]}, THREE, "alpha of expert 'a' must be a finite number, not"),
        ([1.0, 2.0, 3.0], THREE, r"^3 alphas for 2 experts \(a, b\) or 3 rows$"),
        ([1.0, 2.0], ONLY, r"^2 alphas for 1 expert \(a\) or 3 rows$"),
        (torch.ones(2, 2), THREE, "alpha must have 3 rows of one value for each of 2 experts"),
        (torch.ones(3, 2, 1), THREE, "must be a finite number, not "),
        ([], THREE, "^0 alphas for 2 experts"),
    ],
)
def test_every_alpha_error_of_rows(alpha, of, message):
    with pytest.raises(AlphaError, match=message):
        alpha_rows(alpha, **of)
