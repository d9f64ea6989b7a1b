"""Where every process of a run is, and a process beside them that ends a run that hangs."""
