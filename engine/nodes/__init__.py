"""Several machines, called nodes, on each of which some of an engine's ranks run. Works without torch."""
