"""Every writer, killed before each of its writes: the same command then ends with the bytes of an undisturbed run.
And long runs: they take no more memory and open files at their end than near their begin.

With SLOW=1 at every write, else at every seventeenth.
"""
import importlib
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

data, lift, distill, probe, d3r = [importlib.import_module(name) for name in (
    "01_data", "02_lift", "04_distill", "05_probe", "06_distill3r")]
STEP = 1 if os.environ.get("SLOW") else 17
WRITES = (os, "fsync"), (os, "replace"), (Image.Image, "save"), (probe.Rows, "write"), (distill.Run, "log")
SMALL = "--preset tiny --device cpu --save_minutes 0 --max_steps 3"
WRITERS = {  # started in a folder of its own; beside it are the files that `good` makes
    "rooms": lambda argv: data.make_rooms("rooms", scenes=2, views=3, size=(24, 32)),
    "distil": distill.main, "cache": d3r.main, "train": d3r.main, "infer": d3r.main, "probe": probe.main}
FLAGS = {
    "rooms": "",
    "distil": f"""--scene_dir ../rooms --out out --operators operators --model ../vit --geometry depth --pixels 768
        --triplets 3 --batch 1 --heldout 2 --hidden 16 --bottleneck 8 --prototypes 16 --resume {SMALL}""",
    "cache": f"cache --scene_dir ../rooms --out out --size 24 32 --views 3 {SMALL}",
    "train": f"train --out out --cache ../cache --encoder ../vit --batch 1 --warmup 1 --resume {SMALL}",
    "infer": f"infer --scene_dir ../rooms/room_000 --out out --weights ../student {SMALL}",
    "probe": "--scene_dir ../rooms --out out --models ../vit --pixels 768 --pairs 2 --max_steps 3 --device cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("killed")
    data.make_rooms(home / "rooms", scenes=2, views=6, size=(24, 32))
    torch.manual_seed(0)
    vit = lift.VisionTransformer(patch=4, dim=16, depth=4, heads=1, registers=1, grid=4, mlp_ratio=2)
    lift.save_vit(vit, home / "vit")
    teacher = importlib.import_module("tiny.teacher").GeometricTeacher((24, 32))
    d3r.write_cache(teacher, home / "rooms", home / "cache", (24, 32), views=3)
    (home / "cache" / "root.json").write_text(json.dumps(str(home / "rooms")))
    config = d3r.StudentConfig(4, 16, 1, 1, 2, 0, 4, 16, 1, 4, (8, 8, 8, 8), 8, False, (24, 32))
    d3r.save_student(d3r.Student(config), home / "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d3r.StudentConfig, "tiny", config)
        yield home


def killed(writer, fatal=math.inf):  # in a process of its own, which ends before its n-th write -> its exit code
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = itertools.count(1)

    def deadly(write):
        def call(*args, **more):
            if next(count) < fatal:
                return write(*args, **more)
            if isinstance(args[0], int):  # a file's number, for fsync: the power goes, and with it the end of the file
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os._exit(9)
        return call
    try:
        for owner, name in WRITES:
            setattr(owner, name, deadly(getattr(owner, name)))
        WRITERS[writer](FLAGS[writer].split())
        os._exit(0)
    except BaseException as error:
        Path(".error").write_text(repr(error))
    finally:
        os._exit(1)


def content(path):  # without what may differ
    if path.name == "log.jsonl":
        return [json.loads(line) | dict(seconds=0) for line in path.read_text().splitlines()]
    stored = path.read_bytes()
    length = 8 + int.from_bytes(stored[:8], "little")
    return (json.loads(stored[8:length]), stored[length:]) if path.suffix == ".safetensors" else stored


def files():  # but for hidden ones, which a killed process may leave
    return {str(path): content(path) for path in Path().rglob("*") if path.is_file() and "/." not in f"/{path}"}


@pytest.mark.parametrize("writer", WRITERS)
def test_killed_before_any_write_and_started_again_it_ends_with_the_same_bytes(home, writer, monkeypatch, capfd):
    def enter(name):
        Path(home, f"{writer}_{name}").mkdir()
        monkeypatch.chdir(home / f"{writer}_{name}")
    enter("whole")
    torch.set_num_threads(1)
    WRITERS[writer](FLAGS[writer].split())  # here, as it imports what the children then have
    whole, kills = files(), 0
    for fatal in itertools.count(1, STEP):
        enter(fatal)
        if killed(writer, fatal) == 0:
            break
        kills += 1
        checkpoints, log = distill.checkpoint_paths("out"), Path("out/log.jsonl")
        if writer in ("distil", "train") and log.exists():  # one step is lost at most
            steps = [distill.read_run(path)[0] for path in checkpoints if path.exists()]
            assert max(steps, default=0) >= len(log.read_text().splitlines()) - 1
        code, error = killed(writer), Path(".error")
        assert code == 0 and not error.exists(), (fatal, code, error.exists() and error.read_text())
        found = files()
        assert not [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)], fatal
    with capfd.disabled():
        print(f"\n{writer}: {kills} kills, then {len(whole)} files the same")
    assert kills


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="three long runs; SLOW=1 runs them")
@pytest.mark.parametrize("writer, owner, name, more", [
    ("distil", distill.Run, "log", "--max_steps 500"), ("train", distill.Run, "log", "--max_steps 500"),
    ("probe", data.Scene, "view", "--scene_dir ../many --views 100")])
def test_memory_and_open_files_stay_flat(home, writer, owner, name, more, monkeypatch, capfd):
    data.make_rooms(home / "many", 20, 100, (24, 32))
    call, taken = getattr(owner, name), []

    def noting(*args, **options):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        taken.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))))
        return call(*args, **options)
    monkeypatch.setattr(owner, name, noting)
    Path(home, f"{writer}_long").mkdir()
    monkeypatch.chdir(home / f"{writer}_long")
    WRITERS[writer](f"{FLAGS[writer]} {more}".split())
    fifth = len(taken) // 5
    early, late = (torch.tensor(part, dtype=torch.float64) for part in (taken[fifth:2 * fifth], taken[-fifth:]))
    with capfd.disabled():
        print(f"\n{writer}: {len(taken)} times, {early.mean(0).tolist()} -> {late.mean(0).tolist()} MB, open files")
    assert len(taken) >= 500 and late[:, 0].mean() < 1.02 * early[:, 0].mean() and late[:, 1].max() == early[:, 1].max()
