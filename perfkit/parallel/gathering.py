"""A workload among the processes that optimize it together."""

from __future__ import annotations

from perfkit._chain import Chain, chain_of
from perfkit._errors import InvalidInputError
from perfkit._recipe import ParallelRecipe
from perfkit._variant import Variant, apply, ready
from perfkit._workload import Workload
from perfkit.parallel import world
from perfkit.parallel.layout import layout


def gathered(work: Workload, chain: Chain) -> Workload:
    """The workload with its world and layout, if a recipe of the chain spreads it over several devices.

    Raises:
        InvalidInputError: the processes were given different models, inputs or recipes, which would leave them waiting
            for each other; or the sizes do not make up the number of devices.
        UnsupportedError: the others cannot be reached.
        ChainError: several recipes without a size.
    """
    if not any(isinstance(recipe, ParallelRecipe) for recipe in chain):
        return work
    found = world.of(work.framework)
    work = work.replace(world=found)
    _check_alike(work, chain)
    return work.replace(layout=layout(chain, found))


def trained(work: Workload, recipe: str) -> Variant:
    """The model spread by that recipe, as its user would train it; its call is a training step."""
    chain = chain_of(recipe)
    return ready(apply(chain, gathered(work, chain)).works[-1], recipe)


def _check_alike(work: Workload, chain: Chain) -> None:
    about = {"recipe": str(chain), "mode": work.mode, "seed": str(work.seed), "model": work.backend.model_name(work)}
    forms = work.world.gather(about | work.backend.form(work))
    for rank, form in enumerate(forms):
        for name in {**forms[0], **form}:
            first, other = forms[0].get(name, "nothing"), form.get(name, "nothing")
            if first != other:
                raise InvalidInputError(
                    f"the processes differ: {name} is {first} on rank 0, and {other} on rank {rank}: "
                    "call optimize with the same model, inputs and recipe on every one"
                )
