"""The reference kernels implement every op in readable torch code. Tests compare all other kernels with them.

The reference kernels also run where no other implementation runs. Shapes use the letters of `kernels.ops`. Results are
batch-invariant because
* sums are folded in a fixed order that does not depend on the tensor's shape (`exact.ordered_sum`),
* functions of one element give the same bits at every place of a tensor (`exact.silu`, `exact.softplus`), and
* attention works on tiles of one fixed shape.
`linear` and `run_experts` are not batch-invariant, because torch's matrix product chooses its order of summation by the
number of rows.
"""
