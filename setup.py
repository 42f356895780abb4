"""Package metadata, read from `settings.ini` so that nbdev and pip see the same values."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
own = {
    name: settings[f"{name}_requirements"].split()
    for name in ("train", "study", "peft", "lm", "ray", "dev")
}
extras = {
    "train": own["train"],
    "study": own["train"] + own["study"],
    "peft": own["peft"],
    "lm": own["train"] + own["lm"],
    "ray": own["train"] + own["ray"],
    "dev": own["train"] + own["study"] + own["lm"] + own["dev"],
}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["mft_nb", "mft_nb.*"]),
    package_data={"mft_nb": ["py.typed"]},
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}=mft_nb._modidx:d"],
    },
)
