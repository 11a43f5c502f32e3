"""The exception tree, as its module draws it."""

from __future__ import annotations

import pytest

import proxytune
from proxytune import errors

KINDS = [
    errors.RecipeError,
    errors.MemberError,
    errors.VocabularyError,
    errors.PromptError,
    errors.AlphaError,
    errors.Unfinished,
]


def test_all_names_every_error():
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert set(errors.__all__) == defined == {"ProxyTuneError", *(kind.__name__ for kind in KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_except_catches_all(kind):
    assert kind.__bases__ == (errors.ProxyTuneError,)
    assert issubclass(kind, ValueError)


def test_the_package_exports_them():
    assert all(getattr(proxytune, name) is getattr(errors, name) for name in errors.__all__)


def test_the_drawn_tree_is_the_tree():
    for kind in KINDS:
        assert f"── {kind.__name__} " in errors.__doc__
