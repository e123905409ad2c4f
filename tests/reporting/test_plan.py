"""A plan in the terminal."""

from perfkit import Plan
from perfkit._report import Candidate


def test_a_plan_of_a_search_shows_single_recipes_and_counts_their_combinations():
    chains = ("bf16", "compile", "compile(mode='a+b')", "bf16+compile", "bf16+compile(mode='a+b')")
    refused = Candidate("fp8", "refused", "there are no kernels for it")
    plan = Plan(
        "Net", "torch", "inference", "cpu", candidates=(*(Candidate(c, "to be tried") for c in chains), refused)
    )
    lines = [line.strip() for line in str(plan).splitlines()]
    at = lines.index("bf16")
    assert lines[at : at + 4] == [*chains[:3], "and 2 combinations of these"]
    assert "would try 5 chains" in str(plan)
    assert "no kernels" in str(plan)
