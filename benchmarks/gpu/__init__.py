"""The kernels on a GPU: correctness, ceilings, cells against their peers, tuning. See ../README.md."""
