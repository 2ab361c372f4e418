"""The tensors that the engine keeps alive between forward and backward."""

import gc

from memcnn.engine.chain import Value
from memcnn.engine.recompute import Activation


def living(*kinds: type) -> list:
    """Return the living objects of the given classes; by default those of the engine that keep activations."""
    kinds = kinds or (Activation, Value)
    return [x for x in gc.get_objects() if type(x) in kinds]


def held_bytes() -> int:
    """Return the bytes of the tensors that the engine keeps, each storage counted once."""
    tensors = [x.tensor for x in living() if x.tensor is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
