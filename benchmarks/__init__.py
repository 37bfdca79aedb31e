"""Measurements of the kernels, the ceilings and their peers. See README.md."""
