"""The keyword arguments that a module takes. A coupling passes each one to the branches whose ``forward`` has it.

In a block of a Reformer, for example, ``mask=...`` reaches the attention and not the feed-forward network.
"""

import inspect
from collections.abc import Iterable, Mapping

from torch import nn


def keywords_taken(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of the names that ``module`` takes as keyword arguments.

    If the module has a method ``keywords_taken(names)``, it decides. Otherwise the signature of ``forward`` does, whose
    first parameter is the input.
    """
    own = getattr(module, "keywords_taken", None)
    if own is not None:
        return own(names)
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return set(names)
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    named |= {p.name for p in parameters[1:] if p.kind is p.POSITIONAL_OR_KEYWORD}
    return named & set(names)


def taken(module: nn.Module, kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return those of the keyword arguments that ``module`` takes."""
    if not kwargs:
        return {}
    names = keywords_taken(module, kwargs)
    return {name: value for name, value in kwargs.items() if name in names}


def refuse_unknown(module: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Raise a TypeError for a keyword argument that nothing within ``module`` takes."""
    if kwargs and (unknown := kwargs.keys() - keywords_taken(module, kwargs)):
        raise TypeError(
            f"{type(module).__name__} has no branch whose forward takes the keyword argument "
            f"{min(unknown)!r}: correct its name, or give the forward of F or G such a parameter"
        )
