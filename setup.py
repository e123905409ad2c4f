"""Install the repository's three source folders as one import package, `perfkit`."""

from setuptools import find_packages, setup

FOLDERS = {"perfkit": "perfkit", "perfkit.kernels": "kernels", "perfkit.recipes": "recipes"}

setup(
    package_dir=FOLDERS,
    packages=[
        name for root, folder in FOLDERS.items() for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ],
)
