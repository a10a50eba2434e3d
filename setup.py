"""Packaging of shard4bit: only the library; launch/ and tests/ stay in the checkout."""

from setuptools import find_packages, setup

setup(
    name="shard4bit",
    version="0.1.0",
    description="AdamW with 4-bit optimizer states for sharded PyTorch training (FSDP, DeepSpeed ZeRO)",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["shard4bit", "shard4bit.*"]),
    py_modules=["shard4bit_hook"],  # beside the package, so that it works in whatever state that is
    entry_points={"torch.backends": ["shard4bit = shard4bit_hook:install"]},
    package_data={"shard4bit": ["py.typed", "**/*.cu", "**/*.cuh"]},
    install_requires=["torch>=2.11", "numpy", "safetensors", "xxhash"],
    extras_require={
        "demo": ["tqdm", "matplotlib"],
        "cli": ["rich", "matplotlib"],
        "test": ["pytest", "pytest-timeout", "hypothesis"],
        "cuda12": ["cupy-cuda12x"],
        "cuda13": ["cupy-cuda13x>=14"],
        "deepspeed": ["deepspeed>=0.16.9"],
    },
)
