"""04_distill.py: each piece against a slow definition, the run as a user starts it, and runs that are killed."""
import copy
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

data, lift, splat, distill = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat", "04_distill"))
ROOT = Path(__file__).parents[1]
SMALL = ["--heldout", "2", "--pixels", "3072", "--hidden", "64", "--bottleneck", "32", "--prototypes", "128", "--device", "cpu"]


def start(*arguments, cwd=ROOT):
    return subprocess.Popen([sys.executable, str(ROOT / "04_distill.py"), *map(str, arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments, cwd=ROOT):
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# ------------------------------------------------------------------------------------------------ LoRA, head, loss


def vit():
    torch.manual_seed(0)
    model = lift.VisionTransformer(patch=8, dim=64, depth=2, heads=1, grid=4, mlp_ratio=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_lora_starts_at_the_pretrained_network_and_merges_exactly():
    base, images = vit(), torch.rand(1, 3, 24, 32)
    model = distill.add_lora(copy.deepcopy(base), rank=4, alpha=8)
    assert torch.equal(model(images).patches, base(images).patches)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.endswith((".A", ".B")) and (".qkv." in n or ".attn.proj." in n) for n in names)
    for n, p in model.named_parameters():
        if n.endswith(".B"):
            torch.nn.init.normal_(p, std=0.5)
    merged = distill.merge_lora(model)
    assert set(merged.state_dict()) == set(base.state_dict())
    assert (merged(images).patches - model(images).patches).abs().max() < 1e-4
    assert (merged(images).patches - base(images).patches).abs().max() > 1e-2
    weight, adapted = base.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv
    assert torch.allclose(merged.blocks[0].attn.qkv.weight, weight + 8 / 4 * adapted.B @ adapted.A, atol=1e-6)


def test_head_is_cosine_times_gain():
    head = distill.DINOHead(16, hidden=32, bottleneck=8, prototypes=20)
    head.gain.data.uniform_(0.5, 2)
    x = torch.randn(5, 16)
    z = x
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        z = F.gelu(z) if layer is not head.mlp[0] else z
        z = z @ layer.weight.T + layer.bias
    expected = head.gain * F.cosine_similarity(z[:, None], head.prototypes[None], dim=-1)
    assert torch.allclose(head(x), expected, atol=1e-5) and head(x).shape == (5, 20)


@pytest.mark.parametrize("taus", [(1.0, 1.0), (0.1, 0.04)])
def test_loss_is_the_cross_entropy_of_equation_5(taus):
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 11, dtype=torch.float64, requires_grad=True), torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    loss = distill.distill_loss(student, teacher, *taus)
    total = 0
    for s, t in zip(student.tolist(), teacher.tolist()):
        p = [math.exp(v / taus[1]) for v in t]
        q = [math.exp(v / taus[0]) for v in s]
        total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q))
    assert abs(loss.item() - total / 7) < 1e-9
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0  # sg(.): nothing flows into the teacher


def test_ema_moves_what_is_trained_and_nothing_else():
    student = torch.nn.ModuleDict(dict(vit=distill.add_lora(vit()), head=distill.DINOHead(64, 16, 8, 12)))
    teacher = copy.deepcopy(student)
    for p in distill.trained(student).values():
        p.data += 1.0
    frozen = {n: p.clone() for n, p in teacher.named_parameters()}
    distill.ema_update(teacher, student, 0.9)
    for (name, theirs), ours in zip(teacher.named_parameters(), student.parameters()):
        expected = 0.9 * frozen[name] + 0.1 * ours if ours.requires_grad else frozen[name]
        assert torch.allclose(theirs, expected, atol=1e-6), name


# ------------------------------------------------------------------------------------------------ the 3D-aware teacher


def triplet_of(rooms, n=0, seed=0):
    scene = rooms[n]
    return distill.load_triplet(scene, data.sample_triplet(scene, torch.Generator().manual_seed(seed)), (96, 128), "cpu")


