"""Memory, traffic and time of a run on devices that are not there."""
