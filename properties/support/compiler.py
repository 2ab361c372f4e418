"""A decorator for tests of compiled modules."""

import pytest

WITHOUT_ITS_WARNINGS = (  # PyTorch's compiler emits these for any model with a graph break
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
)


def ignore_compiler_warnings(test):
    """Decorator: ignore the warnings that PyTorch's compiler emits whatever it compiles."""
    for mark in WITHOUT_ITS_WARNINGS:
        test = mark(test)
    return test