@pytest.mark.parametrize("blend", [1.0, 0.5])
def test_splatted_tokens_against_the_plain_definition(rooms, blend):
    t, grid = triplet_of(rooms), (12, 16)
    tokens = torch.randn(2, 192, 3, generator=torch.Generator().manual_seed(0))
    g = distill.reconstruct(t, "depth")
    ours, ours_valid = distill.splat_features(tokens, g, t, grid, blend)
    features = torch.cat([lift.mask_aware_upscale(tokens[v], t.masks[v], grid).reshape(-1, 3) for v in (0, 1)])
    render = splat.rasterize(g.means, g.covariances, g.opacities, features, t.target_w2c, t.target_K, 96, 128)
    valid = render.alpha >= 0.5
    rendered = render.features / render.alpha[..., None]
    blended = rendered.clone()
    for i in t.mask.unique().tolist():
        if i and (valid & (t.mask == i)).any():
            blended[t.mask == i] = blend * rendered[t.mask == i] + (1 - blend) * rendered[valid & (t.mask == i)].mean(0)
    for n in range(192):
        r, c = 8 * (n // 16) + 4, 8 * (n % 16) + 4  # the centre of an 8 x 8 patch lies between four pixels
        taps = [(y, x) for y in (r - 1, r) for x in (c - 1, c) if valid[y, x]]
        assert ours_valid[n] == (len(taps) >= 2)
        if len(taps) >= 2:
            assert torch.allclose(ours[n], sum(blended[y, x] for y, x in taps) / len(taps), atol=1e-4)


def test_unmatched_pixels_can_be_dropped(rooms):
    t = triplet_of(rooms)
    masks = t.masks.clone()
    masks[:, :50] = torch.arange(masks[:, :50].numel()).view_as(masks[:, :50]) + 1000  # an id of its own for every pixel
    t = t._replace(masks=masks)
    g, tokens = distill.reconstruct(t, "depth"), torch.randn(2, 192, 3)
    kept = distill.splat_features(tokens, g, t, (12, 16))[1]
    dropped = distill.splat_features(tokens, g, t, (12, 16), drop_unmatched=True)[1]
    assert kept.sum() > 150 and dropped.sum() < kept.sum() - 40


class Knowing:
    """A stand-in for a ViT whose tokens are a given function of the image's patches."""
    patch = 8

    def __init__(self, function):
        self.function = function

    def __call__(self, images):
        return lift.Tokens(None, None, torch.stack([self.function(image) for image in images]))


def world_pictures(rooms):
    """Held-out triplets whose pictures are painted with world positions instead of colours: (3, H, W) in scene units."""
    triplets = []
    for n in range(2 * len(rooms)):
        scene, generator = rooms[n % len(rooms)], torch.Generator().manual_seed(n)
        indices = data.sample_triplet(scene, generator)
        t = distill.load_triplet(scene, indices, (96, 128), "cpu")
        paint = lambda depth, K, c2w: (lift.pixel_rays(K, 96, 128) * depth[..., None] @ c2w[:3, :3].T + c2w[:3, 3]).permute(2, 0, 1)
        depth = scene.view(indices[2]).depth / scene.depth_range[0]
        triplets.append(t._replace(images=torch.stack([paint(*v) for v in zip(t.depth, t.K, t.c2w)]),
                                   image=paint(depth, t.target_K, torch.linalg.inv(t.target_w2c))))
    return triplets


def test_agreement_cannot_be_won_by_collapse_or_by_place(rooms):
    triplets = world_pictures(rooms)
    torch.manual_seed(0)
    waves, place = 3 * torch.randn(3, 64), torch.randn(192, 64)
    position = lambda image: F.avg_pool2d(image, 8).flatten(1).T @ waves
    measure = lambda function: distill.agreement(Knowing(function), triplets, "depth")
    exact = measure(lambda image: torch.cat([position(image).sin(), position(image).cos()], 1) + place.repeat(1, 2))
    collapsed = measure(lambda image: torch.ones(192, 64) + 1e-4 * torch.randn(192, 64))
    noise = measure(lambda image: torch.randn(192, 64))
    placed = measure(lambda image: place + 0.01 * torch.randn(192, 64))  # knows where in the picture it is, and nothing else
    assert exact.matching > 0.8 and exact.cosine > 0.8
    for cheat in (collapsed, noise, placed):
        assert cheat.matching < 0.12 and cheat.cosine < 0.3, cheat  # chance is 9 of 192


def test_scenes_of_different_shape_are_measured_and_drawn_together(rooms, tmp_path):
    generator, vit = torch.Generator().manual_seed(0), lift.load_vit("tiny")
    triplets = [distill.load_triplet(scene, data.sample_triplet(scene, generator), size, "cpu")
                for scene, size in zip(rooms, ((96, 128), (128, 96), (96, 128), (128, 96)))]
    together = distill.agreement(vit, triplets, "depth")
    apart = [distill.agreement(vit, triplets[n::2], "depth") for n in (0, 1)]
    low, high = sorted(a.matching for a in apart)
    assert low <= together.matching <= high
    args = distill.parse(["--geometry", "depth"])
    assert distill.heldout_picture(tmp_path / "rows.png", vit, vit, vit, triplets, args).exists()


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    tokens = torch.cat([torch.eye(5), -torch.eye(5)]).double() @ basis[:5]  # five directions, equally strong
    assert distill.effective_rank(tokens) == pytest.approx(5, abs=1e-3)
    assert distill.effective_rank(tokens + 7) == pytest.approx(5, abs=1e-3)  # the mean does not count
    tokens[:, :] = tokens[:, :] * 1e-9 + torch.randn(10, 1) * basis[0]
    assert distill.effective_rank(tokens) == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------------------------------------ the run


def test_the_script_improves_on_its_start(rooms_dir, tmp_path):
    out = tmp_path / "run"
    code, printed, err = run("--scene_dir", rooms_dir, "--out", out, "--max_steps", 120, "--heldout", 8, "--geometry", "depth", "--device", "cpu")
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert result["after"]["matching"] > result["before"]["matching"] + 0.01
    assert result["after"]["rank"] > 0.95 * result["before"]["rank"]
    assert "before: matching" in printed and str(out / "student") in printed and (out / "heldout.png").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(120)) and log[-1]["lr"] < 0.01 * log[0]["lr"]
    student = lift.load_vit(out / "student")
    assert not torch.equal(student.blocks[0].attn.qkv.weight, lift.load_vit("tiny").blocks[0].attn.qkv.weight)
    assert torch.equal(student.blocks[0].mlp.fc1.weight, lift.load_vit("tiny").blocks[0].mlp.fc1.weight)


