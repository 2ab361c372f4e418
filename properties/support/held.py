"""What the engine keeps alive between forward and backward."""

import gc

ENGINE = "Cell", "Handle"
"""The engine's classes that keep activations."""


def living(*kinds: type) -> list:
    """Return the engine's living objects, all of them or those of the given classes."""
    def wanted(kind: type) -> bool:
        return kind in kinds if kinds else kind.__name__ in ENGINE and kind.__module__.startswith("memcnn.")
    return [x for x in gc.get_objects() if wanted(type(x))]


def held_bytes() -> int:
    """Return the bytes of the tensors that the engine keeps, each storage counted once."""
    tensors = [x.tensor for x in living() if getattr(x, "tensor", None) is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
