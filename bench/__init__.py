"""Benches: `python -m bench model | kernels | tune | compare | report | aot`."""
