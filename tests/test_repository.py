"""Each stage can be copied with the files that its header names, and imports without side effects."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = sorted(p.name for p in ROOT.glob("0*_*.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_copied_with_what_its_header_names(stage, tmp_path):
    copy = re.search(r"^Copy\s+(.*)$", ast.get_docstring(ast.parse((ROOT / stage).read_text())), re.M)[1]
    files = set(re.findall(r"[\w/]+\.(?:py|safetensors)", copy)) | {stage}
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / file, tmp_path / file)
    before = sorted(tmp_path.rglob("*"))
    program = f"import importlib; importlib.import_module('{stage[:-3]}')"
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing written by an import
    helped = subprocess.run([sys.executable, "-B", stage, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0 and "--scene_dir" in helped.stdout and "--out" in helped.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_headers_are_short_and_complete(stage):
    header = ast.get_docstring(ast.parse((ROOT / stage).read_text()))
    assert len(header.splitlines()) <= 25
    for word in ("Paper", "In", "Out", "Run", "Copy", "Not", "Words"):
        assert re.search(rf"^{word}\s", header, re.M), word


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert "torch==2.13.0" in lines and all("==" in line for line in lines)
