"""Every error that proxytune raises on purpose, in one place.

    ProxyTuneError (ValueError)
    ├── RecipeError       the recipe itself is wrong: a field, a value, a missing file
    ├── MemberError       a member named by the recipe cannot be loaded or does not fit
    ├── VocabularyError   two members do not have the same tokens under the same ids
    ├── PromptError       a prompt is empty, too long, or cannot be made for a member
    ├── AlphaError        alpha is not finite, or has the wrong shape
    └── Unfinished        a run ended early; what it made is kept, and the same command continues from there

The command line prints the message as one sentence and exits with status 2, so a message names what is
wrong and what to do, and never needs a traceback to be understood.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

__all__ = ["AlphaError", "MemberError", "PromptError", "ProxyTuneError", "RecipeError", "Unfinished", "VocabularyError"]


class ProxyTuneError(ValueError):
    """The base class of all errors that proxytune raises on purpose. It is a ``ValueError``, because the cause is
    always bad input.

    Example:
        >>> import proxytune
        >>> try:
        ...     proxytune.load_recipe("./nosuch")
        ... except proxytune.ProxyTuneError as error:
        ...     print(error)
        there is no recipe at './nosuch'; make one with `proxytune new`
    """


class RecipeError(ProxyTuneError):
    """The recipe is wrong: an unknown field, a bad value, a missing file.

    Example:
        >>> from proxytune import Member
        >>> Member("gpt2", dtype="int8")
        Traceback (most recent call last):
        proxytune.errors.RecipeError: dtype 'int8' of member 'gpt2' is not one of auto, float32, ...
    """


class MemberError(ProxyTuneError):
    """A member cannot be loaded, or does not fit the others.

    Example:
        >>> from proxytune import ProxyTunedForCausalLM
        >>> ProxyTunedForCausalLM.from_pretrained("my-recipe").member("bas")
        Traceback (most recent call last):
        proxytune.errors.MemberError: there is no member 'bas'; there are base, expert.expert, expert.anti_expert
    """


class VocabularyError(ProxyTuneError):
    """Members have different tokens under the same id.

    Example:
        >>> from proxytune import ProxyTunedForCausalLM
        >>> ProxyTunedForCausalLM.from_members("./base", "./other")
        Traceback (most recent call last):
        proxytune.errors.VocabularyError: member 'expert.expert' does not share the base's vocabulary ...
    """


class PromptError(ProxyTuneError):
    """A prompt is empty, longer than a member's context, or cannot be rendered for a member.

    Example:
        >>> import proxytune
        >>> proxytune.generate("my-recipe", ["The fox", ""])
        Traceback (most recent call last):
        proxytune.errors.PromptError: prompts[1]: the prompt is empty
    """


class AlphaError(ProxyTuneError):
    """Alpha is not a finite number, or its shape fits neither the batch nor the experts.

    Example:
        >>> import proxytune
        >>> proxytune.generate("my-recipe", "The fox", alpha={"maths": 0.5})
        Traceback (most recent call last):
        proxytune.errors.AlphaError: no expert is called 'maths'; the recipe has expert
    """


class Unfinished(ProxyTuneError):
    """A run ended early, because its budget of requests is spent or a judge does not answer. A command keeps what it
    finished, and the same command continues from there.

    Example:
        >>> from proxytune.lanes.completions import Budget
        >>> budget = Budget(max_tokens=100)
        >>> for _ in range(3):
        ...     budget.take(40)
        Traceback (most recent call last):
        proxytune.errors.Unfinished: the budget of 100 tokens (--max-tokens) is spent
    """


def first_line(error: BaseException) -> str:
    """The first line with text of another library's error, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_unwritable(error: BaseException) -> bool:
    """Whether something could not be written. safetensors and torch report a full disk with errors of their own."""
    said = ("No space left", "File too large", "PytorchStreamWriter")
    return isinstance(error, OSError) or any(words in str(error) for words in said)


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, without what pydantic puts around one of a validator."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1].removeprefix("Value error, ").partition(" [type=")[0]
    return first_line(error)


def unknown_arguments(function: Callable[..., Any], given: Iterable[str], more: Iterable[str] = ()) -> TypeError:
    """The error for arguments that a function with ``**kwargs`` does not take. It names the first one, and a similar
    name.

    Args:
        function: the function. given: the names that it does not take. more: names that it takes through ``**kwargs``.
    """
    name = min(given)
    named = [each.name for each in inspect.signature(function).parameters.values() if each.kind != each.VAR_KEYWORD]
    near = difflib.get_close_matches(name, [*named, *more], n=1, cutoff=0.7)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{function.__name__}() takes no argument {name!r}{meant}")


def need(what: str, extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed, before any work starts.

    Raises:
        ProxyTuneError: with the install command, if one is missing.
    """
    # What is imported is there; a module that was made by hand has no spec.
    if missing := [name for name in packages if sys.modules.get(name) is None and find_spec(name) is None]:
        raise ProxyTuneError(f"{what} needs {', '.join(missing)}: pip install 'proxytune[{extra}]'")
