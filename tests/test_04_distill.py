"""04_distill.py: each piece against a slow definition, the run as a user starts it, and runs that are killed."""
import copy
import errno
import functools
import importlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import killed
from killed import finish, kill_and_resume

data, lift, splat, distill = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat", "04_distill"))
ROOT = Path(__file__).parents[1]
SMALL = ["--heldout", "2", "--pixels", "3072", "--hidden", "64", "--bottleneck", "32", "--prototypes", "128", "--triplets", "4", "--device", "cpu",
         "--batch", "1", "--no-full_finetune", "--lr", "3e-3", "--tau_student", "0.05", "--tau_teacher", "0.02"]


def start(*arguments, cwd=ROOT, launcher=()):
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / "04_distill.py"), *map(str, arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


fork = functools.partial(killed.fork, "04_distill")


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


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocked_loss_is_exact_in_value_and_gradient(block):
    torch.manual_seed(0)
    x, W, y, V = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (10, 13, 10, 13))
    x_, W_ = (p.detach().clone().requires_grad_() for p in (x, W))
    plain = distill.distill_loss(x @ W.T, y @ V.T, 0.3, 0.2)
    loss, entropy = distill.BlockedLoss.apply(x_, W_, y, V, 0.3, 0.2, block * 13)
    assert abs(loss - plain) < 1e-12
    p = (y @ V.T / 0.2).softmax(-1)
    assert abs(entropy + (p * p.log()).sum(-1).mean()) < 1e-12 and not entropy.requires_grad
    (3 * plain).backward()
    (3 * loss).backward()
    assert (x.grad - x_.grad).abs().max() < 1e-12 and (W.grad - W_.grad).abs().max() < 1e-12 and x.grad.abs().max() > 0.01
    assert y.grad is None and V.grad is None
    assert torch.autograd.gradcheck(lambda a, b: distill.BlockedLoss.apply(a, b, y.detach(), V.detach(), 0.3, 0.2, block * 13)[0], (x_, W_))