def test_a_killed_run_resumes_bit_identically(rooms_dir, tmp_path):
    common = ["--scene_dir", rooms_dir, "--max_steps", 8, "--save_every", 2, *SMALL]
    assert run("--out", tmp_path / "whole", *common)[0] == 0
    killed = start("--out", tmp_path / "killed", *common)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    while not checkpoint.exists() and killed.poll() is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    code, _, err = run("--out", tmp_path / "killed", *common)
    assert code == 1 and "--resume" in err and err.count("\n") == 1 and "Traceback" not in err
    code, _, err = run("--out", tmp_path / "killed", *common, "--lr", "0.5", "--resume")
    assert code == 1 and "lr 0.003 -> 0.5" in err and "Traceback" not in err
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 7, "tri')  # as a power cut may leave it
    code, printed, err = run("--out", tmp_path / "killed", *common, "--resume")
    assert code == 0 and "resumed at step" in printed, err
    for name in ("student/model.safetensors", "result.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(8))


def test_resume_without_a_checkpoint_starts_from_the_beginning(rooms_dir, tmp_path):
    code, printed, err = run("--scene_dir", rooms_dir, "--out", tmp_path, "--max_steps", 1, "--resume", *SMALL)
    assert code == 0 and "resumed" not in printed, err


@pytest.mark.parametrize("arguments,says", [
    (["--scene_dir", "no_such_folder"], "no_such_folder: no such folder"),
    (["--model", "no_such_weights"], "no_such_weights: no such weights"),
    (["--near", "5", "--far", "3"], "give --near and --far"),
    (["--near", "-1"], "give --near and --far"),
    (["--near", "0"], "give --near and --far"),
    (["--far", "0"], "give --near and --far"),
    (["--pixels", "64"], "fewer than 2x2 patches"),
    (["--device", "cuda:99"], "--device cuda:99")])
def test_bad_input_is_one_line(rooms_dir, tmp_path, capsys, arguments, says):
    arguments = arguments if "--scene_dir" in arguments else ["--scene_dir", str(rooms_dir), *arguments]
    with pytest.raises(SystemExit) as stop:
        distill.main([*arguments, "--out", str(tmp_path / "out")])
    assert says in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert not (tmp_path / "out").exists()


def cut(scene, count):  # a scene with its first views alone
    return scene.subset(range(count))


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12])
def test_small_single_scenes_can_be_held_out_or_say_so(rooms, count, capsys):
    scene = cut(rooms[1], count)
    train, heldout = splat.hold_out([scene], 6, 0)
    targets = {scene.frames[t[2]].name for _, t in heldout}
    assert heldout and len(set(t for _, t in heldout)) == len(heldout) <= 6
    held_out = not targets & {frame.name for frame in train[0].frames}
    assert held_out or "what is measured below are training views" in capsys.readouterr().out
    assert held_out or count < 6


