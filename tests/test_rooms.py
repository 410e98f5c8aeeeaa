"""What the import linter cannot see: no room but parallel/ and the loop that drives it knows torch.distributed."""

import ast

from dmd_ds.recipe import PACKAGE


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_model_and_the_losses_know_no_ranks():
    files = {str(path.relative_to(PACKAGE)): imported(path.read_text()) for path in PACKAGE.rglob("*.py")}
    knowing = {name for name, modules in files.items() if any(module.startswith("torch.distributed") for module in modules)}
    assert {name for name in knowing if not name.startswith("parallel/")} <= {"trainer.py", "bench/counting.py"}
    assert "parallel/mesh.py" in knowing  # the search finds what is there
