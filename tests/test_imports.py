"""Imports go one way, heavy libraries stay behind their doors, and `kernels` is no package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
ORDER = (
    "quant",
    "fused",
    "recipe",
    "record_quantizer",
    "fused_quantize",
    "fused_fitted",
    "shared_lengths",
    "fused_states",
    "prompt",
    "score_drop",
    "stored",
    "cache",
    "library_cache",
    "rows",
    "roundtrip",
    "graphs",
    "attention",
    "inject",
    "torchvision_cpu",
    "frames",
    "adapters",
    "harness",
    "environment",
    "cell",
    "settings",
    "suite",
    "store",
    "judge",
    "worker",
    "run",
    "report",
    "cli",
)
ONLY = {
    "lmms_eval": {"adapters", "harness"},
    "hydra": {"settings"},
    "triton": set(),
    "cuda": set(),
}
STANDALONE = "mini"


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: its sub-package, or the file itself."""
    return path.relative_to(PROJECT / "vidkv_eval").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in (PROJECT / "vidkv_eval").rglob("*.py") if path.name != "__init__.py" or path.parent.name != "vidkv_eval")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_file_imports_only_what_stands_before_it(path):
    part = part_of(path)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("vidkv_eval.")}
    if part == STANDALONE:
        return
    assert part in ORDER, f"{part} has no place in the order yet; add it to ORDER"
    later = {name for name in own if name not in ORDER[: ORDER.index(part) + 1]}
    assert not later, f"{part} may not import {later}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_library_is_imported_only_behind_its_door(path):
    roots = {name.split(".")[0] for name in imported(path)}
    for library, doors in ONLY.items():
        assert library not in roots or part_of(path) in doors, f"{library} is for {doors or 'kernels/'}"


def test_kernels_has_no_init_or_it_would_hide_a_package_of_that_name():
    assert not (PROJECT / "kernels" / "__init__.py").exists()


def test_kernels_know_nothing_of_the_program_that_uses_them():
    for path in sorted((PROJECT / "kernels").glob("*.py")):
        assert not [name for name in imported(path) if name.startswith(("vidkv_eval", "transformers", "lmms_eval"))]


def test_triton_is_imported_only_by_the_fast_side_of_an_operation():
    for path in sorted((PROJECT / "kernels").glob("*.py")):
        roots = {name.split(".")[0] for name in imported(path)}
        assert "triton" not in roots or path.stem.endswith("_triton")


def test_references_work_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vidkv_eval.fused, vidkv_kernels.append\n"
        "from vidkv_kernels.ops import OPS\n"
        "for op in OPS: op(*next(iter(op.cases(torch.device('cpu')).values())))\n"
        "print('done')"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    assert output.strip() == "done"


def test_tables_and_plans_load_neither_torch_nor_transformers():
    code = (
        "import sys, vidkv_eval.cell, vidkv_eval.suite, vidkv_eval.store, vidkv_eval.run, vidkv_eval.cli\n"
        "from vidkv_eval.report import record, render, table\n"
        "print([name for name in ('torch', 'transformers', 'lmms_eval', 'decord', 'datasets') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    assert output.strip() == "[]"


def test_quantizing_a_model_needs_neither_hydra_nor_lmms_eval():
    code = (
        "import sys, vidkv_eval.recipe, vidkv_eval.cache, vidkv_eval.inject\n"
        "print([name for name in ('hydra', 'omegaconf', 'lmms_eval', 'decord') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT).stdout
    assert output.strip() == "[]"
