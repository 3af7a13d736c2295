"""The start of the engine, before its first step: plans the memory, loads the weights and builds the engine's parts."""
