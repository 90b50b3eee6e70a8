"""Which module may import which: every import of the repository is looked at, those inside functions too."""

from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.source_code import Import, all_imports, flat_files, modules

CODE = ("modeling_fromage", "training", "hub_scripts")
# By sub-package of modeling_fromage, the others that it may import; each may import itself and the flat files.
MAY_IMPORT: dict[str, set[str]] = {
    "index": {"io"},
    "io": set(),
    "trainer": {"io"},
    "original": {"index"},
    "serving": {"index", "io"},
}
MODEL = {
    "adapter",
    "backbone_checks",
    "backbones",
    "backbone_loading",
    "backbone_probes",
    "checkpoint",
    "checkpoint_files",
    "checkpoint_origin",
    "configuration",
    "file_writing",
    "fingerprint",
    "frozen_lm",
    "generation",
    "image_ids",
    "images",
    "losses",
    "packing",
    "peft_layers",
    "plain_text",
    "pretrained",
    "processing",
    "prompts",
    "scoring",
    "training_losses",
}
MODEL = "modeling_fromage.modeling_fromage"


def room(module: str) -> str:
    """The sub-package of modeling_fromage that holds a module, "" for a flat one."""
    parts = module.split(".")
    is_package = modules()[module].name == "__init__.py"
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and is_package) else ""


def internal(*packages: str) -> list[Import]:
    return [each for each in all_imports(*packages) if each.module in modules()]


def reached_from(module: str) -> set[str]:
    """Modules that importing this one imports, now or later, but for what is guarded or there for types alone."""
    edges: dict[str, set[str]] = {}
    for each in internal("modeling_fromage"):
        if not each.guarded and not each.for_types:
            edges.setdefault(each.importer, set()).add(each.module)
    found, left = set(), [module]
    while left:
        for target in edges.get(left.pop(), set()) - found:
            found.add(target)
            left.append(target)
    return found


def test_nothing_imports_what_stands_above_it():
    for each in all_imports(*CODE):
        allowed = {each.importer.partition(".")[0], "modeling_fromage"}
        assert each.package not in {*CODE, "tests"} - allowed, str(each)
        assert not f"{each.module}.".startswith(("modeling_fromage.training.", "modeling_fromage.hub_scripts.")), str(
            each
        )


def test_imports_of_ones_own_package_are_relative():
    """training/ and hub_scripts/ have other names once they are installed; flat files are remote code."""
    for each in internal(*CODE):
        is_own = each.package == each.importer.partition(".")[0]
        lies_flat = each.package == "modeling_fromage" and not room(each.importer)
        assert each.relative == is_own or (lies_flat and each.guarded), str(each)


def test_flat_files_reach_subpackages_only_in_a_try():
    for each in internal("modeling_fromage"):
        if each.importer != "modeling_fromage" and not room(each.importer) and room(each.module):
            assert each.guarded and not each.relative, f"{each}: it must be absolute, in a `try:`"


def test_subpackages_import_only_what_they_may():
    for each in internal("modeling_fromage"):
        source, target = room(each.importer), room(each.module)
        if source and target != source:
            assert each.module != "modeling_fromage", f"{each}: the package imports its parts, they do not import it"
            assert not target or target in MAY_IMPORT[source], str(each)


def test_flat_modules_do_not_import_the_package():
    for each in internal("modeling_fromage"):
        assert each.module != "modeling_fromage", str(each)


def test_the_configuration_stands_below_everything():
    allowed = {name for name in modules("modeling_fromage") if name.startswith("modeling_fromage.vision_")}
    assert reached_from("modeling_fromage.configuration_fromage") <= allowed


@pytest.mark.parametrize("path", flat_files(), ids=lambda path: path.stem)
def test_no_flat_module_imports_the_model(path):
    """The model stands on them; the processor and the pipeline take any object that works as it does."""
    assert MODEL not in reached_from(f"modeling_fromage.{path.stem}")


@pytest.mark.parametrize("name", ["losses", "packing"])
def test_functions_of_tensors_import_nothing_of_ours(name):
    assert reached_from(f"modeling_fromage.{name}_fromage") == set()


def test_no_cycles():
    """But for what flat files reach in a `try:`, when it is asked for, and imports for types alone."""
    graph: dict[str, set[str]] = {}
    for each in internal(*CODE):
        if not each.for_types and not (each.guarded and not each.relative):
            graph.setdefault(each.importer, set()).add(each.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_test_module_is_imported():
    """What tests share is in tests/helpers."""
    for each in internal("tests"):
        assert not each.module.rpartition(".")[2].startswith("test_"), str(each)
