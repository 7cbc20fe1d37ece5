"""tests/gpu.py at toy size on a pretended CUDA device, so that it does not fail on the day when there is a real one."""
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FAKE = ROOT.parent / "shared/tools/fake_cuda.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What tests/gpu.py --toy printed, and the numbers it left."""
    if not FAKE.exists():
        pytest.skip(f"{FAKE}, the pretended CUDA device, is not here")
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, str(FAKE), "tests/gpu.py", "--toy", "--out", str(out)]
    env = os.environ | {"FAKE_CUDA_PROJECT": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text())


def test_every_row_is_measured(run):
    printed, found = run
    gpu = importlib.import_module("gpu")
    assert {row["section"] for row in found["rows"]} == set(gpu.SECTIONS)
    assert [row for row in found["rows"] if "failed" in row] == []
    for row in found["rows"]:
        numbers = [x for x in row["measured"].values() if isinstance(x, (int, float))]
        assert numbers and all(math.isfinite(x) and x >= 0 for x in numbers), row
    lines = printed.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(found["rows"])  # one table, with its header
    for key in ("card", "driver", "torch", "date"):
        assert any(line.startswith(f"{key}: {found[key]}") for line in lines)


def test_the_device_agrees_with_the_cpu(run):
    rows = {row["what"]: row["measured"] for row in run[1]["rows"] if row["section"] == "fixtures"}
    assert len(rows) == 3
    for measured in rows.values():
        for what, value in measured.items():
            assert value < (5e-3 if what == "largest error of the image" else 1e-5), (what, value)


def test_one_failing_row_does_not_lose_the_others(tmp_path, capsys, monkeypatch):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    args = gpu.parse(["--out", str(tmp_path / "gpu.json"), "--budget", "100"])
    args.device = torch.device("cpu")
    report = gpu.Report(args)
    report.row("first", lambda: {"ms": 1.0})
    report.row("second", lambda: {}["no such key"])
    report.row("third", lambda: sys.exit("no weights"))
    report.row("fourth", lambda: {"ms": 2.0}, lambda found: f"{found['ms']} times")
    report.row("fifth", lambda: {"ms": 3.0}, needs=200)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row.get("failed", "").split(":")[0] for row in rows] == ["", "KeyError", "SystemExit", "", "TimeoutError"]
    assert rows[3]["beside"] == "2.0 times" and "too few are left" in rows[4]["failed"]


def test_without_a_card_it_says_so():
    gpu = importlib.import_module("gpu")
    if torch.cuda.is_available():
        pytest.skip("there is a card: run tests/gpu.py itself")
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main([])
