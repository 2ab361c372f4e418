"""Faults of state: what a training step, or an evaluation, leaves behind or destroys."""

from functools import partial

from memcnn import AdditiveCoupling
from properties.zoo.gradient_blocks import of
from properties.zoo.inverse_blocks import keeping
from properties.zoo.specimen import branch, dropping, fault, normalised
from properties.zoo.state_blocks import (
    AlwaysMoving,
    ArgumentOverwritten,
    AutocastLost,
    CalledTwice,
    Counter,
    EvaluationOverwrites,
    GeneratorMoved,
    InPlaceSum,
    InputWrittenTo,
    LeftInEval,
    NormalisedTwice,
    NotMovedAtAll,
    OnTheModule,
    OutputOverwritten,
    Reseeding,
    StatesOnTheModule,
    Unfrozen,
    Updating,
)

CALLER = "the caller's tensors"
BUFFERS = "buffers move once"
REST = "parameters, modes and requires_grad"
GENERATORS = "random generators"
HOOKS = "forward hooks"
STEPS = "two steps under way"
AUTOCAST = "products keep autocast's dtype"
state_fault = partial(fault, law="state")

FAULTS = [
    state_fault(
        "batch normalisation moves twice",
        "the recomputation updates it again",
        claim=BUFFERS,
        says="from 0 to 2",
        wrap=False,
        **of(NormalisedTwice, normalised),
    ),
    state_fault(
        "batch normalisation does not move",
        "statistics of before the pass are put back and left",
        claim=BUFFERS,
        says="from 0 to 0",
        wrap=False,
        **of(NotMovedAtAll, normalised),
    ),
    state_fault(
        "a buffer of one's own counts twice",
        "a counter in the branch",
        claim=BUFFERS,
        says="samples",
        wrap=False,
        **of(NormalisedTwice, Counter),
    ),
    state_fault(
        "statistics move in evaluation",
        "the layer updates them whatever its mode",
        claim=BUFFERS,
        says="in eval mode",
        make=lambda: AdditiveCoupling(AlwaysMoving(), branch()),
    ),
    state_fault(
        "left in eval mode",
        "the recomputation does not put it back",
        claim=REST,
        says="put in eval mode",
        wrap=False,
        **of(LeftInEval),
    ),
    state_fault(
        "frozen parameter thawed",
        "requires_grad is set on all",
        claim=REST,
        says="requires_grad of .* True",
        wrap=False,
        **of(Unfrozen),
    ),
    state_fault(
        "parameters updated in backward",
        "an optimiser step inside of the engine",
        claim=REST,
        says="was changed by a step without an optimiser",
        wrap=False,
        **of(Updating),
    ),
    state_fault(
        "generator moved",
        "random numbers are drawn a second time",
        claim=GENERATORS,
        says="other random numbers",
        wrap=False,
        **of(GeneratorMoved, dropping),
    ),
    state_fault(
        "seed set in backward",
        "by a hook",
        claim=GENERATORS,
        says="other random numbers",
        make=lambda: keeping(Reseeding()),
        stores=True,
    ),
    state_fault(
        "hooks called twice",
        "once more in the recomputation",
        claim=HOOKS,
        says="2 times a step",
        wrap=False,
        **of(CalledTwice),
    ),
    state_fault(
        "autocast lost in the recomputation",
        "backward runs outside of it",
        claim=AUTOCAST,
        says="backward computes products in float32",
        wrap=False,
        **of(AutocastLost),
    ),
    state_fault(
        "input written to",
        "with the same values: a mask of ones",
        claim=CALLER,
        says="input was written to",
        wrap=False,
        **of(InputWrittenTo),
    ),
    state_fault(
        "input overwritten", "x1 += F(x2)", claim=CALLER, says="input was overwritten", wrap=False, **of(InPlaceSum)
    ),
    state_fault(
        "output overwritten in backward",
        "y2 -= G(y1)",
        claim=CALLER,
        says="output 0 was overwritten",
        wrap=False,
        **of(OutputOverwritten),
    ),
    fault(
        "argument of inverse overwritten",
        "y2 -= G(y1)",
        lambda: keeping(ArgumentOverwritten()),
        "state",
        CALLER,
        "argument of inverse",
        "gradients",
        stores=True,
    ),
    state_fault(
        "input overwritten in evaluation",
        "in place under no_grad",
        claim=CALLER,
        says="without gradients",
        make=lambda: keeping(EvaluationOverwrites()),
        stores=True,
    ),
    state_fault(
        "output kept on the module",
        "the next forward pass replaces it",
        claim=STEPS,
        says="second forward",
        wrap=False,
        **of(OnTheModule),
    ),
    state_fault(
        "random states kept on the module",
        "two passes mix their masks",
        claim=STEPS,
        says="second forward",
        wrap=False,
        **of(StatesOnTheModule, dropping),
    ),
]
