import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "memcnn" / "__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)
README = HERE / "README.md"

setup(
    name="memcnn",
    version=VERSION,
    description="Reversible blocks for PyTorch: train deep networks in the activation memory of a shallow one",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["memcnn", "memcnn.*"]),
    package_data={"memcnn": ["py.typed"], "memcnn.training": ["record.schema.json"]},
    python_requires=">=3.10",
    install_requires=["filelock", "hypothesis", "numpy", "tensorboardX", "torch>=2.11", "torchvision>=0.26", "tqdm"],
    extras_require={
        "harness": [
            "fastjsonschema",
            "jinja2",
            "matplotlib",
            "pandas>=2.2",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "scipy",
            "tabulate",
        ],
        "cluster": ["ray"],
    },
    entry_points={
        "console_scripts": [
            "memcnn-convert = memcnn.convert:main",
            "memcnn-evaluate = memcnn.evaluate:main",
            "memcnn-train = memcnn.train:main",
            "memcnn-verify = memcnn.verify:main",
        ]
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
