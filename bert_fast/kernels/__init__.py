"""`bert_fast.kernels` in a checkout: the folder kernels/ at the top. Not shipped, a wheel has the real folder here."""
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
