"""Triton kernels for beacon attention. Depends on torch and triton only."""

__all__: list[str] = []
