"""One module alone uses private names of DeepSpeed. (The other rules of imports are contracts in pyproject.toml.)"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_docs import ROOT

PACKAGE = ROOT / "safecl"
SHARDS = PACKAGE / "engine" / "zero" / "shards.py"
# Attributes of DeepSpeed's engine, optimizers and parameters that are internal although no underscore says so.
INTERNAL = {
    "averaged_gradients", "bit16_groups", "checkpoint_event_epilogue", "checkpoint_event_prologue", "ds_id", "ds_numel",
    "ds_status", "ds_tensor", "fp16_groups", "fp32_groups", "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat", "grad_partitions_flat_buffer", "single_partition_of_fp32_groups",
    "unscale_and_clip_grads", "update_lp_params",
}  # fmt: skip
INTERNAL_MODULES = ("deepspeed.runtime", "deepspeed.utils.tensor_fragment", "deepspeed.checkpoint")


def names_used(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name, what it is read from) of attributes, also of those named in getattr, hasattr and setattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr, ast.unparse(node.value)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
        ):
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                yield node.lineno, str(node.args[1].value), ast.unparse(node.args[0])


def modules_imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def private_names_of_deepspeed() -> set[str]:
    """INTERNAL, and the names with an underscore that the one module reads from objects that are not its own."""
    used = names_used(ast.parse(SHARDS.read_text()))
    return INTERNAL | {
        name for _, name, owner in used if name.startswith("_") and not name.endswith("__") and owner != "self"
    }


def uses(path: Path, private: set[str]) -> Iterator[str]:
    """Where a module uses a private name or imports an internal module, as `file:line: name`."""
    tree = ast.parse(path.read_text())
    place = path.relative_to(ROOT)
    for line, name, owner in names_used(tree):
        if name in private or (name.startswith("_") and owner.split(".")[-1] == "deepspeed"):
            yield f"{place}:{line}: {owner}.{name}"
    for line, module in modules_imported(tree):
        if module.startswith(INTERNAL_MODULES):
            yield f"{place}:{line}: import of {module}"


def test_one_module_alone_uses_private_names_of_deepspeed():
    private = private_names_of_deepspeed()
    found = [use for path in sorted(PACKAGE.rglob("*.py")) if path != SHARDS for use in uses(path, private)]
    assert not found, "\n".join(found)


def test_the_search_finds_the_private_names_where_they_are():
    found = list(uses(SHARDS, private_names_of_deepspeed()))
    assert any("_global_grad_norm" in use for use in found) and any("deepspeed.runtime" in use for use in found)
    assert INTERNAL & {name for _, name, _ in names_used(ast.parse(SHARDS.read_text()))}
