"""Benches: `python -m bench model`, `python -m bench kernels`, `python -m bench aot`."""
