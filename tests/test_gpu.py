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

SMALL = "--max_steps 1 --triplets 1 --heldout 1 --eval_every 1 --pixels 3072 --geometry depth --batch 1".split()  # of 04
VIEWS = "--pixels 3072 --max_steps 1 --views 2 --pairs 2".split()  # of 05
DISTILL3R = "--preset tiny --cache cache --out d3r".split()
COMMANDS = {  # name -> the stage and what it is told, all in one folder, one after the other
    "02": ("02_lift", "--pixels 3072 --out 02"),
    "03": ("03_splat", "--pixels 3072 --out 03"),
    "04 with operators": ("04_distill", "--preset tiny --out 04"),
    "04 online, without masks": ("04_distill", "--preset tiny --out online --online --no_blend"),
    "04 adapters in half precision": ("04_distill", "--preset tiny --out lora --no-full_finetune --bf16 --grad_checkpoint"),
    "04 cosine loss": ("04_distill", "--preset tiny --out cosine --loss cosine --frozen_teacher"),
    "04 feature rendering": ("04_distill", "--preset tiny --out feature --loss feature --upscale bilinear"),
    "04 correspondence loss": ("04_distill", "--preset tiny --out correspondence --loss correspondence"),
    "04 the control": ("04_distill", "--preset tiny --out control --target image"),
    "04 fine-tuned geometry": ("04_distill", "--preset tiny --out geometry --geometry mvsplat --finetune_geometry 1 --bf16"),
    "05": ("05_probe", "--models tiny 04/student tiny+04/student --out 05"),
    "06 cache": ("06_distill3r", "cache"), "06 train": ("06_distill3r", "train --max_steps 1"),
    "06 train in half precision": ("06_distill3r", "train --max_steps 1 --bf16 --grad_checkpoint --out d3r16"),
    "06 eval": ("06_distill3r", "eval"),  # the rows of gpu.py run `table`
    "06 infer": ("06_distill3r", "infer --images rooms/room_000/images --weights d3r/student --out 06")}


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


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{name: what went wrong, or ""} of COMMANDS, run one after the other by one process."""
    if not FAKE.exists():
        pytest.skip(f"{FAKE}, the pretended CUDA device, is not here")
    program = """if True:
        import importlib, json, sys, traceback
        sys.path[:0] = sys.argv[1:3]
        import fake_cuda
        installed, result = fake_cuda.install(), {}
        importlib.import_module("01_data").make_rooms("rooms", scenes=2, views=8, size=(48, 64))
        for name, (stage, arguments) in json.loads(sys.argv[3]).items():
            try:
                importlib.import_module(stage).main(arguments)
                result[name] = ""
            except BaseException:
                result[name] = traceback.format_exc()[-3500:]
        distill, result["04 waits"] = sys.modules["04_distill"], []
        for loss in ("distill", "cosine", "correspondence"):
            args = distill.parse([*json.loads(sys.argv[4]), "--loss", loss])
            scenes, _, source = distill.prepare(args)
            _, student, teacher, optimiser = distill.networks_of(args)
            batch = [source.sample(*place, 0) for place in distill.draw_triplets(scenes, 2, 0)]
            with fake_cuda.watch() as seen:
                distill.learn(batch, student, teacher, args)
                optimiser.step()
                distill.ema_update(teacher, student, 0.9)
            result["04 waits"].append(sum(seen.syncs.values()))
        d3r, torch, result["06 waits"] = sys.modules["06_distill3r"], sys.modules["torch"], []
        args = d3r.parse(["train", "--preset", "tiny", "--device", "cuda"])
        student = d3r.new_student(args).to("cuda")
        for views in (3, 20):
            m = d3r.Pointmap(*torch.rand(2, 48, 64, 3) + 1, *torch.rand(2, 48, 64) + 2)
            sample = d3r.CachedSample("s", [torch.rand(3, 48, 64)] * views, [m] * views, [m.conf_local > 2.2] * views)
            with fake_cuda.watch() as seen:
                d3r.learn_samples([sample], student, args, [0])
            result["06 waits"].append(sum(seen.syncs.values()))
        open("result.json", "w").write(json.dumps(result))"""
    folder, more = tmp_path_factory.mktemp("commands"), {"04_distill": SMALL, "05_probe": VIEWS}
    asked = {}
    for name, (stage, arguments) in COMMANDS.items():
        first, *rest = arguments.split()
        given = [first, *DISTILL3R, *rest] if stage == "06_distill3r" else [*more.get(stage, []), first, *rest]
        given += [] if "--images" in rest else ["--scene_dir", "rooms"]
        asked[name] = stage, [*given, "--device", "cuda"]
    waiting = "--preset tiny --bf16 --no-full_finetune --prototypes 128 --scene_dir rooms --device cuda".split()
    told = map(json.dumps, (asked, [*SMALL, *waiting]))
    done = subprocess.run([sys.executable, "-c", program, FAKE.parent, ROOT, *told], cwd=folder,
                          capture_output=True, text=True, env=os.environ | {"FAKE_CUDA_PROJECT": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_on_the_device(commands, name):
    untrained = name == "06 infer" and "train the student for longer" in commands[name]  # the networks ran; no camera comes of it
    assert untrained or commands[name] == ""


def test_how_often_a_step_waits_for_the_device(commands):
    assert commands["04 waits"] == [3, 3, 3]  # for each loss: one a triplet, and one for the numbers of the log
    assert commands["06 waits"] == [3, 3]  # however many views it has


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
