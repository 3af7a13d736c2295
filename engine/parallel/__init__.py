"""Several ranks, each of which is a process, run one model together.

Tensor parallelism gives each of them a part of every layer (`shards.py`, `group.py`). Pipeline parallelism gives each
stage some of the layers (`stages.py`, `device_map.py`, `pipe.py`). A stage is one rank, or several that divide its
layers.
"""
