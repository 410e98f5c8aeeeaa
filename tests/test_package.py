"""`pip install .` brings what a run needs: recipes, the embedded world, the report's page, DeepSpeed's settings."""

import shutil
import subprocess
import sys
import zipfile

from dmd_ds.recipe import PACKAGE, REPOSITORY


def test_the_wheel_holds_all_files_of_the_package_and_the_pinned_dependencies(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "ds_configs", source / "ds_configs")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (opened.read(name).decode() for name in names if name.endswith("/METADATA"))
    files = {str(path.relative_to(source)) for path in (source / PACKAGE.name).rglob("*") if path.is_file()}
    assert {"dmd_ds/assets/report/page.html", "dmd_ds/recipes/tiny.yaml", "dmd_ds/assets/tiny-latents/index.json"} <= files <= names
    assert {name.rsplit("/")[-1] for name in names if "/share/dmd_ds/ds_configs/" in name} == {
        path.name for path in (REPOSITORY / "ds_configs").iterdir()
    }
    assert "Requires-Dist: torch==2.13.0" in metadata and "License-Expression: Apache-2.0" in metadata
