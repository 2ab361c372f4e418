"""All faults of the zoo."""

from properties.zoo import corners, flows, gradients, inverses, log_dets, memories, ours, signs, states, upstream, users

FAULTS = [
    *inverses.FAULTS,
    *gradients.FAULTS,
    *ours.FAULTS,
    *states.FAULTS,
    *memories.FAULTS,
    *log_dets.FAULTS,
    *upstream.FAULTS,
    *corners.FAULTS,
    *flows.FAULTS,
    *signs.FAULTS,
    *users.FAULTS,
]
