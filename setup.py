"""Where the packages lie; everything else is in pyproject.toml. Never imports torch.

The folder `kernels/` has no `__init__.py`, so that from the repository root it cannot shadow the library of that
name which transformers imports. It is installed as `bert_fast.kernels`; in a checkout, `bert_fast/kernels/__init__.py`
points there, and that file is not shipped.
"""

from setuptools import setup

setup(
    packages=["bert_fast", "bert_fast.families", "bert_fast.kernels"],
    package_dir={"bert_fast": "bert_fast", "bert_fast.kernels": "kernels"},
    package_data={"bert_fast": ["py.typed"], "bert_fast.kernels": ["*.json"]},
    include_package_data=False,
)
