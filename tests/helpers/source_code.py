"""The repository's Python files, and what each of them imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers.paths import FIXTURES, ROOT

PACKAGE = ROOT / "modeling_fromage"
PACKAGES = ("modeling_fromage", "training", "hub_scripts", "tests")
NOT_SHIPPED = {"__init__.py", "version.py"}  # besides py.typed, all that is flat and stays behind


@dataclass(frozen=True)
class Import:
    """One imported module: `module` is its absolute name, `names` what is taken from it."""

    importer: str
    module: str
    names: tuple[str, ...]
    line: int
    relative: bool
    guarded: bool  # by `try:` with a handler
    for_types: bool  # below `if TYPE_CHECKING:`

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self):
        return f"{self.importer}, line {self.line}, imports {self.module}"


def flat_files() -> list[Path]:
    """The files of `modeling_fromage/` that checkpoints carry."""
    return sorted(path for path in PACKAGE.glob("*.py") if path.name not in NOT_SHIPPED)


@cache
def modules(*packages: str) -> dict[str, Path]:
    """Modules of `packages` by name; a package goes by its own name, without `__init__`."""
    found = {}
    for package in packages or PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if FIXTURES not in path.parents:
                found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[Import]:
    """All imports of a module, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and node.handlers]
    guarded = {id(node) for attempt in tries for statement in attempt.body for node in ast.walk(statement)}
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for check in checks for statement in check.body for node in ast.walk(statement)}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, (), node.lineno, False, id(node) in guarded, id(node) in for_types)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = tuple(alias.name for alias in node.names)
            submodules = [f"{module}.{each}" for each in names if f"{module}.{each}" in modules()]
            for target in submodules or [module]:
                kinds = (node.level > 0, id(node) in guarded, id(node) in for_types)
                yield Import(name, target, names, node.lineno, *kinds)


@cache
def all_imports(*packages: str) -> tuple[Import, ...]:
    return tuple(found for name, path in modules(*packages).items() for found in imports(name, path))
