"""Where every process of a run is, a process beside them that ends a run that hangs, profiles."""
