"""Checkpoint folders whose weights another tool has quantised to integers: GPTQ, AWQ, compressed-tensors, MLX and
bitsandbytes. Each method has a module, which knows nothing of the others. To add a method, write a module and add a
line to the module `table`. None of these modules needs torch."""
