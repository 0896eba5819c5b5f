"""Packaging: `pip install -e .` for the runtime, `pip install -e '.[test]'` for the tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cc_jax/__init__.py").read_text()).group(1)

setup(
    name="cc_jax",
    version=VERSION,
    description="CustomContrast (AAAI 2025) in JAX/Flax: subject-driven text-to-image drawing",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["cc_jax*", "configs*", "data_pipeline*"]),
    package_data={"cc_jax": ["assets/**/*"]},
    install_requires=[
        # Windows that were tested: 3.11 with jax 0.10, 3.12 with jax 0.11.
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "transformers>=5.17,<5.24",
        "diffusers>=0.42,<0.43",
        "tensorflow>=2.21,<2.22",
        "tensorflow-datasets>=4.9.10,<4.10",
        "ml_collections>=1.1,<1.2",
        "absl-py>=2.1",
        "jaxtyping>=0.3,<0.4",
        "huggingface_hub>=1.0,<3",
        "safetensors>=0.5,<0.9",
        "tokenizers",
        "tqdm>=4.66",
        "tensorboardX>=2.6,<2.7",
        "pillow>=10",
        "matplotlib>=3.9",
        "numpy>=2,<3",
    ],
    extras_require={
        "test": ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "torch==2.13.0", "ruff"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        # What the command `tfds` imports and does not install.
        "tfds": ["apache-beam", "mlcroissant"],
        "notebooks": ["jupyterlab>=4", "ipywidgets>=8"],
    },
)
