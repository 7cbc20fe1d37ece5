"""The commands of 03_splat.py: fine-tuning as a user starts it, runs that are killed, flights, and bad input."""
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

data, lift, splat = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat"))
ROOT = Path(__file__).parents[1]
SMALL = ["--device", "cpu", "--pixels", "1536", "--heldout", "2"]


def main(*arguments):
    return splat.main([str(a) for a in arguments])


def refusal(*arguments):
    """The one line that main leaves with."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def without_depth(rooms_dir, folder):
    """One room of the four, its depth maps taken away."""
    shutil.copytree(rooms_dir / "room_000", folder / "room", ignore=shutil.ignore_patterns("depth"))
    path = folder / "room" / "transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"] = [{key: value for key, value in frame.items() if "depth" not in key} for frame in meta["frames"]]
    path.write_text(json.dumps(meta))
    assert data.load_scenes(folder)[0].view(0).depth is None
    return folder


# ------------------------------------------------------------------------------------------------ the loss and the scores


def test_dissimilarity_is_one_minus_ssim():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 20, 24, generator=generator)
    assert splat.dissimilarity(a, a).abs().max() < 1e-5
    y, x = 9, 13  # one window by the definition (Wang et al. 2004), population statistics
    p, q = (image[0, y - 3 : y + 4, x - 3 : x + 4].double().flatten() for image in (a, b))
    covariance = ((p - p.mean()) * (q - q.mean())).mean()
    ssim = ((2 * p.mean() * q.mean() + 0.01**2) * (2 * covariance + 0.03**2)
            / ((p.mean() ** 2 + q.mean() ** 2 + 0.01**2) * (p.var(correction=0) + q.var(correction=0) + 0.03**2)))
    assert abs(1 - splat.dissimilarity(a, b)[0, y, x].item() - ssim.item()) < 1e-5


@pytest.fixture(scope="module")
def sample(rooms):
    return splat.load_triplet(rooms[0], data.sample_triplet(rooms[0], torch.Generator().manual_seed(0)), (48, 64), "cpu")


def test_measured_depth_is_the_best_geometry_and_has_no_error(sample):
    image, depth, best = splat.judge("depth", sample)
    assert best["AbsRel"] < 1e-5 and image.shape == (3, 48, 64) and depth.shape == (48, 64)
    where = splat.judged_pixels(sample)
    assert best["PSNR"] == pytest.approx(-10 * math.log10((image - sample.images[2]).square().mean(0)[where].mean()), abs=1e-4)
    bent = sample._replace(depth=sample.depth * torch.tensor([1.3, 0.8, 1])[:, None, None])
    assert splat.judge("depth", bent)[2]["PSNR"] < best["PSNR"] - 1


def test_without_depth_the_whole_view_counts(sample):
    assert splat.judged_pixels(sample._replace(depth=None)).all() and not splat.judged_pixels(sample).all()
    assert splat.judged_pixels(sample._replace(depth=0 * sample.depth)).all()  # nothing measured is as good as no depth
    holes = sample._replace(depth=sample.depth.clone())
    holes.depth[2, :10] = 0
    assert not splat.judged_pixels(holes)[:10].any() and splat.judged_pixels(holes)[10:].any()


def test_transparency_does_not_pay(sample):
    """The loss sees uncovered pixels as black: a network that hides what it cannot explain does worse."""
    net = lift.load_mvsplat("tiny")
    shown = splat.geometry_loss(net, sample, 0)[1]["mse"]
    net.depth_predictor["to_disparity"][2].bias.data[1] -= 20  # the opacity's logit
    assert splat.geometry_loss(net, sample, 0)[1]["mse"] > 2 * shown


# ------------------------------------------------------------------------------------------------ the run


def test_photographs_alone_mend_bent_geometry(rooms_dir, tmp_path, capsys):
    """Start from weights whose disparity is off by a tenth of the nearest: views are held out, and no depth is in the loss."""
    net = lift.load_mvsplat("tiny")
    net.depth_predictor["to_disparity"][2].bias.data[0] += 0.1
    lift.save_tensors(tmp_path / "bent.safetensors", net.state_dict())
    out = tmp_path / "run"
    arguments = "--scene_dir", rooms_dir, "--geometry", "mvsplat", "--mvsplat", tmp_path / "bent.safetensors", "--out", out
    main(*arguments, "--device", "cpu", "--pixels", 3072, "--heldout", 4, "--max_steps", 24, "--lr", 5e-4)
    result = json.loads((out / "result.json").read_text())
    before, after = result["start"], result["fine-tuned"]
    assert after["PSNR"] > before["PSNR"] + 0.5 and after["SSIM"] > before["SSIM"] + 0.05
    assert after["AbsRel"] < 0.8 * before["AbsRel"]
    assert result["depth"]["PSNR"] > after["PSNR"] and "sweep" in result
    printed = capsys.readouterr().out
    assert f"start      PSNR {before['PSNR']:.2f}" in printed and f"fine-tuned PSNR {after['PSNR']:.2f}" in printed
    assert Image.open(out / "finetune.png").width > 6 * 150
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(24)) and log[-1]["lr"] < log[0]["lr"]
    trained = {line["triplet"].split(":")[0] for line in log}
    assert trained and not trained & {name.split(":")[0] for name in result["heldout"]}
    theirs = lift.load_mvsplat(out / "mvsplat.safetensors").state_dict()
    assert all(not torch.equal(value, theirs[key]) for key, value in net.state_dict().items())


def test_a_killed_run_resumes_bit_identically(rooms_dir, tmp_path):
    common = ["--scene_dir", rooms_dir, "--geometry", "mvsplat", "--max_steps", 6, "--save_minutes", 0, "--depth_weight", 0.05, *SMALL]
    main("--out", tmp_path / "whole", *common)
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "03_splat.py"), "--out", str(out), *map(str, common)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.safetensors").exists() and killed.poll() is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (out / "mvsplat.safetensors").exists()
    assert "--resume goes on" in refusal("--out", out, *common)
    assert "lr 0.0002 -> 0.5" in refusal("--out", out, *common, "--lr", "0.5", "--resume")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 5, "tri')  # as a power cut may leave it
    main("--out", out, *common, "--resume")
    for name in ("mvsplat.safetensors", "result.json", "finetune.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    read = lambda path: [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
    log = read(out / "log.jsonl")
    assert log == read(tmp_path / "whole" / "log.jsonl") and len(log) == 6 and all("depth" in line for line in log)


def test_a_single_scene_without_depth_is_fine_tuned(rooms_dir, tmp_path, capsys):
    folder = without_depth(rooms_dir, tmp_path / "scene")
    arguments = "--scene_dir", folder, "--geometry", "mvsplat", "--max_steps", 1, "--batch", 2, *SMALL
    main("--out", tmp_path / "out", *arguments)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "AbsRel" not in result["start"] and "depth" not in result and "whole views" in capsys.readouterr().out
    assert "no measured depth for --depth_weight" in refusal("--out", tmp_path / "x", *arguments, "--depth_weight", "0.1")
    flight = "--scene_dir", folder, "--flight", "--geometry", "depth", "--out", tmp_path / "x"
    assert "no measured depth for --geometry depth" in refusal(*flight)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments,says", [
    (["--scene_dir", "no_such_folder"], "no_such_folder: no such folder"),
    (["--scene_dir", "no_such_folder", "--geometry", "mvsplat"], "no_such_folder: no such folder"),
    (["--mvsplat", "no_such_weights", "--geometry", "mvsplat"], "no_such_weights: no such weights"),
    (["--ply", "no_such.ply"], "no_such.ply: no such file"),
    (["--ply", __file__], "not a .ply file"),
    (["--device", "cuda:99"], "--device cuda:99")])
def test_bad_input_is_one_line(tmp_path, arguments, says):
    assert says in refusal(*arguments, "--out", tmp_path / "out") and not (tmp_path / "out").exists()


def test_a_geometry_without_weights_cannot_be_fine_tuned(capsys):
    with pytest.raises(SystemExit):
        main("--geometry", "sweep")
    assert "it goes with --flight" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ pictures


def test_the_plain_command_shows_every_geometry(rooms_dir, tmp_path, capsys):
    main("--scene_dir", rooms_dir, "--out", tmp_path, "--device", "cpu", "--pixels", 3072)
    printed = capsys.readouterr().out
    scores = {name: float(printed.split(f"{name} ")[1].split()[0].rstrip(",)")) for name in ("mvsplat", "sweep", "depth", "mean colour")}
    assert scores["depth"] > scores["mean colour"] + 3 and scores["sweep"] > scores["mean colour"] + 3, printed
    assert Image.open(tmp_path / "novel_view.png").width > 8 * 150


def frames(path):
    film = Image.open(path)
    pictures = []
    for n in range(film.n_frames):
        film.seek(n)
        pictures.append(torch.frombuffer(bytearray(film.convert("RGB").tobytes()), dtype=torch.uint8).float())
    return film, torch.stack(pictures)


def test_a_flight_between_two_views(rooms_dir, tmp_path, capsys):
    main("--scene_dir", rooms_dir, "--flight", "--geometry", "depth", "--out", tmp_path, "--device", "cpu", "--pixels", 1536)
    assert str(tmp_path / "flight.webp") in capsys.readouterr().out
    film, pictures = frames(tmp_path / "flight.webp")
    step = (pictures - pictures.roll(1, 0)).abs().mean(1)  # also from the last frame to the first
    assert film.n_frames == 48 and film.info["loop"] == 0 and film.size == (672, 224)
    assert step.max() < 12 < (pictures[0] - pictures[24]).abs().mean() and (pictures[6] - pictures[-6]).abs().mean() < 3


def test_poses_between_two_cameras_are_rigid_and_reach_both(sample):
    a, b = sample.c2w[:2]
    poses = splat.between(a, b, 10)
    assert (poses[0] - a).abs().max() < 1e-5 and (poses[5] - b).abs().max() < 1e-5
    R = poses[:, :3, :3]
    assert (R @ R.mT - torch.eye(3)).abs().max() < 1e-5 and torch.linalg.det(R).min() > 0.999


def test_a_flight_around_a_file(tmp_path):
    """A red ball at one side of a green one: seen in front of it, beside it and behind it, upright and in the middle."""
    g = torch.Generator().manual_seed(0)
    red = torch.arange(400) < 200
    points = 0.3 * torch.randn(400, 3, generator=g) * torch.tensor([1, 0.5, 1])
    points[:, 0] += torch.where(red, 5.0, 6.0)
    ball = SimpleNamespace(means=points, covariances=0.003 * torch.eye(3).repeat(400, 1, 1), opacities=torch.full((400,), 0.9))
    splat.save_ply(tmp_path / "balls.ply", ball, torch.where(red[:, None], torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])))
    main("--ply", tmp_path / "balls.ply", "--out", tmp_path, "--device", "cpu")
    film, pictures = frames(tmp_path / "flight.webp")
    colour = pictures.view(48, film.height, film.width, 3)[:, :, : film.width // 2]
    x = torch.arange(film.width // 2) - film.width / 4 + 0.5
    place = lambda c: (colour[..., c].sum(1) @ x) / colour[..., c].sum((1, 2))
    assert film.n_frames == 48 and (colour.sum((1, 2, 3)) > 0).all()
    side = place(0) - place(1)
    assert side.max() > 100 and side.min() < -100 and (side.diff().abs() < 60).all()  # it goes all the way round
    assert (place(0) + place(1)).abs().max() < film.width / 8
    poses = splat.orbit(points, 8)
    assert (poses[:, 1, 1] > 0.5).all()  # image down is world +y, the axis of least spread


def test_a_file_without_gaussians_is_named(tmp_path):
    none = SimpleNamespace(means=torch.zeros(0, 3), covariances=torch.zeros(0, 3, 3), opacities=torch.zeros(0))
    splat.save_ply(tmp_path / "none.ply", none, torch.zeros(0, 3))
    assert "none.ply: holds no Gaussians" in refusal("--ply", tmp_path / "none.ply", "--out", tmp_path / "out")


def test_orbit_of_one_gaussian_is_finite():
    assert splat.orbit(torch.ones(1, 3), 4).isfinite().all()
