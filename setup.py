"""Packaging of cachedit_fx.

`passes/` and `patterns/` lie at the top level of the repository and are installed as
`cachedit_fx.passes` and `cachedit_fx.patterns`. In the source tree, two symlinks in
`cachedit_fx/` make the same names importable. The package list is derived, so that a
subfolder added later is in the wheel.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Import name -> folder.
PACKAGE_DIR = {
    "cachedit_fx": "cachedit_fx",
    "cachedit_fx.passes": "passes",
    "cachedit_fx.patterns": "patterns",
}


def derive_packages() -> list[str]:
    """Every package below the mapped folders, by its import name, each once.

    `find_packages` follows symlinks, so the names that have a mapping of their own are left out of the
    walk of the folder that they are linked into.
    """
    packages = []
    for name, folder in PACKAGE_DIR.items():
        mapped = [other.removeprefix(f"{name}.") for other in PACKAGE_DIR if other.startswith(f"{name}.")]
        exclude = [pattern for child in mapped for pattern in (child, f"{child}.*")]
        packages.append(name)
        packages += [f"{name}.{child}" for child in find_packages(str(ROOT / folder), exclude=exclude)]
    return packages


def version() -> str:
    """As in `cachedit_fx/_version.py`, which cannot be imported before torch is there."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "cachedit_fx" / "_version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def long_description() -> str:
    """The README, or nothing where it is missing."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


DIFFUSERS = ["diffusers", "transformers", "accelerate", "safetensors"]
REPORT = ["matplotlib", "jinja2", "rich"]

setup(
    name="cachedit_fx",
    version=version(),
    description=(
        "Caching for compiled diffusion transformers: "
        "a torch.compile backend that reuses block residuals inside the graph"
    ),
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=PACKAGE_DIR,
    packages=derive_packages(),
    package_data={
        "cachedit_fx": ["py.typed"],
        "cachedit_fx.inspect.pages": ["templates/*"],
        "cachedit_fx.shell": ["*.json"],
    },
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "diffusers": DIFFUSERS,
        "report": REPORT,
        "test": [
            *DIFFUSERS,
            *REPORT,
            "pytest",
            "hypothesis",
            "peft",
            "playwright",
            "pytest-xdist",
            "scikit-learn",
            "tqdm",
        ],
        # Apart from "test", since diffusers logs warnings of its own at every import where torchao is installed.
        "quantization": ["torchao", "gguf"],
        "serve": [*DIFFUSERS, "ray[serve]"],
        "docs": ["mkdocs<2", "mkdocs-material", "mkdocstrings-python", "pymdown-extensions"],
        "peers": ["cache-dit==1.5.3"],
        "dev": ["ruff", "mypy", "build", "check-wheel-contents", "twine", "wheel", "setuptools>=77"],
    },
    entry_points={
        "torch_dynamo_backends": ["cachedit = cachedit_fx.frontend.backend:cachedit"],
        "console_scripts": ["cachedit-fx = cachedit_fx.shell.command_line:main"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["diffusion", "transformer", "torch.compile", "cache", "inference", "diffusers"],
    zip_safe=False,
)
