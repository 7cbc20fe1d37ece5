"""Shared by all tests: the repository on the path, quiet threads, four rooms, two crooked scenes; two processes where
the whole suite runs."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on shared cores its waiting threads would otherwise spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are small, and several processes run at a time
sys.path.insert(0, str(Path(__file__).parents[1]))

import importlib

import numpy as np
import pytest
from PIL import Image

BESIDE = ("test_04_distill.py", "test_05_probe.py", "test_gpu.py", "test_reproduce.py")  # half of the suite's time
OTHER_HALF = pytest.StashKey[tuple]()  # its process, and the file that it writes to


def pytest_sessionstart(session):
    config = session.config
    if config.args_source == config.ArgsSource.TESTPATHS and not config.option.collectonly:  # no tests were named
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *config.invocation_params.args]
        output = tempfile.TemporaryFile("w+")
        files = [Path(__file__).with_name(name) for name in BESIDE]
        config.stash[OTHER_HALF] = subprocess.Popen([*command, *files], stdout=output, stderr=subprocess.STDOUT), output


def pytest_ignore_collect(collection_path, config):
    return True if OTHER_HALF in config.stash and collection_path.name in BESIDE else None


def pytest_sessionfinish(session):
    if OTHER_HALF in session.config.stash:
        process, _ = session.config.stash[OTHER_HALF]
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            process.terminate()
        codes = {session.exitstatus, process.wait()} - {pytest.ExitCode.NO_TESTS_COLLECTED}  # of one half, with -k
        session.exitstatus = max(map(abs, codes), default=pytest.ExitCode.NO_TESTS_COLLECTED)  # below 0: killed by a signal


def pytest_terminal_summary(terminalreporter, config):
    if OTHER_HALF in config.stash:
        _, output = config.stash[OTHER_HALF]
        output.seek(0)
        terminalreporter.section(f"in a process beside this one: {', '.join(BESIDE)}")
        terminalreporter.write(output.read())
        terminalreporter.section("in this process")


@pytest.fixture(scope="session")
def rooms_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "data"
    importlib.import_module("01_data").make_rooms(folder, scenes=4, views=12)
    return folder


@pytest.fixture(scope="session")
def rooms(rooms_dir):
    return importlib.import_module("01_data").load_scenes(rooms_dir)


@pytest.fixture(scope="session")
def crooked_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crooked") / "data"
    for seed in (0, 1):
        write_crooked(folder / f"crooked_{seed}", seed)
    return folder


@pytest.fixture(scope="session")
def crooked(crooked_dir):
    return importlib.import_module("01_data").load_scenes(crooked_dir)


def write_crooked(folder, seed, views=12):
    """A ball before a slanted wall, and nothing as simple as in a room: each view has its own K, every third one is
    upright, cameras are turned, the nearest depth is 3, some is unknown, and a stripe has neither mask nor label."""
    data, rng, frames = importlib.import_module("01_data"), np.random.default_rng(seed), []
    wall, ball, radius, waves = np.array([0.03, 0.02, -0.14]), np.array([0.1, 0, 5]), 1.2, rng.uniform(1, 4, (3, 3))
    for i in range(views):
        height, width = size = (64, 48) if i % 3 == 2 else (48, 64)
        fx, fy, cx, cy = np.array([60, 60, width / 2, height / 2]) + rng.uniform(-1, 1, 4) * [8, 8, 2, 2]
        c2w = np.eye(4)
        c2w[:3, :3] = data.rotation_of([1, *rng.uniform(-0.05, 0.05, 3)])
        c2w[:3, 3] = 0.25 * i - 1.4, *rng.uniform(-0.2, 0.2, 2)
        y, x = np.mgrid[:height, :width] + 0.5
        rays = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones(size)], -1) @ c2w[:3, :3].T  # as long as z is 1
        o = c2w[:3, 3] - ball
        a, b, c = (rays**2).sum(-1), rays @ o, o @ o - radius**2
        hits = b * b > a * c
        z = (-b - np.sqrt(np.where(hits, b * b - a * c, 0))) / a
        z = np.where(hits, z, -(1 + wall @ c2w[:3, 3]) / (rays @ wall))
        place = c2w[:3, 3] + rays * z[..., None]
        normal = np.where(hits[..., None], place - ball, wall)
        normal = (normal / np.linalg.norm(normal, axis=-1, keepdims=True)) @ c2w[:3, :3]
        label = np.where(hits, 2, 1 + 2 * (place[..., 0] > 0.5)).astype(np.uint8)  # the wall has two halves
        label[np.abs(place[..., 1] - 0.6) < 0.2] = 255
        row, col = rng.integers(8, 32, 2)
        z[row:row + 9, col:col + 12] = 0
        maps = dict(images=255 * (0.5 + 0.45 * np.sin(place @ waves)), depth=1000 * z, normals=127.5 * (normal + 1),
                    masks=np.where(label == 255, 0, label + i), labels=label)  # no id means the same in two views
        for name, picture in maps.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            kind = np.uint16 if name == "depth" else np.uint8
            Image.fromarray(np.round(picture).astype(kind)).save(folder / f"{name}/{i:03d}.png")
        frames.append(dict(file_path=f"images/{i:03d}.png", w=width, h=height, fl_x=fx, fl_y=fy, cx=cx, cy=cy,
                           transform_matrix=(c2w @ data.OPENGL).tolist()))
    meta = dict(depth_unit_scale_factor=1e-3, class_names=["", "left", "ball", "right"], frames=frames)
    (folder / "transforms.json").write_text(json.dumps(meta))
