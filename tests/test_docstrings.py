"""The examples in docstrings run: every public name has one, and what it shows is what happens."""

from __future__ import annotations

import doctest

import pytest

import proxytune
from support import tiny

pytestmark = pytest.mark.usefixtures("no_progress")

# Public methods whose docstrings have an example that a class's own docstring does not lead to: a mixin's.
ELSEWHERE = {"ProxyTunedForCausalLM.generate": proxytune.ProxyTunedForCausalLM.generate}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def place(shelf, tmp_path, monkeypatch):
    """What the examples speak of: a recipe, its members, and a model with another vocabulary."""
    for name, source in (("base", "base"), ("expert", "expert"), ("anti-expert", "anti")):
        (tmp_path / name).symlink_to(shelf / source)
    pair = {"expert": "../expert", "anti_expert": "../anti-expert"}
    tiny.write_recipe_alone(tmp_path / "my-recipe", {"base": "../base", "experts": [pair]})
    tiny.write_model(tmp_path / "other", "llama", "small", 4, tokenizer_=tiny.tokenizer(swap=("a", "b")))
    monkeypatch.chdir(tmp_path)


def examples_of(name):
    """The docstrings with examples of a public name, its methods' too."""
    found = ELSEWHERE.get(name) or getattr(proxytune, name)
    return [test for test in doctest.DocTestFinder().find(found, name, globs={}) if test.examples]


@pytest.mark.parametrize("name", [*proxytune.__all__, *ELSEWHERE])
def test_an_example_is_true(name, place):
    tests = examples_of(name)
    assert name in [test.name for test in tests], f"the docstring of {name} has no example"
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)
