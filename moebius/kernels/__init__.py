"""Pure functions on tensors, one file per operation; they know neither modules nor processes."""