def test_no_valid_token_is_a_loss_of_nothing():
    x, W = torch.randn(0, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    loss, entropy = distill.BlockedLoss.apply(x, W, torch.randn(0, 6), W.detach(), 0.1, 0.1)
    loss.backward()
    assert loss == entropy == 0 and x.grad.shape == (0, 6) and (W.grad == 0).all()


def test_blocks_bound_the_memory():
    """4096 tokens x 8192 prototypes: 134 MB a matrix of logits, of which the plain loss keeps several."""
    program = """if True:
        import importlib, re, sys, torch
        sys.path.insert(0, sys.argv[1])
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        distill = importlib.import_module("04_distill")
        torch.manual_seed(0)
        x, W = torch.randn(4096, 32, requires_grad=True), torch.randn(8192, 32, requires_grad=True)
        before = peak()
        loss = distill.BlockedLoss.apply(x, W, x.detach(), W.detach(), 1.0, 1.0, 2**20)[0] if sys.argv[2] == "blocked" else \
            distill.distill_loss(x @ W.T, x @ W.T, 1.0, 1.0)
        loss.backward()
        print(peak() - before, loss.item())"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    measured = {kind: subprocess.run([sys.executable, "-c", program, str(ROOT), kind], capture_output=True, text=True, check=True).stdout.split()
                for kind in ("plain", "blocked")}
    assert float(measured["plain"][1]) == pytest.approx(float(measured["blocked"][1]), rel=1e-5)
    assert int(measured["plain"][0]) > 500_000 > 5 * int(measured["blocked"][0]), measured  # kB


def test_ema_moves_what_is_trained_and_nothing_else():
    student = distill.Network(distill.add_lora(vit()), distill.DINOHead(64, 16, 8, 12))
    teacher = copy.deepcopy(student)
    for p in distill.trained(student).values():
        p.data += 1.0
    frozen = {n: p.clone() for n, p in teacher.named_parameters()}
    distill.ema_update(teacher, student, 0.9)
    for (name, theirs), ours in zip(teacher.named_parameters(), student.parameters()):
        expected = 0.9 * frozen[name] + 0.1 * ours if ours.requires_grad else frozen[name]
        assert torch.allclose(theirs, expected, atol=1e-6), name


# ------------------------------------------------------------------------------------------------ the 3D-aware teacher


def source_of(rooms, *flags):
    return distill.Source(rooms, distill.parse(["--device", "cpu", "--preset", "tiny", *map(str, flags)]), 8)


def place_of(rooms, n=0, seed=0):
    return rooms[n], data.sample_triplet(rooms[n], torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("upscale", ["masks", "bilinear"])
def test_splatted_tokens_against_the_plain_definition(rooms, blend, upscale):
    source, grid = source_of(rooms), (12, 16)
    t = source.load(*place_of(rooms))
    tokens = torch.randn(2, 192, 3, generator=torch.Generator().manual_seed(0))
    g = source.reconstruct(t, "depth")
    ours, ours_valid = distill.splat_features(tokens, g, t, grid, blend, upscale)
    masks = t.masks if upscale == "masks" else 0 * t.masks
    features = torch.cat([lift.mask_aware_upscale(tokens[v], masks[v], grid).reshape(-1, 3) for v in (0, 1)])
    render = splat.rasterize(g.means, g.covariances, g.opacities, features, torch.linalg.inv(t.c2w[2]), t.K[2], 96, 128)
    valid = render.alpha >= 0.5
    rendered = render.features / render.alpha[..., None]
    blended = rendered.clone()
    for i in t.masks[2].unique().tolist():
        same = t.masks[2] == i
        if i and (valid & same).any():
            blended[same] = blend * rendered[same] + (1 - blend) * rendered[valid & same].mean(0)
    for n in range(192):
        r, c = 8 * (n // 16) + 4, 8 * (n % 16) + 4  # the centre of an 8 x 8 patch lies between four pixels
        taps = [(y, x) for y in (r - 1, r) for x in (c - 1, c) if valid[y, x]]
        assert ours_valid[n] == (len(taps) >= 2)
        if len(taps) >= 2:
            assert torch.allclose(ours[n], sum(blended[y, x] for y, x in taps) / len(taps), atol=1e-4)


def test_unmatched_pixels_can_be_dropped(rooms):
    source = source_of(rooms)
    t = source.load(*place_of(rooms))
    masks = t.masks.clone()
    masks[:2, :50] = torch.arange(masks[:2, :50].numel()).view_as(masks[:2, :50]) + 1000  # an id of its own for every pixel
    t = t._replace(masks=masks)
    g, tokens = source.reconstruct(t, "depth"), torch.randn(2, 192, 3)
    kept = distill.splat_features(tokens, g, t, (12, 16))[1]
    dropped = distill.splat_features(tokens, g, t, (12, 16), drop_unmatched=True)[1]
    assert kept.sum() > 150 and dropped.sum() < kept.sum() - 40
    assert torch.equal(distill.triplet_operator(g, t, (12, 16), drop_unmatched=True).valid, dropped)


HOW = [[], ["--no_blend"], ["--upscale", "bilinear"], ["--drop_unmatched"], ["--geometry", "sweep"], ["--geometry", "depth"], ["--masks", "superpixels"],
       ["--downscale", "area"]]


@pytest.mark.parametrize("flags", HOW, ids=" ".join)
def test_operator_and_online_path_give_the_same_loss(rooms, tmp_path, flags):
    """The promise of the cache: for the same triplet, the loss of the plain path to the rounding of float16 weights."""
    place, vit, losses = place_of(rooms, 1), lift.load_vit("tiny"), []
    torch.manual_seed(0)
    student = distill.Network(vit, distill.DINOHead(192, 64, 32, 128))
    for path in ([], ["--online"]):
        source = source_of(rooms, *flags, *path, "--operators", tmp_path)
        images, teach = source.teach(distill.Network(vit, None), *place, seed=0)
        with torch.no_grad():
            goal, valid = teach()
            seen = student(images[2:])[0]
            loss, entropy = distill.objective(student, student, seen[valid], goal[valid], source.args)
        losses.append((loss.item(), entropy.item(), valid.sum().item(), goal[valid]))
    (a, b, n, x), (c, d, m, y) = losses
    assert n == m > 50 and (x - y).norm() < 1e-3 * y.norm()
    assert a == pytest.approx(c, rel=2e-4) and b == pytest.approx(d, rel=1e-3) and a > b + 0.1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_an_operator_is_named_after_all_that_it_depends_on(rooms, rooms_dir, tmp_path, monkeypatch):
    place = place_of(rooms)
    name = lambda *flags: source_of(rooms, *flags).path(*place).name
    bent = lift.load_mvsplat("tiny")
    bent.depth_predictor["to_disparity"][2].bias.data[0] += 0.1
    lift.save_tensors(tmp_path / "bent.safetensors", bent.state_dict())
    names = [name(*flags) for flags in [*HOW, ["--near", 0.5], ["--far", 50], ["--pixels", 3072], ["--blend", 0.25],
                                        ["--mvsplat", tmp_path / "bent.safetensors"]]]
    names.append(source_of(rooms).path(place[0], (place[1][1], place[1][0], place[1][2])).name)
    monkeypatch.setattr(splat, "OPERATOR_FORMAT", "another")
    names.append(name())
    monkeypatch.undo()
    image = rooms[0].frames[place[1][0]].image
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    os.utime(image, ns=(times[0], times[1] + 10**9))
    names.append(name())
    os.utime(image, ns=times)
    assert len(set(names)) == len(names)
    assert name() == name("--seed", 5, "--loss", "cosine", "--lr", 1, "--frozen_teacher", "--operators", "elsewhere") == names[0]


def test_a_damaged_operator_is_made_again(rooms, tmp_path):
    source, place = source_of(rooms, "--operators", tmp_path), place_of(rooms)
    source.prepare([place, place], 0, 1)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    again = source.operator(*place)
    assert splat.SplatOperator.load(path).valid.sum() == again.valid.sum() > 0 and path.stat().st_size == len(whole) < 40_000


def test_processes_share_the_work_of_operators(rooms, tmp_path):
    source = source_of(rooms, "--operators", tmp_path, "--geometry", "depth", "--pixels", 3072)
    triplets = distill.draw_triplets(rooms, 6, 0)
    source.prepare(triplets, 1, 2)
    assert [source.path(*place).exists() for place in triplets] == [False, True] * 3
    source.prepare(triplets, 0, 1)
    assert all(source.path(*place).exists() for place in triplets)


def test_the_schedule_takes_every_triplet_in_turn():
    order = distill.schedule(5, 12, 0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12 and order[:5] != order[5:10]
    assert order == distill.schedule(5, 12, 0) != distill.schedule(5, 12, 1)


def test_ahead_keeps_the_order_and_passes_errors_on():
    assert list(distill.ahead(lambda n: (time.sleep(0.02 * (n % 3 == 0)), n)[1], range(9))) == list(range(9))
    batches = distill.ahead(lambda n: 1 // (n - 2), range(9))
    assert [next(batches), next(batches)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


class Knowing:
    """A stand-in for a ViT whose tokens are a given function of the image's patches."""
    patch = 8

    def __init__(self, function):
        self.function = function

    def __call__(self, images):
        return lift.Tokens(None, None, torch.stack([self.function(image) for image in images]))


def world_pictures(rooms):
    """Held-out triplets whose pictures are painted with world positions instead of colours: (3, H, W) in scene units."""
    source, triplets = source_of(rooms), []
    paint = lambda depth, K, c2w: (lift.pixel_rays(K, 96, 128) * depth[..., None] @ c2w[:3, :3].T + c2w[:3, 3]).permute(2, 0, 1)
    for n in range(2 * len(rooms)):
        t = source.load(*place_of(rooms, n % len(rooms), n))
        triplets.append(t._replace(images=torch.stack([paint(*v) for v in zip(t.depth, t.K, t.c2w)])))
    return triplets, [distill.plain_operator(source, t) for t in triplets]


def test_agreement_cannot_be_won_by_collapse_or_by_place(rooms):
    triplets, operators = world_pictures(rooms)
    torch.manual_seed(0)
    waves, place = 3 * torch.randn(3, 64), torch.randn(192, 64)
    position = lambda image: F.avg_pool2d(image, 8).flatten(1).T @ waves
    measure = lambda function: distill.agreement(Knowing(function), triplets, operators)
    exact = measure(lambda image: torch.cat([position(image).sin(), position(image).cos()], 1) + place.repeat(1, 2))
    collapsed = measure(lambda image: torch.ones(192, 64) + 1e-4 * torch.randn(192, 64))
    noise = measure(lambda image: torch.randn(192, 64))
    placed = measure(lambda image: place + 0.01 * torch.randn(192, 64))  # knows where in the picture it is, and nothing else
    assert exact.matching > 0.8 and exact.cosine > 0.8
    for cheat in (collapsed, noise, placed):
        assert cheat.matching < 0.12 and cheat.cosine < 0.3, cheat  # chance is 9 of 192


def test_scenes_of_different_shape_are_measured_and_drawn_together(rooms, tmp_path):
    source, vit = source_of(rooms, "--geometry", "depth"), lift.load_vit("tiny")
    triplets = [splat.load_triplet(*place_of(rooms, n), size, "cpu", "files") for n, size in enumerate(((96, 128), (128, 96), (96, 128), (128, 96)))]
    operators = [distill.plain_operator(source, t) for t in triplets]
    together = distill.agreement(vit, triplets, operators)
    low, high = sorted(distill.agreement(vit, triplets[n::2], operators[n::2]).matching for n in (0, 1))
    assert low <= together.matching <= high
    assert distill.heldout_picture(tmp_path / "rows.png", vit, vit, vit, triplets, source).exists()


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
    code, printed, err = run("--scene_dir", rooms_dir, "--out", out, "--operators", tmp_path / "operators", "--max_steps", 36,
                             "--triplets", 40, "--heldout", 6, "--eval_every", 12, "--geometry", "depth", "--device", "cpu")
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert result["after"]["matching"] > result["before"]["matching"] + 0.01
    assert result["after"]["rank"] > 0.95 * result["before"]["rank"]
    assert printed.startswith("preset tiny (") and " splat operators, " in printed
    assert "before: matching" in printed and str(out / "student") in printed and (out / "heldout.png").exists() and (out / "curve.png").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(36)) and log[-1]["lr"] < 0.01 * log[0]["lr"]
    assert [line["step"] + 1 for line in log if "matching" in line] == [12, 24, 36]
    assert log[-1]["matching"] == pytest.approx(result["after"]["matching"], abs=0.01)
    student, start = lift.load_vit(out / "student"), lift.load_vit("tiny")
    assert not torch.equal(student.blocks[0].mlp.fc1.weight, start.blocks[0].mlp.fc1.weight)


