"""The rules by which several experts are joined: their names, and what each needs of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from proxytune.errors import AlphaError, RecipeError
from proxytune.recipe.gates import Gate, gate_of

if TYPE_CHECKING:
    from proxytune.recipe.parts import Expert

__all__ = ["LINEAR", "RULES", "Rule", "Steering", "check_rule", "rule_of"]

Rule = Literal["sum", "mean", "convex", "dynamic", "union", "intersection"]
RULES: tuple[Rule, ...] = get_args(Rule)
LINEAR: tuple[Rule, ...] = ("sum", "mean", "convex")  # the mixture is a straight line in each alpha
ROUNDING = 1e-6  # of alphas that sum to 1


@dataclass(frozen=True)
class Steering:
    """How experts are joined, and where they steer."""

    rule: Rule = "sum"
    gate: Gate | None = None

    @property
    def schedule(self) -> Gate | None:
        """The gate, if it is a schedule."""
        return self.gate if self.gate is not None and self.gate.scheduled else None

    @property
    def by_text(self) -> bool:
        """Whether the gate reads the text of the answer."""
        return self.gate is not None and self.gate.kind == "between"

    @property
    def local(self) -> bool:
        """Whether a part of the vocabulary can be mixed without the rest."""
        return self.rule in LINEAR and self.gate is self.schedule

    def but(self, combine: Any = None, gate: Any = None) -> Steering:
        """With another rule and gate, unless they are None; the gate ``"none"`` is always open.

        Raises:
            RecipeError: for an unknown rule or gate.
        """
        rule = self.rule if combine is None else rule_of(combine)
        return Steering(rule, self.gate if gate is None else gate_of(gate))


def rule_of(name: Any) -> Rule:
    """A rule by its name.

    Raises:
        RecipeError: for an unknown one.
    """
    if not isinstance(name, str) or name not in RULES:
        raise RecipeError(f"there is no rule {name!r} to combine experts; there are {', '.join(RULES)}")
    return name


def check_rule(rule: Rule, experts: Sequence[Expert], rows: Sequence[Sequence[float]]) -> None:
    """Check that a rule can join these experts under these alphas, one row of alphas per text.

    Raises:
        RecipeError: if an expert lacks a side that the rule reads. AlphaError: for alphas that the rule excludes.
    """
    if rule in ("sum", "mean"):
        return
    for expert in experts:
        if expert.expert is None or (rule != "convex" and expert.anti_expert is None):
            needed, only = ("expert", "an anti-expert") if expert.expert is None else ("anti_expert", "an expert")
            raise RecipeError(
                f"under the rule {rule} each entry needs an `{needed}`, and {expert.name!r} has only {only}; use the "
                "rule sum"
            )
    if rule == "convex":
        for row in rows:
            if min(row, default=0.0) < 0 or sum(row) > 1 + ROUNDING:
                said = ", ".join(f"{value:g}" for value in row)
                raise AlphaError(f"the alphas of the rule convex are 0 or more and sum to at most 1, unlike {said}")
