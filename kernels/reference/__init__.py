"""Every op in plain torch, written to be read: the oracle of the other implementations and the last resort.

The letters are those of `kernels.ops`. Results do not depend on batch mates or on chunking because
* sums that vary in shape are folded in a fixed order (`exact.ordered_sum`), functions of one element give the same
  bits wherever it stands (`exact.silu`, `exact.softplus`), and
* attention works on tiles of one fixed shape.
Exempt are `linear` and `run_experts`: torch's matrix product picks its order of summation by the number of rows.
"""
