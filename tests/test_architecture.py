"""Imports go down, as docs/architecture.md says."""

from __future__ import annotations

import grimp
import pytest

PACKAGE = "mlx_openelm"
# From the top; a module may import those of later lines, and of its own folder.
LAYERS = (
    ("generate", "benchmarks"),
    ("convert",),
    ("models", "sample_utils"),
    ("command",),
    ("streams",),
    ("generation",),
    ("prompt_cache",),
    ("checkpoint",),
    ("tokenizer", "model"),
    ("device",),
    ("backends",),
    ("config",),
    ("files",),
    ("start", "dtypes"),
    ("errors",),
)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)


def test_every_module_has_its_layer(graph: grimp.ImportGraph) -> None:
    known = {f"{PACKAGE}.{name}" for layer in LAYERS for name in layer}
    assert graph.find_children(PACKAGE) - known == {f"{PACKAGE}.__main__"}


def test_imports_go_down(graph: grimp.ImportGraph) -> None:
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for importer in graph.modules - {PACKAGE, f"{PACKAGE}.__main__"}:
        for imported in graph.find_modules_directly_imported_by(importer):
            if imported == PACKAGE:
                continue
            above, below = (name.split(".")[1] for name in (importer, imported))
            if above != below and depth[above] >= depth[below]:
                wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_generation_and_its_drafts_make_no_circle(graph: grimp.ImportGraph) -> None:
    drafts = f"{PACKAGE}.generation.speculative"
    below = graph.find_descendants(f"{PACKAGE}.generation") - graph.find_descendants(drafts)
    above = {f"{PACKAGE}.generation.stream"}
    for module in below - {drafts} - above:
        imported = graph.find_modules_directly_imported_by(module)
        assert not [name for name in imported if name.startswith(drafts)], module
