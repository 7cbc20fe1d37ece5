"""What the stages promise as files: they can be copied, they read as agreed, and what the pages say of them is true."""
import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import differences

ROOT = Path(__file__).parents[1]
STAGES = sorted(p.name for p in ROOT.glob("0*_*.py"))
WORKSHOP = "# ---- Workshop: not needed to understand the method ----"
EQUATIONS = [f"SnD Eq. {n}" for n in range(1, 6)] + [f"Distill3R Eq. {n}" for n in range(1, 7)]
README = (ROOT / "README.md").read_text()


def header(stage):
    return ast.get_docstring(ast.parse((ROOT / stage).read_text()))


def companions(stage):  # the files that its header says go together
    copy = re.search(r"^Copy\s+(.*(?:\n\s+.*)*)$", header(stage), re.M)[1]
    return set(re.findall(r"[\w/]+\.(?:py|safetensors)", copy)) | {stage}


def copy_to(folder, *stages):
    for file in set().union(*map(companions, stages)):
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / file, folder / file)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_copied_with_what_its_header_names(stage, tmp_path):
    copy_to(tmp_path, stage)
    before = sorted(tmp_path.rglob("*"))
    program = f"import importlib; importlib.import_module('{stage[:-3]}')"
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing written by an import


def test_the_first_stage_works_alone(tmp_path):
    copy_to(tmp_path, "01_data.py")
    rooms = "--rooms 3 --views 3 --size 24 32 --scene_dir rooms".split()
    done = subprocess.run([sys.executable, "-B", "01_data.py", *rooms], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "room_000" in done.stdout and "3 scenes" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_help_needs_neither_data_nor_weights(stage, tmp_path):
    for file in ROOT.glob("0*_*.py"):
        shutil.copy(file, tmp_path)
    helped = subprocess.run([sys.executable, "-B", stage, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0 and "--scene_dir" in helped.stdout and "--out" in helped.stdout, helped.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_headers_are_short_and_complete(stage):
    assert len(header(stage).splitlines()) <= 30
    for word in ("Paper", "In", "Out", "Run", "Copy", "Read", "Try", "Not", "Words"):
        assert re.search(rf"^{word}\s", header(stage), re.M), word


@pytest.mark.parametrize("stage", STAGES)
def test_read_names_what_part_1_defines_in_its_order(stage):
    part_1, _, _ = (ROOT / stage).read_text().partition(WORKSHOP)
    named = re.search(r"^Read\s+(.*(?:\n\s+.*)*)", header(stage), re.M)[1]
    names = [name for name in re.findall(r"[A-Za-z_]\w*(?:\.\w+)?", named) if re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", part_1, re.M)]
    places = [re.search(rf"^\s*(?:def|class) {name.split('.')[0]}\b", part_1, re.M).start() for name in names]
    assert len(names) >= 4 and places == sorted(places), names


@pytest.mark.parametrize("file", [*STAGES, *sorted(f"tiny/{path.name}" for path in ROOT.glob("tiny/*.py"))])
def test_functions_and_lines_are_short(file):
    text = (ROOT / file).read_text()
    assert text.count(f"\n{WORKSHOP}\n") == (file in STAGES)
    long = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 50]
    wide = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not long and not wide, (long, wide)


def test_every_equation_stands_on_a_line_that_computes_it():
    found = set()
    for path in differences.STAGES:
        for _, words, beside_code in differences.comments(path.read_text()):
            for paper, first, last in re.findall(r"(SnD|Distill3R) Eq\. (\d)(?:-(\d))?", words if beside_code else ""):
                found |= {f"{paper} Eq. {n}" for n in range(int(first), int(last or first) + 1)}
    assert not set(EQUATIONS) - found


def test_the_table_of_differences_is_what_the_comments_say():
    assert (ROOT / "docs" / "differences.md").read_text() == differences.page(), "run python tests/differences.py"


def test_no_name_has_two_meanings():
    """Functions and classes of two stages may share a name only where the later one builds on the earlier."""
    where = {}
    for path in differences.STAGES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in where.items() if len(files) > 1 and name not in ("main", "parse", "Attention", "Block")} == {}


def test_the_front_page_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2200
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "tiny/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_lines_of_part_1_are_those_of_the_front_page():
    for stage in STAGES:
        lines = (ROOT / stage).read_text().partition(WORKSHOP)[0].count("\n")
        said = int(re.search(rf"^{stage}\s+(\d+) lines", README, re.M)[1])
        assert abs(lines - said) <= 0.05 * lines, f"{stage} has {lines} lines before the workshop, README says {said}"


EXAMPLES = re.findall(r"```python\n(.*?)```", README.partition("## Copy a stage")[2].partition("\n## ")[0], re.S)


@pytest.mark.parametrize("number", range(3))
def test_the_three_examples_of_the_front_page_run_as_printed(number, tmp_path):
    program = EXAMPLES[number]
    assert len(EXAMPLES) == 3
    stage = re.search(r'import_module\("(\w+)"\)', program)[1] + ".py"
    copy_to(tmp_path, stage)
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert "torch==2.13.0" in lines and all("==" in line for line in lines)
