from __future__ import annotations

import ast
import doctest
from pathlib import Path

import pytest

from turnout.core import testing
from turnout.core.world import DECIDERS

CORE = Path(__file__).parents[3] / "core"


@pytest.mark.parametrize("aggregate", sorted(DECIDERS))
def test_each_aggregate_reads_in_the_order_state_initial_evolve_commands_decide(aggregate: str) -> None:
    tree = ast.parse((CORE / f"{aggregate}.py").read_text())
    names: list[str] = []
    for node in tree.body:
        match node:
            case ast.ClassDef(name) | ast.FunctionDef(name):
                names.append(name)
            case ast.Assign([ast.Name(name)]):
                names.append(name)
            case _:
                pass
    order = [f"{aggregate.title()}State", "initial", "evolve", f"{aggregate.title()}Command", "decide"]
    assert [n for n in names if n in order] == order
    commands = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.endswith("State")]
    assert all(names.index("evolve") < names.index(c) < names.index(order[3]) for c in commands)


@pytest.mark.parametrize("aggregate", sorted(DECIDERS))
def test_each_aggregate_has_the_three_members_of_a_decider(aggregate: str) -> None:
    for member in ("initial", "evolve", "decide"):
        assert hasattr(DECIDERS[aggregate], member)


def test_the_examples_of_the_public_test_helpers_run() -> None:
    assert doctest.testmod(testing) == (0, 10)
