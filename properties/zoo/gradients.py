"""Faults of gradients. Most are a step of the classical engine overridden, compared with finite differences."""

from functools import partial

from properties.zoo.engine import chain_of
from properties.zoo.gradient_blocks import (
    BiasDropped,
    ChannelAffine,
    Checkpointed,
    Clipped,
    Detached,
    FFromOld,
    GDetached,
    HalfPrecision,
    InPlaceAfter,
    KeepEvery,
    Mixing,
    NotInverted,
    OneMaskForBoth,
    OtherMask,
    OverTheBatch,
    Overwriting,
    RunningStatistics,
    ScaleFunction,
    ScaleFunctionOfY,
    SharedOnce,
    SlightlyLossy,
    SlightlyOff,
    WithoutG,
    WrongInverse,
    of,
    shared,
)
from properties.zoo.inverse_blocks import keeping
from properties.zoo.specimen import Own, dropping, fault, normalised

DIFFERENCES = "gradients = finite differences"
INPUTS = "gradients of inputs"
PARAMETERS = "gradients of parameters"
engine_fault = partial(fault, law="gradients", claim=DIFFERENCES, wrap=False)

FAULTS = [
    engine_fault("gradients off by 1e-3", "every gradient is 1.001 of itself", says="1.001 times", **of(SlightlyOff)),
    engine_fault("bias gradients dropped", "None is returned for vectors", says="missing", **of(BiasDropped)),
    engine_fault("gradient divided by the batch", "twice a mean", says="0.3333 times", **of(OverTheBatch)),
    engine_fault("G's path missing", "dx1 = dy1", says="is wrong", **of(WithoutG)),
    engine_fault("F differentiated too early", "with dy1, not dx1", says="is wrong", **of(FFromOld)),
    engine_fault("F recomputed at the output", "x2 is not rebuilt first", says="is wrong", **of(NotInverted)),
    engine_fault(
        "F and G recomputed under another mask",
        "the generator's state is not set",
        says="is wrong",
        **of(OtherMask, dropping),
    ),
    engine_fault(
        "G recomputed under F's mask", "one state for the block", says="is wrong", **of(OneMaskForBoth, dropping)
    ),
    engine_fault(
        "recomputed with running statistics",
        "branches are put in eval mode",
        says="is wrong",
        **of(RunningStatistics, normalised),
    ),
    engine_fault("output kept in bfloat16", "activations are rebuilt from it", says="is wrong", **of(HalfPrecision)),
    engine_fault(
        "shared parameter counted once",
        "G's gradient is replaced by F's",
        says="is wrong",
        make=partial(shared, SharedOnce),
        chain=chain_of(SharedOnce),
    ),
    engine_fault(
        "keep every second, off by one",
        "the neighbour's input is taken",
        says="is wrong",
        **of(KeepEvery, depth=2),
        stores=True,
    ),
    fault(
        "output changed in place behind the engine",
        "which holds its storage, unversioned",
        InPlaceAfter,
        "gradients",
        DIFFERENCES,
        "is wrong",
        "state",
        wrap=False,
        stores=True,
    ),
    engine_fault(
        "scale forgotten in backward",
        "dx = dy",
        says="the gradient of the input",
        make=lambda: ChannelAffine(ScaleFunction),
        stores=True,
    ),
    engine_fault(
        "gradient of a scale with y for x",
        "ds = dy y",
        says="the gradient of s",
        make=lambda: ChannelAffine(ScaleFunctionOfY),
        stores=True,
    ),
    engine_fault(
        "matrix not transposed in backward", "dx = W dy", says="the gradient of the input", make=Mixing, stores=True
    ),
    fault(
        "gradient overwritten",
        ".grad is set, not added to",
        Overwriting,
        "gradients",
        "gradients are added",
        "not added",
        wrap=False,
        chain=chain_of(Overwriting),
    ),
    fault(
        "detached in forward",
        "F(x2.detach())",
        lambda: keeping(Detached()),
        "gradients",
        DIFFERENCES,
        "the gradient of the input",
        stores=True,
    ),
    fault(
        "a branch under no_grad",
        "G's parameters never learn",
        lambda: keeping(GDetached()),
        "gradients",
        DIFFERENCES,
        "missing, but the loss depends on it",
        stores=True,
    ),
    fault(
        "checkpoint without random numbers",
        "the mask is drawn anew in backward",
        lambda: keeping(Own(Checkpointed)),
        "gradients",
        DIFFERENCES,
        "is wrong",
        "state",
        stores=True,
    ),
    fault(
        "gradient clipped inside",
        "by a hook on the output",
        lambda: keeping(Clipped()),
        "gradients",
        DIFFERENCES,
        "is wrong",
        stores=True,
    ),
    fault(
        "dropout in a block of one's own",
        "inverse draws G's mask first, forward F's: the engine refuses it",
        partial(Own, dropping),
        "gradients",
        INPUTS,
        "draws random numbers .* its inverse does not undo",
        "state",
        "memory",
    ),
    fault(
        "gradients of a wrong inverse",
        "activations are rebuilt by it",
        WrongInverse,
        "gradients",
        INPUTS,
        "the gradient of the input",
        "inverse",
    ),
    fault(
        "gradients of a lossy inverse",
        "it computes G in bfloat16",
        SlightlyLossy,
        "gradients",
        PARAMETERS,
        "the gradient of F.2.weight",
        "inverse",
    ),
]