def test_a_scene_without_overlap_is_left_out(rooms, capsys):
    turned = rooms[0].subset(range(3))
    turned.frames = [copy.copy(frame) for frame in turned.frames]
    for n, frame in enumerate(turned.frames):
        frame.c2w = frame.c2w.copy()
        frame.c2w[:3, 3] += 1e4 * n
    turned.name = "far_apart"
    train, heldout = splat.hold_out([turned, *rooms[1:]], 4, 0)
    assert "far_apart: left out" in capsys.readouterr().out and turned not in train
    with pytest.raises(data.DataError, match="no three views overlap"):
        splat.hold_out([turned], 4, 0)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_a_scene_does_not_matter(rooms, unit):
    scene, indices = rooms[0], data.sample_triplet(rooms[0], torch.Generator().manual_seed(0))
    scaled = scene.subset(range(len(scene)))
    scaled.frames, scaled.depth_scale, scaled.depth_range = [copy.copy(f) for f in scene.frames], scene.depth_scale * unit, tuple(unit * d for d in scene.depth_range)
    scaled.c2w = scene.c2w.clone()
    scaled.c2w[:, :3, 3] *= unit
    tokens = torch.randn(2, 192, 4, generator=torch.Generator().manual_seed(0))
    one, other = (distill.load_triplet(s, indices, (96, 128), "cpu") for s in (scene, scaled))
    (a, valid_a), (b, valid_b) = (distill.splat_features(tokens, distill.reconstruct(t, "depth"), t, (12, 16)) for t in (one, other))
    assert (valid_a == valid_b).float().mean() > 0.99 and (a - b)[valid_a & valid_b].abs().mean() < 1e-3


def test_measured_depth_is_asked_for_by_name(rooms_dir, rooms, tmp_path):
    args = distill.parse(["--scene_dir", str(rooms_dir), "--geometry", "depth", "--heldout", "2"])
    scenes, heldout, load = distill.prepare(args)
    assert len(scenes) == 3 and len(heldout) == 2 and heldout[0].depth is not None


@pytest.mark.parametrize("name", ["posed_fox_instantngp", "colmap_bartoszek_statue", "rgbd_7scenes_redkitchen/original",
                                  "rgbd_instances_apc_shelf", "posed_masks_dtu_scan24"])
def test_real_scenes_run_without_flags(name, tmp_path):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    code, printed, err = run("--scene_dir", folder, "--out", tmp_path, "--max_steps", 2, *SMALL)
    assert code == 0 and "after:" in printed, err