# ------------------------------------------------------------------------------------------------ every flag, in one step


@pytest.fixture(scope="module")
def one_step(rooms_dir, tmp_path_factory):
    """The first line of a run's log, and what the run started from: arguments, ViT, networks, triplet, its source."""
    folder = tmp_path_factory.mktemp("flags")

    def one_step(*flags):
        out = folder / "_".join(flags).replace("/", "") / "out"
        arguments = ["--scene_dir", str(rooms_dir), "--out", str(out), "--operators", str(folder / "operators"), "--max_steps", "1",
                     "--ema_every", "1", *SMALL, *flags]
        with torch.enable_grad():
            distill.main(arguments)
        args = distill.parse(arguments)
        triplets, _, source = distill.prepare(args)
        before, student, teacher, _ = distill.networks_of(args)
        return json.loads((out / "log.jsonl").read_text()), args, before, student, teacher, triplets[0], source, splat.read_run(out / "checkpoint.safetensors")[2]

    return one_step


def plain_loss(before, head, t, goal, valid, taus=(0.05, 0.02)):
    seen = before(t.images[2:]).patches[0][valid]
    return distill.distill_loss(head(seen), head(goal[valid]), *taus).item()


def definition(before, source, t, blend=0.5, upscale="masks", geometry="mvsplat", downscale="bilinear"):
    grid = tuple(side // 8 for side in t.images.shape[-2:])
    return distill.splat_features(before(t.images[:2]).patches, splat.reconstruct(geometry, t, lift.load_mvsplat("tiny"))[0], t, grid, blend, upscale,
                                  downscale=downscale)


@pytest.mark.parametrize("flags,how", [
    ([], {}), (["--no_blend"], dict(blend=1.0)), (["--blend", "0.2"], dict(blend=0.2)), (["--upscale", "bilinear"], dict(upscale="bilinear")),
    (["--downscale", "area"], dict(downscale="area")),
    (["--geometry", "sweep"], dict(geometry="sweep")), (["--geometry", "depth"], dict(geometry="depth")), (["--online"], {}),
    (["--grad_checkpoint"], {}), (["--frozen_teacher"], {}), (["--shared_head"], {}), (["--full_finetune"], {}),
    (["--tau_student", "0.5"], dict(taus=(0.5, 0.02))), (["--tau_teacher", "0.1"], dict(taus=(0.05, 0.1)))], ids=str)
@torch.no_grad()
def test_a_flag_does_what_it_says(one_step, flags, how):
    line, args, before, student, teacher, place, source, saved = one_step(*flags)
    taus = how.pop("taus", (0.05, 0.02))
    t = source.load(*place)
    assert torch.equal(t.masks[0], place[0].view(place[1][0], t.images.shape[-2:]).mask) and line["triplets"] == [t.name]
    goal, valid = definition(before, source, t, **how)
    expected = plain_loss(before, student.head, t, goal, valid, taus)
    assert line["loss"] == pytest.approx(expected, rel=1e-5 if "--online" in flags else 1e-3)
    moved = {name.partition(".")[2] for name in saved if name.startswith("teacher.") and not torch.equal(saved[name], teacher.get_parameter(name[8:]))}
    if "--frozen_teacher" in flags:
        assert not moved
    elif "--shared_head" in flags:
        assert moved and not any(name.startswith("teacher.head") for name in saved)
    else:  # Adam moves by the learning rate, the EMA by a hundredth of that; lora's A has no gradient while B is 0
        assert {name for name in moved if name.startswith("head.")} and {name for name in moved if name.startswith("vit.")}
        for name in moved:
            ours, first = saved[f"student.{name}"], student.get_parameter(name)
            assert torch.allclose(saved[f"teacher.{name}"], first + 0.01 * (ours - first), atol=1e-7), name
    wanted = {n for n, _ in before.named_parameters() if n != "mask_token"} if "--full_finetune" in flags else \
        {f"blocks.{b}.attn.{part}.{m}" for b in range(len(before.blocks)) for part in ("qkv", "proj") for m in "AB"}
    assert {name[12:] for name in saved if name.startswith("student.vit.")} == wanted
    adapters, trained = Path(args.out, "adapters.safetensors"), lift.load_vit(Path(args.out, "student"))
    assert adapters.exists() == ("--full_finetune" not in flags)
    for name, value in (lift.load_file(adapters) if adapters.exists() else {}).items():
        student.vit.get_parameter(name).copy_(value)
        assert torch.equal(trained.blocks[0].mlp.fc1.weight, before.blocks[0].mlp.fc1.weight)
    if adapters.exists():
        assert (student.vit(t.images).patches - trained(t.images).patches).abs().max() < 1e-4


@torch.no_grad()
def test_losses_on_tokens(one_step):
    for name, formula in {"cosine": lambda a, b: 1 - F.cosine_similarity(a, b, dim=1).mean(), "feature": lambda a, b: (a - b).abs().mean(),
                          "correspondence": lambda a, b: -torch.stack([(F.cosine_similarity(x[None], b) / 0.07).log_softmax(0)[n]
                                                                       for n, x in enumerate(a)]).mean()}.items():
        line, args, before, student, teacher, place, source, saved = one_step("--loss", name)
        t = source.load(*place)
        goal, valid = definition(before, source, t)
        assert line["loss"] == pytest.approx(formula(before(t.images[2:]).patches[0][valid], goal[valid]).item(), rel=1e-3)
        assert student.head is None and not any("head" in key for key in saved)


@torch.no_grad()
def test_superpixels_take_the_place_of_masks(one_step):
    line, args, before, student, teacher, place, source, _ = one_step("--masks", "superpixels")
    t = source.load(*place)
    for image, mask in zip(t.images, t.masks):
        assert torch.equal(mask, data.superpixels(image, 64))
    assert line["loss"] == pytest.approx(plain_loss(before, student.head, t, *definition(before, source, t)), rel=1e-3)


@torch.no_grad()
def test_the_target_can_be_a_context_or_the_image_itself(one_step):
    line, _, before, student, _, (scene, (a, b, target)), source, _ = one_step("--target", "context")
    assert target == a and one_step()[5][1][:2] == (a, b)  # the same contexts as without the flag
    t = source.load(scene, (a, b, a))
    assert line["loss"] == pytest.approx(plain_loss(before, student.head, t, *definition(before, source, t)), rel=1e-3)
    for blend in (0.5, 1.0):
        line, _, before, student, _, place, source, _ = one_step("--target", "image", "--blend", str(blend))
        t = source.load(*place)
        grid = tuple(side // 8 for side in t.images.shape[-2:])
        tokens = before(distill.jitter(t.images[2:], 0)).patches[0]
        full = lift.mask_aware_upscale(tokens, t.masks[2], grid)
        blended = splat.semantic_blend(full, t.masks[2], blend)
        goal, valid = splat.splat_to_tokens(blended, torch.ones_like(t.masks[2], dtype=torch.bool), grid)
        assert valid.all() and line["valid"] == 1
        assert line["loss"] == pytest.approx(plain_loss(before, student.head, t, goal, valid), rel=1e-4)


def test_jitter_changes_colours_and_nothing_else(rooms):
    image = rooms[0].view(0).image[None]
    changed = distill.jitter(image, 3)
    assert torch.equal(changed, distill.jitter(image, 3)) and not torch.equal(changed, distill.jitter(image, 4))
    assert changed.shape == image.shape and 0 <= changed.min() and changed.max() <= 1 and (changed - image).abs().mean() > 0.01
    for seed in range(8):
        a, b = (torch.stack([x[0].mean(0).flatten()[:2000]]) for x in (image, distill.jitter(image, seed)))
        assert torch.corrcoef(torch.cat([a, b]))[0, 1] > 0.9


def test_bf16_stays_close_and_full_precision_keeps_the_prototypes(one_step):
    exact, rounded = (one_step(*flags)[0] for flags in ([], ["--bf16"]))
    assert rounded["loss"] != exact["loss"] and rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_gradients_do_not_depend_on_checkpointing():
    model, images, found = vit(), torch.rand(1, 3, 24, 32), []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(images).patches.square().sum().backward()
        found.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.allclose(*found, rtol=1e-5) and found[0].abs().max() > 0


def test_presets_hold_the_numbers_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = distill.parse(["--preset", "vits"])
    assert (args.prototypes, args.max_steps, args.lr, args.rank, args.hidden, args.bottleneck) == (65536, 50000, 2e-5, 8, 2048, 256)
    assert (args.momentum, args.ema_every, args.blend, args.batch, args.geometry, args.model) == (0.999, 10, 0.5, 1, "mvsplat", "dinov2_vits14")
    assert args.mvsplat == "tiny" and distill.parse(["--preset", "vitb"]).model == "dinov2_vitb14"
    Path("re10k.ckpt").touch()
    assert distill.parse(["--preset", "vits"]).mvsplat == "re10k.ckpt"
    assert distill.parse(["--preset", "vits", "--prototypes", "7", "--lr", "1"]).prototypes == 7
    assert distill.parse([]).preset == ("vits" if torch.cuda.is_available() else "tiny")


def test_small_tensors_get_one_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for flags in (["--preset", "vits"], ["--preset", "tiny", "--device", "cuda"]):
        distill.few_threads(distill.parse(flags))
    assert not asked
    distill.few_threads(distill.parse(["--preset", "tiny", "--device", "cpu"]))
    assert asked == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # who names a number gets it
    distill.few_threads(distill.parse(["--preset", "tiny", "--device", "cpu"]))
    assert asked == [1]


# ------------------------------------------------------------------------------------------------ runs that cannot be lost


@pytest.fixture(scope="module")
def undisturbed(rooms_dir, tmp_path_factory):
    """A whole run, how long it took, and its arguments; another --out has to come to the same bytes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    common = ["--scene_dir", rooms_dir, "--operators", folder / "operators", "--max_steps", 12, "--ema_every", 3, "--save_minutes", 0, *SMALL]
    for out in ("first", "whole"):  # the first one finds no operators, and takes longer
        begin = time.monotonic()
        assert finish(fork(*common, "--out", folder / out)) == 0
    return folder / "whole", time.monotonic() - begin, common


def same(out, whole):
    killed.same(out, whole, 12, "adapters.safetensors", "result.json", "heldout.png")


def test_runs_killed_at_random_points_resume_bit_identically(undisturbed, tmp_path):
    """Four runs, two at a time, with five kill -9 each, anywhere: start, operators, a step, a write, the report. The last one begins
    without operators."""
    whole, seconds, common = undisturbed

    def survive(seed):
        own = ["--operators", tmp_path / "operators"] if seed == 3 else []
        out, rng = tmp_path / f"run_{seed}", random.Random(seed)
        kill_and_resume(lambda: fork(*common, *own, "--out", out, "--resume"), out, 5,
                        (rng.uniform(0.1, 0.9) * seconds for _ in itertools.count()))
        same(out, whole)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survive, range(4)))


def dying_child(arguments, call, when):
    """The run, which kills itself in the n-th `os.replace` of a checkpoint, before or after it."""
    replace, count = os.replace, [0]

    def deadly(source, target):
        if "checkpoint" in str(target):
            count[0] += 1
        if when == "after":
            replace(source, target)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            replace(source, target)

    os.replace = deadly
    killed.child("04_distill", arguments)


def test_a_kill_within_the_writing_of_a_checkpoint(undisturbed, tmp_path):
    """The second checkpoint is a new file, renamed from its temporary name (3); the old one steps aside (4); it takes its place (5)."""
    whole, _, common = undisturbed

    def survive(call, when):
        out = tmp_path / f"{call}_{when}"
        process = killed.SERVER.Process(target=dying_child, args=([*common, "--out", out], call, when))
        process.start()
        assert finish(process) == -signal.SIGKILL
        steps = [splat.read_run(path)[0] for path in splat.checkpoint_paths(out) if path.exists()]
        assert steps == ([2, 1] if when == "after" else [1])
        assert finish(fork(*common, "--out", out, "--resume")) == 0
        same(out, whole)
        assert not list(out.glob(".*"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(survive, (3, 4, 5, 5), ("before", "before", "before", "after")))


def test_a_full_disk_stops_the_run_and_loses_nothing(undisturbed, tmp_path):
    """No file may grow beyond 100 kB, so no checkpoint fits; the one from before stays whole."""
    whole, _, common = undisturbed
    process = fork(*common, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.previous.safetensors").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 1
    before = {file: file.read_bytes() for file in splat.checkpoint_paths(tmp_path / "run")}
    assert finish(fork(*common, "--out", tmp_path / "run", "--resume", file_limit=100_000)) == 1
    assert {file: file.read_bytes() for file in before} == before and not list((tmp_path / "run").glob(".*"))
    assert finish(fork(*common, "--out", tmp_path / "run", "--resume")) == 0
    same(tmp_path / "run", whole)


def test_a_full_disk_is_one_line(undisturbed, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        distill.main([str(a) for a in (*undisturbed[2], "--out", tmp_path / "run")])
    assert "No space left on device" in str(stop.value.code) and "\n" not in stop.value.code and not list((tmp_path / "run").glob("*.safetensors"))


def test_asked_to_stop_it_saves_the_step_it_is_at(undisturbed, tmp_path):
    whole, _, common = undisturbed
    common = [*common, "--save_minutes", 100, "--out", tmp_path / "run"]
    process = fork(*common)
    while not (tmp_path / "run" / "log.jsonl").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.15)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 1
    step = splat.read_run(tmp_path / "run" / "checkpoint.safetensors")[0]
    assert 0 < step < 12 and len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == step
    assert finish(fork(*common, "--resume")) == 0
    same(tmp_path / "run", whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(undisturbed, tmp_path, capsys):
    whole, _, common = undisturbed
    process = fork(*common, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.previous.safetensors").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    finish(process)
    newest, _ = splat.checkpoint_paths(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:5000])
    args = distill.parse([str(a) for a in (*common, "--out", tmp_path / "run", "--resume")])
    step, _ = splat.find_checkpoint(args)
    assert step > 0 and "going on from" in capsys.readouterr().out
    assert finish(fork(*common, "--out", tmp_path / "run", "--resume")) == 0
    same(tmp_path / "run", whole)


def test_an_unfinished_run_is_neither_overwritten_nor_continued_with_other_settings(undisturbed, tmp_path):
    whole, _, common = undisturbed
    process = fork(*common, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.safetensors").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    def refusal(*flags):
        with pytest.raises(SystemExit) as stop:
            distill.main([str(a) for a in (*common, "--out", tmp_path / "run", *flags)])
        assert "\n" not in stop.value.code
        return stop.value.code

    assert "--resume goes on" in refusal()
    assert "lr 0.003 -> 0.5" in refusal("--lr", "0.5", "--resume")
    assert "loss distill -> cosine" in refusal("--loss", "cosine", "--resume")
    for same in ([], ["--preset", "tiny"]):  # whether a preset is asked for or taken makes no difference
        assert splat.find_checkpoint(distill.parse([*map(str, common), "--out", str(tmp_path / "run"), "--resume", *same]))[0] > 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["prototypes"] == 128 and settings["lr"] == 0.003 and settings["preset"] == "tiny"


def test_a_loss_that_is_not_finite_names_the_triplet_and_keeps_the_checkpoint(undisturbed, tmp_path, monkeypatch):
    whole, _, common = undisturbed
    objective, calls = distill.objective, [0]

    def failing(*arguments):
        calls[0] += 1
        loss, entropy = objective(*arguments)
        return loss * (math.nan if calls[0] == 4 else 1), entropy

    monkeypatch.setattr(distill, "objective", failing)
    with pytest.raises(SystemExit) as stop:
        distill.main([str(a) for a in (*common, "--out", tmp_path / "run")])
    assert "step 3: the loss is nan for room_" in stop.value.code and "\n" not in stop.value.code
    assert splat.read_run(tmp_path / "run" / "checkpoint.safetensors")[0] == 3
    monkeypatch.undo()
    assert finish(fork(*common, "--out", tmp_path / "run", "--resume")) == 0
    same(tmp_path / "run", whole)


def test_two_processes_are_one(undisturbed, tmp_path):
    """Two gloo processes with half the batch each give the loss curve and the student of one, to rounding."""
    _, _, common = undisturbed
    common = [*common, "--batch", 2]
    assert finish(fork(*common, "--out", tmp_path / "one")) == 0
    launcher = "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"
    code, printed, err = run(*common, "--out", tmp_path / "two", launcher=launcher)
    assert code == 0, err
    assert printed.count("held-out triplets") == 1
    one, two = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(two) == 12 and [line["triplets"] for line in one] == [line["triplets"] for line in two] and len(one[0]["triplets"]) == 2
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    a, b = (lift.load_file(tmp_path / name / "adapters.safetensors") for name in ("one", "two"))
    assert all((a[key] - b[key]).abs().max() < 1e-3 for key in a)  # 12 Adam steps of 3e-3, whose size hardly depends on the gradient's
    code, _, err = run(*common, "--batch", 3, "--out", tmp_path / "three", launcher=launcher)
    assert code != 0 and "--batch 3 cannot be shared by 2 processes" in err


def test_resume_without_a_checkpoint_starts_from_the_beginning(rooms_dir, tmp_path):
    code, printed, err = run("--scene_dir", rooms_dir, "--out", tmp_path, "--operators", tmp_path / "operators", "--max_steps", 1, "--resume", *SMALL)
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
        distill.main([*arguments, "--preset", "tiny", "--out", str(tmp_path / "out"), "--operators", str(tmp_path / "out")])
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


def moved_apart(scene, which):
    scene.frames = [copy.copy(frame) for frame in scene.frames]
    for n in which:
        scene.frames[n].c2w = scene.frames[n].c2w.copy()
        scene.frames[n].c2w[:3, 3] += 1e4 * n + 1e3
    return scene


def test_distillation_and_probes_hold_out_the_same(rooms, capsys):
    probe = importlib.import_module("05_probe")
    scene = moved_apart(rooms[0].subset(range(12)), (0, 1, 5))  # which make no triplet
    (train,), heldout = splat.hold_out([scene], 6, 0)
    with mock.patch.object(data, "open_scenes", lambda *_: [scene]):
        (probed,), (scored,) = probe.open_split(probe.parse(["--scene_dir", str(ROOT)]))
    names = lambda s: {frame.name for frame in s.frames}
    assert names(train) == names(probed) and not names(train) & names(scored) and {scene.frames[t[2]].name for _, t in heldout} <= names(scored)

    turned = [rooms[i % 4].subset(range(8)) for i in range(10)]
    for n, room in enumerate(turned):
        room.name = f"room_{n}"
    moved_apart(turned[0], range(8))
    train, heldout = splat.hold_out(turned, 4, 0)
    assert [s.name for s in train] == [f"room_{n}" for n in (1, 2, 3, 4, 5, 6, 8, 9)] and {s.name for s, _ in heldout} == {"room_7"}
    part = [s.subset(range(6)) for s in turned[2:]]  # some scenes and views cannot be used at all: with --geometry depth
    assert {s.name for s, _ in splat.hold_out(part, 4, 0, turned)[1]} == {"room_7"}


def test_a_scene_without_overlap_is_left_out(rooms, capsys):
    turned = moved_apart(rooms[0].subset(range(3)), range(3))
    turned.name = "far_apart"
    train, heldout = splat.hold_out([turned, *rooms[1:]], 4, 0)
    assert "far_apart: left out" in capsys.readouterr().out and turned not in train
    with pytest.raises(data.DataError, match="no three views overlap"):
        splat.hold_out([turned], 4, 0)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_a_scene_does_not_matter(rooms, unit):
    scene, indices = place_of(rooms)
    scaled = scene.subset(range(len(scene)))
    scaled.frames, scaled.depth_scale, scaled.depth_range = [copy.copy(f) for f in scene.frames], scene.depth_scale * unit, tuple(unit * d for d in scene.depth_range)
    scaled.c2w = scene.c2w.clone()
    scaled.c2w[:, :3, 3] *= unit
    tokens, source = torch.randn(2, 192, 4, generator=torch.Generator().manual_seed(0)), source_of(rooms, "--geometry", "depth")
    one, other = (source.load(s, indices) for s in (scene, scaled))
    (a, valid_a), (b, valid_b) = (distill.splat_features(tokens, source.reconstruct(t), t, (12, 16)) for t in (one, other))
    assert (valid_a == valid_b).float().mean() > 0.99 and (a - b)[valid_a & valid_b].abs().mean() < 1e-3


def test_measured_depth_is_asked_for_by_name(rooms_dir):
    triplets, heldout, source = distill.prepare(distill.parse(["--scene_dir", str(rooms_dir), "--geometry", "depth", "--heldout", "2", "--max_steps", "5", "--batch", "1"]))
    assert len(triplets) == 5 and len(heldout) == 2 and source.load(*heldout[0]).depth is not None
    assert not {scene.name for scene, _ in triplets} & {scene.name for scene, _ in heldout}


REAL = ["posed_fox_instantngp", "colmap_bartoszek_statue", "rgbd_7scenes_redkitchen/original", "rgbd_instances_apc_shelf",
        "posed_masks_dtu_scan24"]


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """{name: code, what was printed, errors} of the scenes that are here, two at a time."""
    def of(name):
        out = tmp_path_factory.mktemp("real")
        return run("--scene_dir", scenes[name], "--out", out, "--operators", out / "operators", "--max_steps", 2, *SMALL)

    scenes = {name: ROOT.parent / "shared" / "data" / name for name in REAL}
    names = [name for name, folder in scenes.items() if folder.is_dir()]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(of, names)))


@pytest.mark.parametrize("name", REAL)
def test_real_scenes_run_without_flags(name, real_runs):
    if name not in real_runs:
        pytest.skip(f"{ROOT.parent / 'shared' / 'data' / name} is not here")
    code, printed, err = real_runs[name]
    assert code == 0 and "after:" in printed, err
