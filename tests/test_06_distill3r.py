"""06_distill3r.py, the training and the commands as a user types them, and training that is killed."""
import copy
import functools
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import killed
from killed import finish, kill_and_resume, log_of

data, lift, splat, d3r = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat", "06_distill3r"))
ROOT = Path(__file__).parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"
SMALL = ["--size", "48", "64", "--views", "2", "--stride", "1", "--heldout", "2", "--no-mirror", "--device", "cpu"]

fork = functools.partial(killed.fork, "06_distill3r")


def run(*arguments, launcher=(), cwd=ROOT):
    done = subprocess.run([sys.executable, *launcher, str(ROOT / "06_distill3r.py"), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=280)
    return done.returncode, done.stdout, done.stderr


def main(*arguments):
    with torch.enable_grad():
        d3r.main([str(a) for a in arguments])


def message(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


# ------------------------------------------------------------------------------------------------ as a user starts it


@pytest.fixture(scope="module")
def whole_run(rooms_dir, tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    shutil.copytree(rooms_dir, home / "data_small")  # where the script looks by itself
    return home / "out", run("--out", home / "out", "--max_steps", 60, "--warmup", 10, *SMALL, cwd=home)


def test_the_script_improves_on_its_start(whole_run, rooms):
    out, (code, printed, err) = whole_run
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    student, mean, teacher = (result[name]["mean"] for name in ("student", "mean", "teacher"))
    new = d3r.new_student(d3r.parse(["train", "--preset", "tiny"]))
    start = d3r.evaluate(d3r.NetworkTeacher(new, "new", lambda *_: (48, 64)), rooms[3:], (48, 64), 2)["mean"]
    assert student["accuracy_median"] < 0.8 * start.accuracy_median and student["completeness_median"] < 0.8 * start.completeness_median
    assert teacher["accuracy_median"] < min(student["accuracy_median"], mean["accuracy_median"])
    assert result["student"]["scenes"].keys() == {"room_003"}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(60)) and log[-1]["heldout"] < 0.7 * log[9]["heldout"]
    assert log[0]["lr"] < log[10]["lr"] > log[-1]["lr"] and not any("room_003" in line["samples"][0] for line in log)
    assert "room_003: 2 views" in printed and "photos agree" in printed
    assert "samples written" in printed and "accuracy" in printed and str(out / "scene/cloud.png") in printed


def test_what_infer_writes_is_a_scene(whole_run, rooms_dir, tmp_path, capsys):
    out = tmp_path
    main("infer", "--scene_dir", rooms_dir, "--weights", whole_run[0] / "student", "--out", out, *SMALL)
    assert "12 views" in (said := capsys.readouterr().out) and f"04_distill.py --scene_dir {out / 'scene'}" in said
    scene = data.load_scenes(out / "scene")[0]
    assert len(scene) == 12 and scene.view(3).depth.shape == scene.view(3).image.shape[1:] == (96, 128)  # twice the maps' size
    with Image.open(out / "scene/depth/003.png") as depth:
        assert depth.size == (64, 48)
    assert (scene.view(3).depth > 0).float().mean() > 0.5
    with Image.open(out / "scene/cloud.png") as picture:
        assert picture.width > 900
    assert data.sample_triplet(scene, torch.Generator().manual_seed(0))


def test_fast3r_teaches_through_the_cache(rooms_dir, tmp_path, monkeypatch):
    """A small Fast3R with generated weights, on photos without poses, from its file through the cache to a trained student."""
    monkeypatch.setattr(d3r, "fast3r_size", functools.partial(d3r.fast3r_size, long_side=128))
    torch.manual_seed(0)
    model = d3r.Fast3R(64, 2, 2, 64, 2, 4)
    lift.save_tensors(tmp_path / "fast3r/model.safetensors", model.state_dict())
    heads = dict(encoder_args=dict(num_heads=2), decoder_args=dict(num_heads=2))
    (tmp_path / "fast3r/config.json").write_text(json.dumps(heads))
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(4):
        (photos / f"img{n}.png").write_bytes((rooms_dir / f"room_000/images/{n:03d}.png").read_bytes())
    common = ["--out", tmp_path / "out", *SMALL]
    main("cache", "--images", photos, "--teacher", tmp_path / "fast3r", *common)
    cached = d3r.CachedViews(photos, tmp_path / "out/cache")
    about, maps, masks = d3r.unpack_sample(tmp_path / "out/cache" / f"{cached.samples[0][0]}.safetensors")
    assert about["settings"]["teacher"].startswith("fast3r ") and len(cached) == 2
    views = [d3r.Photos("photos", sorted(photos.iterdir())).view(i, d3r.fast3r_size(96, 128)) for i in range(2)]
    said = d3r.load_fast3r(tmp_path / "fast3r")([v.image for v in views], generator=torch.Generator().manual_seed(
        zlib.crc32(b"0 photos/000")))
    expected = d3r.resampled(d3r.Pointmap(*(part.detach() for part in said[1])), (96, 128), (48, 64))
    valid = masks[1]
    assert valid.any() and torch.equal(maps[1].points_global[valid], expected.points_global.half().float()[valid])
    assert message("cache", "--images", photos, *common).count("made with other settings (teacher fast3r") == 1  # geometry is another
    main("train", "--max_steps", 20, "--warmup", 2, *common)  # finds the photos by the cache
    losses = [line["total"] for line in log_of(tmp_path / "out")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_the_table_measures_both_networks(tmp_path, monkeypatch, capsys):
    sizes = dict(enc_dim=64, enc_heads=2, enc_depth=2, dec_dim=64, dec_heads=2, dec_depth=4)
    built = d3r.built
    monkeypatch.setattr(d3r, "built", lambda network, *_: built(network, *(sizes.values() if network is d3r.Fast3R else [d3r.StudentConfig.tiny])))
    main("table", "--size", 48, 64, "--counts", 1, 3, "--out", tmp_path, "--device", "cpu")
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {(row["model"], row["views"]) for row in rows} == {(m, n) for m in ("Fast3R", "student") for n in (1, 3)}
    assert all(math.isfinite(row["seconds"]) and row["seconds"] > 0 for row in rows) and "faster" in capsys.readouterr().out
    main("table", "--size", 48, 64, "--counts", 2, "--repeats", 1, "--models", "student", "--out", tmp_path, "--device", "cpu")
    assert {row["model"] for row in json.loads((tmp_path / "table.json").read_text())} == {"student"}
    assert "faster" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ every flag, in one step


@pytest.fixture(scope="module")
def cached(rooms_dir, tmp_path_factory):
    """Flags that all runs below share: a cache of two-view samples of small pictures."""
    folder = tmp_path_factory.mktemp("cached")
    common = ["--scene_dir", rooms_dir, "--cache", folder / "cache", "--preset", "tiny", *SMALL]
    main("cache", *common, "--out", folder / "out")
    return common


@pytest.fixture(scope="module")
def one_step(cached, tmp_path_factory):
    folder, maps = tmp_path_factory.mktemp("flags"), []

    def one_step(*flags):
        """The first line of a run's log, and the same from the definition: a new student on the sample of the log."""
        arguments = [str(a) for a in (*cached, "--max_steps", "1", *flags)]
        out = folder / "_".join(arguments[-6:]).replace("/", "")
        main("train", *arguments, "--out", out)
        args = d3r.parse(["train", *arguments])
        student, (line,) = d3r.new_student(args), log_of(out)
        samples = d3r.CachedViews(args.scene_dir, args.cache)
        sample = next(s for s in samples if s.name == line["samples"][0])
        with torch.no_grad():
            maps = student(sample.images, generator=torch.Generator().manual_seed(args.seed))
        return line, maps, sample

    return one_step


@pytest.mark.parametrize("flags,how", [
    ([], {}),
    (["--weight", "none"], dict(weight="none")),
    (["--weight", "none", "--gamma", "0"], dict(weight="none", gamma=0.0)),
    (["--weight", "student", "--gamma", "0"], dict(weight="student", gamma=0.0)),
    (["--weight", "clamped", "--mean", "views", "--global_target", "aligned"], dict(weight="clamped", mean="views", global_target="aligned"))])
def test_a_flag_of_the_loss_does_what_it_says(one_step, flags, how):
    line, maps, sample = one_step(*flags)
    expected, plain = (d3r.pointmap_loss(maps, sample.targets, sample.masks, **kwargs) for kwargs in (how, {}))
    for name, value in zip(d3r.Loss._fields, expected):
        assert line[name] == pytest.approx(value.item(), rel=1e-5), name
    assert not how or line["total"] != pytest.approx(plain.total.item(), rel=1e-3)


def test_the_rate_warms_up_and_falls_over_the_run():
    args = d3r.parse(["train", "--preset", "full"])
    rate = [d3r.learning_rate(step, args) for step in (0, 1749, 3499, 3500, (3500 + 84_375) // 2, 84_374)]
    assert rate == pytest.approx([1e-4 / 3500, 5e-5, 1e-4, 1e-4, 7.5e-5, 5e-5], rel=1e-3)


def test_presets_hold_the_numbers_of_the_paper():
    args = d3r.parse(["train", "--preset", "full"])
    assert (args.size, args.views, args.batch, args.max_steps) == ([224, 518], 20, 16, 60 * 22_500 // 16)
    assert (args.lr, args.final_lr, args.warmup, args.tau, args.gamma, args.bf16) == (1e-4, 5e-5, 3500, 0.3, 0.001, True)


def test_a_step_is_the_mean_of_its_samples_with_rates_and_ids_of_their_own(cached, tmp_path, monkeypatch):
    args = d3r.parse(["train", *map(str, cached)])
    student, samples = d3r.new_student(args), d3r.CachedViews(args.scene_dir, args.cache)
    gradient = lambda: student.decoder.dec_norm.weight.grad.clone()
    def learned(batch, seeds):
        student.zero_grad()
        return d3r.learn(batch, student, args, seeds, 1), gradient()
    (one, a), (two, b), (both, c) = learned([samples[0]], [5]), learned([samples[1]], [6]), learned([samples[0], samples[1]], [5, 6])
    assert torch.allclose((a + b) / 2, c, rtol=1e-3, atol=1e-5 * c.abs().max()) and both == pytest.approx([(x + y) / 2 for x, y in zip(one, two)])
    assert learned([samples[0]], [6])[0] != one  # other ids of the views
    seen = []
    with monkeypatch.context() as patched:
        zero = torch.zeros((), requires_grad=True)
        patched.setattr(d3r, "loss_of", lambda model, sample, *_: seen.append(sample) or d3r.Loss(*4 * [zero * 1]))
        args.mirror = True
        d3r.learn([samples[0]] * 40, student, args, range(40), 1)
    turned = sum(torch.equal(s.images[0], samples[0].images[0].flip(2)) for s in seen)
    assert 10 < turned < 30 and turned + sum(torch.equal(s.images[0], samples[0].images[0]) for s in seen) == 40
    used, clipped, learn = [], [], d3r.learn
    monkeypatch.setattr(d3r, "learn", lambda batch, model, args, seeds, world: used.extend(seeds) or learn(batch, model, args, seeds, world))
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: clipped.append(most) or clip(weights, most))
    main("train", *cached, "--max_steps", 2, "--batch", 2, "--seed", 3, "--out", tmp_path)
    assert used == [3, 4, 5, 6] and clipped == [1.0, 1.0]


def test_bf16_is_close_and_not_the_same(one_step):
    full, half = (one_step(flag)[0]["total"] for flag in ("--no-bf16", "--bf16"))
    assert half != full and half == pytest.approx(full, rel=0.05)


def test_a_new_student_starts_at_the_pretrained_vit():
    args = d3r.parse(["train", "--preset", "tiny"])
    student, vit, images = d3r.new_student(args), lift.load_vit("tiny"), torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(student.tokens(images), vit(images).patches)
    student([images[0]])[0].points_global.sum().backward()
    assert {n for n, p in student.named_parameters() if p.requires_grad and p.grad is None} <= \
        {n for n, _ in student.named_parameters() if n.startswith("downstream_head_local")}


def test_the_encoder_has_a_rate_of_its_own(cached, tmp_path):
    main("train", *cached, "--max_steps", 2, "--encoder_share", 0, "--out", tmp_path)
    args = d3r.parse(["train", *map(str, cached)])
    before, after = d3r.new_student(args).state_dict(), d3r.load_student(tmp_path / "student").state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "downstream_head", "downstream_head_local"}


# ------------------------------------------------------------------------------------------------ runs that cannot be lost


@pytest.fixture(scope="module")
def undisturbed(cached, tmp_path_factory):
    """A whole run, how long it took, and its arguments; another --out has to come to the same bytes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    common = ["train", *cached, "--max_steps", 6, "--warmup", 2, "--batch", 2, "--save_minutes", 0]
    begin = time.monotonic()
    assert finish(fork(*common, "--out", out)) == 0
    return out, time.monotonic() - begin, common


def same(out, whole):
    killed.same(out, whole, 6)


def test_training_killed_at_random_points_resumes_bit_identically(undisturbed, tmp_path):
    whole, seconds, common = undisturbed
    rng = random.Random(0)
    kill_and_resume(lambda: fork(*common, "--out", tmp_path / "run", "--resume"), tmp_path / "run", 3,
                    (rng.uniform(0.2, 0.8) * seconds for _ in itertools.count()))
    same(tmp_path / "run", whole)


def test_asked_to_stop_it_saves_and_goes_on_with_the_same_settings_alone(undisturbed, tmp_path):
    whole, _, common = undisturbed
    common = [*common, "--save_minutes", 100, "--out", tmp_path / "run"]
    process = fork(*common)
    while not (tmp_path / "run/log.jsonl").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 1
    assert 0 < splat.read_run(tmp_path / "run/checkpoint.safetensors")[0] < 6
    assert "--resume goes on" in message(*common)
    assert "weight teacher -> none" in message(*common, "--resume", "--weight", "none")
    assert finish(fork(*common, "--resume")) == 0
    same(tmp_path / "run", whole)


def test_a_loss_that_is_not_finite_names_the_sample_and_keeps_the_checkpoint(undisturbed, tmp_path, monkeypatch):
    whole, _, common = undisturbed
    honest, calls = d3r.pointmap_loss, [0]

    def failing(*arguments, **options):
        calls[0] += 1
        loss = honest(*arguments, **options)
        return d3r.Loss(*(part * (math.nan if calls[0] == 4 else 1) for part in loss))

    monkeypatch.setattr(d3r, "pointmap_loss", failing)
    assert "step 1: the loss is nan for room_" in message(*common, "--out", tmp_path / "run", "--eval_every", 6)
    assert splat.read_run(tmp_path / "run/checkpoint.safetensors")[0] == 1


def test_recomputed_activations_change_nothing(undisturbed, tmp_path):
    whole, _, common = undisturbed
    assert finish(fork(*common, "--grad_checkpoint", "--out", tmp_path / "run")) == 0
    assert [line["total"] for line in log_of(tmp_path / "run")] == pytest.approx([line["total"] for line in log_of(whole)], rel=1e-4)


def test_two_processes_are_one(undisturbed, tmp_path):
    """Two gloo processes with a sample each give the loss curve and the student of one, to rounding."""
    whole, _, common = undisturbed
    code, _, err = run(*common, "--out", tmp_path / "two", launcher=TORCHRUN)
    assert code == 0, err
    one, two = log_of(whole), log_of(tmp_path / "two")
    assert [line["samples"] for line in one] == [line["samples"] for line in two] and len(one[0]["samples"]) == 2
    assert [line["total"] for line in two] == pytest.approx([line["total"] for line in one], rel=1e-3)


def test_two_processes_share_the_cache(rooms_dir, tmp_path):
    arguments = ["cache", "--preset", "tiny", "--scene_dir", rooms_dir, "--encoder", tmp_path / "nowhere", *SMALL]  # which caching has no use for
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        code, out, err = run(*arguments, "--cache", tmp_path / name, launcher=launcher)
        assert code == 0 and out.count("samples written") == 1, err
    files = {name: {f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()} for name in ("one", "two")}
    assert len(files["one"]) > 5 and files["one"] == files["two"]


# ------------------------------------------------------------------------------------------------ small pieces, bad input


def test_a_student_is_asked_at_the_size_that_it_was_trained_on(tmp_path):
    student = d3r.Student(d3r.StudentConfig.tiny._replace(size=(24, 40)))
    d3r.save_student(student, tmp_path / "student")
    asked = lambda *flags: d3r.parse(["infer", "--weights", str(tmp_path / "student"), *flags]).size
    assert asked() == asked("--preset", "full") == [24, 40] and asked("--size", "48", "64") == [48, 64]
    assert d3r.load_student(tmp_path / "student").config == student.config
    assert d3r.parse(["infer", "--weights", str(tmp_path / "published.ckpt"), "--preset", "tiny"]).size == [224, 518]


def test_infer_leaves_no_picture_of_a_scene_before(rooms_dir, tmp_path, capsys):
    d3r.save_student(d3r.Student(d3r.StudentConfig.tiny), tmp_path / "student")
    infer = lambda *flags: ["infer", "--weights", tmp_path / "student", "--out", tmp_path / "out", "--tau", 0, "--device", "cpu", *flags]
    monkey = lambda maps: [m._replace(points_local=m.points_local + m.points_local.new_tensor([0, 0, 5.0])) for m in maps]  # before the camera
    with mock.patch.object(d3r.Student, "forward", lambda self, *a, forward=d3r.Student.forward, **k: monkey(forward(self, *a, **k))):
        main(*infer("--scene_dir", rooms_dir / "room_000", "--stride", 2))
        main(*infer("--scene_dir", rooms_dir, "--stride", 5))
    scene = tmp_path / "out" / "scene"
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    assert len(frames) == 3 and all(len(list((scene / part).iterdir())) == 3 for part in ("images", "depth", "confidence"))
    assert "4 scenes in here, this is room_000" in capsys.readouterr().out
    assert "give another --out" in message(*infer("--images", scene / "images")) and (scene / "transforms.json").exists()
    assert "give another --out" in message(*infer("--images", tmp_path))  # it would find its own pictures the next time


def test_camera_errors_are_those_of_a_known_disturbance():
    c2w = torch.eye(4).repeat(6, 1, 1)
    c2w[:, :3, 3] = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.5, 0.1], [0.5, 0, 0.3], [-0.1, -0.3, 0]]))
    moved = copy.deepcopy(c2w)  # another world: turned, three times as large, shifted
    moved[:, :3, :3], moved[:, :3, 3] = turn @ c2w[:, :3, :3], 3 * c2w[:, :3, 3] @ turn.T + 1
    exact = d3r.camera_error(moved, c2w)
    assert exact.position < 1e-5 and exact.rotation < 0.1
    tilt = torch.linalg.matrix_exp(math.radians(10) * torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 0]]))
    moved[::2, :3, :3] = moved[::2, :3, :3] @ tilt  # every second one: 9 of 15 pairs
    assert d3r.camera_error(moved, c2w).rotation == pytest.approx(10, abs=0.01)
    corners = torch.cat([torch.eye(3), -torch.eye(3)])  # of an octahedron; x farther out and y nearer leaves the similarity as it is
    c2w[:, :3, 3] = corners * torch.tensor([1.2, 0.8, 1.0])
    moved = torch.eye(4).repeat(6, 1, 1)
    moved[:, :3, 3] = corners
    error = d3r.camera_error(moved, c2w)
    assert error.position == pytest.approx(0.2, abs=1e-6) and error.spread == pytest.approx(math.sqrt((1.2**2 + 0.8**2 + 1) / 3))


@pytest.mark.parametrize("arguments,says", [
    (["cache", "--images", "no_such_folder"], "no_such_folder: no such folder"),
    (["cache", "--teacher", "no_such_weights"], "no_such_weights: no such weights"),
    (["train"], "run the cache command first"),
    (["eval", "--models", "mean"], "the mean pointmap is that of a cache"),
    (["infer"], "no such weights; give the folder that `train` wrote"),
    (["eval", "--models", "student"], "no such weights; give the folder that `train` wrote"),
    (["cache", "--device", "cuda:99"], "--device cuda:99")])
def test_bad_input_is_one_line(rooms_dir, tmp_path, arguments, says):
    arguments = arguments if "--images" in arguments else [*arguments, "--scene_dir", rooms_dir]
    assert says in message(*arguments, "--preset", "tiny", "--out", tmp_path / "out")


def test_training_takes_the_size_of_the_cache_and_eval_the_mean_of_it(rooms_dir, tmp_path, capsys):
    common = ["--preset", "tiny", "--device", "cpu", "--out", tmp_path, "--cache", tmp_path / "cache"]
    main("cache", *common, "--scene_dir", rooms_dir, "--size", 24, 32, "--views", 6)
    main("train", *common, "--max_steps", 1)
    assert d3r.trained_size(tmp_path / "student") == (24, 32)
    assert "made at [24, 32], not [48, 64]; leave --size out" in message("train", *common, "--size", 48, 64)
    other = tmp_path / "other"
    shutil.copytree(rooms_dir / "room_003", other / "room_000")  # a name that the cache knows
    main("eval", *common, "--scene_dir", other, "--models", "mean", "teacher", "--size", 24, 32, "--views", 2)
    found = json.loads((tmp_path / "result.json").read_text())["mean"]["mean"]
    args = d3r.parse(["eval", *map(str, common), "--size", "24", "32"])
    mean = d3r.MeanTeacher(d3r.cached_part(args, "train", rooms_dir))
    assert found == d3r.evaluate(mean, data.load_scenes(other), (24, 32), 2)["mean"]._asdict()
    capsys.readouterr()
    main("eval", *common, "--cache", tmp_path / "none", "--scene_dir", other, "--size", 24, 32, "--views", 2, "--models", "mean", "teacher")
    assert "mean: left out" in capsys.readouterr().out
    (other / "room_000").rename(other / "elsewhere")
    assert "no sample in it is of" in message("train", *common, "--scene_dir", other, "--max_steps", 1)
    (tmp_path / "cache/root.json").write_text("{")
    assert "root.json: damaged" in message("train", *common)


def test_a_run_does_not_go_on_with_another_cache(cached, tmp_path):
    shutil.copytree(cached[3], tmp_path / "cache")
    other = [*cached[:3], tmp_path / "cache", *cached[4:], "--max_steps", 2, "--out", tmp_path / "out"]
    main("train", *other)
    assert main("train", *other, "--resume") is None
    lines = (tmp_path / "cache/manifest.jsonl").read_text().splitlines()
    (tmp_path / "cache/manifest.jsonl").write_text("\n".join(line for line in lines if '"room_001' not in line) + "\n")
    assert "cached" in message("train", *other, "--resume")


def test_sizes_that_are_no_multiple_of_the_patch_are_refused(cached, tmp_path):
    common = ["--scene_dir", cached[1], "--preset", "tiny", "--device", "cpu", "--out", tmp_path, "--size", "50", "64", "--views", "2"]
    main("cache", *common)
    assert "multiples of 8" in message("train", *common, "--max_steps", 1)


def test_a_shard_is_part_of_the_whole(capsys):
    assert d3r.parse(["cache", "--shard", "1/4"]).shard == (1, 4)
    with pytest.raises(SystemExit):
        d3r.parse(["cache", "--shard", "4/4"])
    assert "4/4" in capsys.readouterr().err


def test_a_mirrored_sample_is_the_same_scene_seen_in_a_mirror(rooms):
    """The truth of a mirrored picture: its points lie on the rays of its pixels, in the view's own frame and in the first's."""
    teacher = d3r.GeometricTeacher((48, 64), strength=0.0)
    views = [rooms[0].view(i, (48, 64)) for i in (0, 4)]
    maps = teacher(views, torch.Generator())
    sample = d3r.CachedSample("a", [v.image for v in views], maps, [torch.ones(48, 64, dtype=torch.bool)] * 2)
    flipped = d3r.mirrored(sample)
    K = views[1].K.clone()
    K[0, 2] = 64 - K[0, 2]
    assert torch.allclose(flipped.targets[1].points_local, lift.pixel_rays(K, 48, 64) * views[1].depth.flip(1)[..., None], atol=1e-4)
    local, shared = flipped.targets[1].points_local.flatten(0, 1), flipped.targets[1].points_global.flatten(0, 1)
    s, R, t = d3r.similarity(local, shared)
    assert (s * local.double() @ R.T + t - shared).abs().max() < 1e-4 and s == pytest.approx(1, abs=1e-4)  # still a rigid motion
    again = d3r.mirrored(flipped)
    assert torch.equal(again.images[0], views[0].image) and torch.equal(again.targets[1].points_global, maps[1].points_global)
