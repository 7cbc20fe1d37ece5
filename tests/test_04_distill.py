"""04_distill.py: each piece against a slow definition, the run as a user starts it, and runs that are killed."""
import copy
import functools
import gc
import importlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stopping
from stopping import finish, kill_and_resume, log_of as lines_of
from test_03_splat import blend_loop

data, lift, splat, distill = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat", "04_distill"))
ROOT = Path(__file__).parents[1]
SMALL = """--heldout 2 --pixels 3072 --hidden 64 --bottleneck 32 --prototypes 128 --triplets 4 --device cpu --batch 1
    --no-full_finetune --lr 3e-3 --tau_student 0.05 --tau_teacher 0.02 --preset tiny""".split()
GRID = 6, 8  # of 48x64 pixels in patches of 8


fork, script = (functools.partial(how, "04_distill") for how in (stopping.fork, stopping.script))
main, refusal = (functools.partial(how, distill.main) for how in (stopping.call, stopping.refusal))


def small_vit():
    torch.manual_seed(0)
    model = lift.VisionTransformer(patch=8, dim=64, depth=2, heads=1, grid=4, mlp_ratio=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def source_of(scenes, *flags):
    flags = ["--device", "cpu", "--preset", "tiny", "--pixels", 3072, *flags]
    return distill.Source(scenes, distill.parse(list(map(str, flags))), 8)


def place_of(scenes, n=0, seed=0):
    return scenes[n], data.sample_triplet(scenes[n], torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------- LoRA, head, loss, EMA


def test_lora_starts_at_the_pretrained_network_and_merges_exactly():
    base, images = small_vit(), torch.rand(1, 3, 24, 32)
    model = distill.add_lora(copy.deepcopy(base), rank=4, alpha=8)
    assert torch.equal(model(images).patches, base(images).patches)
    names = list(distill.trained(model))
    assert names and all(n.endswith((".A", ".B")) and (".qkv." in n or ".attn.proj." in n) for n in names)
    for n, p in model.named_parameters():
        if n.endswith(".B"):
            torch.nn.init.normal_(p, std=2.0)
    merged = distill.merge_lora(model)
    assert set(merged.state_dict()) == set(base.state_dict())
    assert (merged(images).patches - model(images).patches).abs().max() < 1e-4
    assert (merged(images).patches - base(images).patches).abs().max() > 1e-2
    weight, adapted = base.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv
    assert torch.allclose(merged.blocks[0].attn.qkv.weight, weight + 8 / 4 * adapted.B @ adapted.A, atol=1e-6)


@pytest.mark.parametrize("taus", [(1.0, 1.0), (0.1, 0.04)])
def test_loss_is_the_cross_entropy_of_equation_5(taus):
    torch.manual_seed(0)
    student, teacher = (torch.randn(7, 11, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, total = distill.distill_loss(student, teacher, *taus), 0
    for s, t in zip(student.tolist(), teacher.tolist()):
        p, q = [math.exp(v / taus[1]) for v in t], [math.exp(v / taus[0]) for v in s]
        total -= sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q))
    assert abs(loss.item() - total / 7) < 1e-9
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0  # sg(.): nothing flows into the teacher


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocked_loss_is_exact_in_value_and_gradient(block):
    torch.manual_seed(0)
    x, W, y, V = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (10, 13, 10, 13))
    x_, W_ = (p.detach().clone().requires_grad_() for p in (x, W))
    blocked = lambda a, b: distill.blocked_loss(a, b, y.detach(), V.detach(), 0.3, 0.2, block * 13)
    plain = distill.distill_loss(x @ W.T, y @ V.T, 0.3, 0.2)
    with mock.patch.object(distill, "distill_loss", wraps=distill.distill_loss) as calls:
        loss, entropy = blocked(x_, W_)
    assert max(len(call.args[0]) for call in calls.mock_calls) == min(block, 10)  # never more logits than asked for
    p = (y @ V.T / 0.2).softmax(-1)
    assert abs(loss - plain) < 1e-12
    assert abs(entropy + (p * p.log()).sum(-1).mean()) < 1e-12 and not entropy.requires_grad
    (3 * plain).backward()
    (3 * loss).backward()
    assert (x.grad - x_.grad).abs().max() < 1e-12 and (W.grad - W_.grad).abs().max() < 1e-12 < x.grad.abs().max()
    assert torch.autograd.gradcheck(lambda a, b: blocked(a, b)[0], (x_, W_))


def test_no_valid_token_is_a_loss_of_nothing():
    x, W = torch.randn(0, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    loss, entropy = distill.blocked_loss(x, W, torch.randn(0, 6), W.detach(), 0.1, 0.1)
    loss.backward()
    assert loss == entropy == 0 and x.grad.shape == (0, 6) and (W.grad == 0).all()
    for name in ("cosine", "feature", "correspondence"):
        assert distill.token_loss(name, torch.randn(0, 6), torch.randn(0, 6)) == 0


# -------------------------------------------------------------------------------- the 3D-aware teacher


@pytest.mark.parametrize("blend", [1.0, 0.5])
@pytest.mark.parametrize("upscale", ["masks", "bilinear"])
def test_splatted_tokens_against_the_plain_definition(crooked, blend, upscale):
    source = source_of(crooked)
    t = source.load(crooked[0], (3, 5, 8))  # the contexts do not see all of it
    tokens, g = torch.randn(2, 48, 3, generator=torch.Generator().manual_seed(0)), source.reconstruct(t, "depth")
    ours, ours_valid = distill.splat_features(tokens, g, t, GRID, blend, upscale)
    masks = t.masks if upscale == "masks" else 0 * t.masks
    features = torch.cat([lift.mask_aware_upscale(tokens[v], masks[v], GRID).reshape(-1, 3) for v in (0, 1)])
    render = splat.rasterize(g.means, g.covariances, g.opacities, features, torch.linalg.inv(t.c2w[2]), t.K[2], 48, 64)
    valid, rendered = render.alpha >= 0.5, render.features / render.alpha[..., None]
    blended = blend_loop(rendered, t.masks[2], blend, valid)
    for n in range(48):
        r, c = 8 * (n // 8) + 4, 8 * (n % 8) + 4  # the centre of an 8 x 8 patch lies between four pixels
        taps = [(y, x) for y in (r - 1, r) for x in (c - 1, c) if valid[y, x]]
        assert ours_valid[n] == (len(taps) >= 2)
        if len(taps) >= 2:
            assert torch.allclose(ours[n], sum(blended[y, x] for y, x in taps) / len(taps), atol=1e-4)
    assert 0 < (~ours_valid).sum() < 24 and not t.masks.all()


def test_channels_in_blocks_are_all_channels(crooked, monkeypatch):
    source = source_of(crooked)
    t = source.load(*place_of(crooked))
    tokens, g = torch.randn(2, 48, 7), source.reconstruct(t, "depth")
    whole, valid = distill.splat_features(tokens, g, t, GRID)
    monkeypatch.setattr(distill, "MAX_FEATURES", 3 * len(g.means))  # three channels, three, and one
    parts, still = distill.splat_in_blocks(tokens, g, t, GRID)
    assert torch.allclose(parts, whole, atol=1e-6) and torch.equal(valid, still)


HOW = [flags.split() for flags in ("", "--no_blend", "--upscale bilinear", "--geometry depth", "--masks superpixels")]


def bent_mvsplat(folder):  # a file: its disparity is off by a tenth of the nearest
    net, path = lift.load_mvsplat("tiny"), folder / "bent.safetensors"
    net.depth_predictor["to_disparity"][2].bias.data[0] += 0.1
    lift.save_tensors(path, net.state_dict())
    return path


def test_an_operator_is_named_after_all_that_it_depends_on(rooms, tmp_path, monkeypatch):
    scene, (a, b, target) = place = place_of(rooms)
    name = lambda *flags: source_of(rooms, *flags).path(*place).name
    further = ["--pixels", 12288], ["--blend", 0.25], ["--mvsplat", bent_mvsplat(tmp_path)]
    names = [name(*flags) for flags in (*HOW, *further)]
    names.append(source_of(rooms).path(scene, (b, a, target)).name)
    turned, lens = scene.frames[b].c2w @ np.diag([-1.0, -1, 1, 1]), ((0.1,), (0.0, 0.0))
    for owner, key, value in ((splat, "OPERATOR_FORMAT", "another"), (scene, "depth_range", (0.1, 20.0)),
                              (scene.frames[a], "K", 2 * scene.frames[a].K), (scene.frames[b], "c2w", turned),
                              (scene.frames[target], "distortion", lens)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, key, value)
            names.append(name())
    image = scene.frames[a].image
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    os.utime(image, ns=(times[0], times[1] + 10**9))
    names.append(name())
    os.utime(image, ns=times)
    assert len(set(names)) == len(names)
    others = "--seed", 5, "--loss", "cosine", "--lr", 1, "--frozen_teacher", "--operators", "elsewhere"
    assert name() == name(*others) == names[0]


def test_threads_that_make_the_same_operator_do_not_collide(rooms, tmp_path):
    source, place = source_of(rooms, "--operators", tmp_path, "--geometry", "depth"), place_of(rooms)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: source.operator(*place).valid, range(8)))
    assert all(torch.equal(valid, made[0]) for valid in made)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_the_schedule_takes_every_triplet_in_turn():
    order = distill.schedule(5, 12, 0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12 and order[:5] != order[5:10]
    assert order == distill.schedule(5, 12, 0) != distill.schedule(5, 12, 1)


def test_ahead_keeps_the_order_and_passes_errors_on():
    assert list(distill.ahead(str, range(9))) == list(map(str, range(9)))
    batches = distill.ahead(lambda n: 1 // (n - 2), range(9))
    assert [next(batches), next(batches)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


# -------------------------------------------------------------------------------- agreement


def test_agreement_cannot_be_won_by_collapse_or_by_place(rooms):
    """The pictures are painted with world positions instead of colours."""
    source, triplets = source_of(rooms, "--geometry", "depth", "--pixels", 12288), []
    rays = lambda K: lift.pixel_rays(K, 96, 128)
    paint = lambda depth, K, c2w: (rays(K) * depth[..., None] @ c2w[:3, :3].T + c2w[:3, 3]).permute(2, 0, 1)
    for n in range(2 * len(rooms)):
        t = source.load(*place_of(rooms, n % len(rooms), n))
        images = torch.stack([paint(*v) for v in zip(t.depth, t.K, t.c2w)])
        operator = distill.triplet_operator(source.reconstruct(t), t, (12, 16), blend=1.0, upscale="bilinear")
        triplets.append(distill.Judged((None, None), images, operator))
    torch.manual_seed(0)
    waves, place = 3 * torch.randn(3, 64), torch.randn(192, 64)
    position = lambda image: F.avg_pool2d(image, 8).flatten(1).T @ waves

    def measure(function):  # of a ViT whose tokens are this function of the image
        vit = lambda images: lift.Tokens(None, None, torch.stack([*map(function, images)]))
        vit.patch = 8
        return distill.agreement(vit, triplets)
    exact = measure(lambda image: torch.cat([position(image).sin(), position(image).cos()], 1) + place.repeat(1, 2))
    assert exact.matching > 0.8 and exact.cosine > 0.8
    for cheat in (lambda _: torch.ones(192, 64) + 1e-4 * torch.randn(192, 64), lambda _: torch.randn(192, 64),
                  lambda _: place + 0.01 * torch.randn(192, 64)):  # collapsed, noise, knows where in the picture it is
        assert measure(cheat).matching < 0.12 and measure(cheat).cosine < 0.3  # chance is 9 of 192


def test_agreement_is_measured_by_depth_and_without_masks(crooked):
    source, place = source_of(crooked, "--geometry", "mvsplat"), (crooked[0], (3, 5, 8))
    (found,), t = distill.judged_triplets(source, [place]), source.load(*place)
    plain = distill.triplet_operator(splat.reconstruct("depth", t)[0], t, GRID, 1.0, "bilinear")
    tokens = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.operator(tokens), plain(tokens)) and torch.equal(found.operator.valid, plain.valid)


def test_effective_rank_counts_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    tokens = torch.cat([torch.eye(5), -torch.eye(5)]).double() @ basis[:5]  # five directions, equally strong
    for same in (tokens, tokens + 7):  # the mean does not count
        assert distill.effective_rank(same) == pytest.approx(5, abs=1e-3)
    assert distill.effective_rank(tokens * 1e-9 + torch.randn(10, 1) * basis[0]) == pytest.approx(1, abs=1e-3)


# -------------------------------------------------------------------------------- a step


@pytest.fixture(scope="module")
def two_samples(crooked):
    source = source_of(crooked, "--geometry", "depth", "--online")
    return [source.sample(*place_of(crooked, n), seed=0) for n in range(2)]


def networks(*flags):
    """Student, and a teacher that differs from it in the ViT and in the head; args."""
    args = distill.parse([*SMALL, "--full_finetune", *flags])
    _, student, teacher, optimiser = distill.networks_of(args)
    generator = torch.Generator().manual_seed(1)
    for p in teacher.parameters():
        p.data += 0.05 * p.data.std(correction=0).nan_to_num() * torch.randn(p.shape, generator=generator)
    return student, teacher, optimiser, args


def test_a_batch_of_two_equals_two_batches_of_one(two_samples):
    found = []
    for batches in ([two_samples], [[sample] for sample in two_samples]):
        student, teacher, _, args = networks()
        values = [distill.learn(batch, student, teacher, args) for batch in batches]
        gradients = [p.grad / len(batches) for p in distill.trained(student).values() if p.grad is not None]
        found.append((torch.tensor(values).mean(0), gradients))
    (a, ours), (b, theirs) = found
    assert torch.allclose(a, b, rtol=1e-6) and len(ours) == len(theirs) > 50
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(ours, theirs))


def test_the_teacher_is_not_the_student(two_samples):
    """The goal is made by the teacher's ViT, and read by the teacher's head."""
    student, teacher, _, args = networks()
    sample = two_samples[0]
    loss, entropy, share = distill.learn([sample], student, teacher, args)
    with torch.no_grad():
        values = {}
        for name, vit, head in (("both", teacher.vit, teacher.head), ("the student's ViT", student.vit, teacher.head),
                                ("the student's head", teacher.vit, student.head)):
            goal, valid = sample.carry(vit(sample.context).patches)
            seen = student.head(student(sample.target)[0][valid])
            values[name] = distill.distill_loss(seen, head(goal[valid]), args.tau_student, args.tau_teacher).item()
    assert loss == pytest.approx(values.pop("both"), rel=1e-5) and share == pytest.approx(valid.float().mean().item())
    assert all(abs(value - loss) > 1e-3 * loss for value in values.values()), values
    assert all(p.grad is None for p in teacher.parameters())


def test_three_steps_by_hand(crooked_dir, tmp_path):
    """Three steps of two triplets in plain torch, from a teacher that differs from the student: every saved tensor."""
    flags = ["--scene_dir", crooked_dir, "--operators", tmp_path / "operators", "--out", tmp_path / "out", *SMALL,
             *"--max_steps 3 --ema_every 2 --batch 2 --full_finetune --lr 3e-4 --head_lr 1e-4 --geometry depth".split()]
    args = distill.parse([str(a) for a in flags])
    student, teacher, _, _ = start = networks(*map(str, flags))
    before = lift.load_vit("tiny")
    with mock.patch.object(distill, "networks_of", lambda _: (before, *copy.deepcopy(start[:3]))):
        main(*flags)
    scenes, _, source = distill.prepare(args)
    triplets = distill.draw_triplets(scenes, 4, 0)
    order = distill.schedule(4, 6, 0)
    state = {p: (torch.zeros_like(p), torch.zeros_like(p), 3e-4 if name.startswith("vit.") else 1e-4)
             for name, p in distill.trained(student).items()}
    logits = lambda head, x: head.gain * (F.normalize(head.mlp(x), dim=1) @ F.normalize(head.prototypes, dim=1).T)
    for step in range(3):
        student.zero_grad()
        for scene, indices in (triplets[n] for n in order[2 * step:2 * step + 2]):
            t, operator = source.load(scene, indices), source.operator(scene, indices)
            with torch.no_grad():
                goal = operator(teacher.vit(t.images[:2]).patches.flatten(0, 1))[operator.valid]
                p = (logits(teacher.head, goal) / args.tau_teacher).softmax(1)
            seen = student.vit(t.images[2:]).patches[0][operator.valid]
            q = (logits(student.head, seen) / args.tau_student).log_softmax(1)
            (-(p * q).sum(1).mean() / 2).backward()
        with torch.no_grad():
            for p, (m, v, lr) in state.items():  # Adam with betas 0.9 and 0.999, cosine decay over three steps
                if p.grad is not None:
                    m.lerp_(p.grad, 0.1)
                    v.lerp_(p.grad.square(), 0.001)
                    m_hat, v_hat = m / (1 - 0.9**(step + 1)), v / (1 - 0.999**(step + 1))
                    p -= lr * 0.5 * (1 + math.cos(math.pi * step / 3)) * m_hat / (v_hat.sqrt() + 1e-8)
            if step == 1:  # the only multiple of --ema_every
                for theirs, ours in zip(teacher.parameters(), student.parameters()):
                    theirs.copy_(args.momentum * theirs + (1 - args.momentum) * ours)
    saved = distill.read_run(tmp_path / "out" / "checkpoint.safetensors")[2]
    names = list(distill.trained(student))
    # The keys' bias has no gradient but rounding, from which Adam makes steps of any sign: compared where there is one.
    sure = {name: state[p][1].sqrt() > 1e-5 * state[p][1].max().sqrt() for name, p in distill.trained(student).items()}
    assert sum(where.sum() for where in sure.values()) > 0.98 * sum(where.numel() for where in sure.values())
    for who, network in (("student", student), ("teacher", teacher)):
        for name, p in network.named_parameters():
            if name in names:
                ours = saved.pop(f"{who}.{name}")
                assert torch.allclose(ours[sure[name]], p[sure[name]], rtol=1e-4, atol=3e-6), (who, name)
    moments = {}
    for i, (m, v, _) in enumerate(state.values()):
        moments |= {f"optimiser.{i}.exp_avg": m, f"optimiser.{i}.exp_avg_sq": v}
    for key, x in saved.items():
        assert x == 3 if key.endswith("step") else (x - moments[key]).norm() < 1e-3 * x.norm(), key
    assert len(saved) == 3 * len(names)


def test_held_out_triplets_keep_nothing_for_a_backward_pass(rooms, monkeypatch):
    """Else MVSplat's activations, 20 GB at the paper's size, lie on the card while they are made (seen on an H200)."""
    wanted, reconstruct = [], splat.reconstruct
    note = lambda *a: wanted.append(torch.is_grad_enabled()) or reconstruct(*a)
    monkeypatch.setattr(splat, "reconstruct", note)
    distill.judged_triplets(source_of(rooms), [place_of(rooms)])
    assert wanted and not any(wanted)


@pytest.mark.parametrize("native,device,left", [(True, "cuda", True), (False, "cuda", False), (False, "cpu", True)])
def test_cards_without_bfloat16_compute_in_float32(monkeypatch, native, device, left):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert distill.parse(["--bf16", "--device", device]).bf16 == left


# -------------------------------------------------------------------------------- every flag, in one step


@pytest.fixture(scope="module")
def one_step(rooms_dir, tmp_path_factory):
    """A run of one step: the line of its log, and what the run started from."""
    folder = tmp_path_factory.mktemp("flags")

    def one_step(*flags):
        out = folder / "_".join(flags).replace("/", "") / "out"
        arguments = ["--scene_dir", rooms_dir, "--out", out, "--operators", folder / "operators", "--max_steps", 1,
                     "--ema_every", 1, *SMALL, *flags]
        main(*arguments)
        args = distill.parse([*map(str, arguments)])
        scenes, _, source = distill.prepare(args)
        (place,) = distill.draw_triplets(scenes, 1, args.seed, args.target == "context")
        before, student, teacher, _ = distill.networks_of(args)
        return SimpleNamespace(line=lines_of(out)[0], args=args, before=before, student=student, teacher=teacher,
                               place=place, source=source, t=source.load(*place), out=out,
                               saved=distill.read_run(out / "checkpoint.safetensors")[2])

    return one_step


def expected_loss(one, goal, valid, taus=(0.05, 0.02)):
    seen = one.before(one.t.images[2:]).patches[0][valid]
    return distill.distill_loss(one.student.head(seen), one.student.head(goal[valid]), *taus).item()


def definition(one, blend=0.5, upscale="masks", geometry="mvsplat"):
    gaussians = splat.reconstruct(geometry, one.t, lift.load_mvsplat("tiny"))[0]
    tokens, grid = one.before(one.t.images[:2]).patches, one.source.grid(one.t)
    return distill.splat_features(tokens, gaussians, one.t, grid, blend, upscale)


@pytest.mark.parametrize("flags,how", [
    ("", {}), ("--no_blend", dict(blend=1.0)), ("--blend 0.2", dict(blend=0.2)),
    ("--upscale bilinear", dict(upscale="bilinear")),
    ("--geometry depth", dict(geometry="depth")), ("--online", {}),
    ("--grad_checkpoint", {}), ("--frozen_teacher", {}),
    ("--shared_head", {}), ("--full_finetune", {}), ("--tau_student 0.5", dict(taus=(0.5, 0.02))),
    ("--tau_teacher 0.1", dict(taus=(0.05, 0.1)))], ids=str)
@torch.no_grad()
def test_a_flag_does_what_it_says(one_step, flags, how):
    one, taus = one_step(*flags.split()), how.pop("taus", (0.05, 0.02))
    scene, (a, *_) = one.place
    assert torch.equal(one.t.masks[0], scene.view(a, one.t.images.shape[-2:]).mask)
    assert one.line["triplets"] == [one.t.name]
    expected = expected_loss(one, *definition(one, **how), taus)
    assert one.line["loss"] == pytest.approx(expected, rel=1e-5 if "--online" in flags else 1e-3)
    saved, first = one.saved, {f"teacher.{name}": p for name, p in one.teacher.named_parameters()}
    moved = {name for name in saved if name.startswith("teacher.") and not torch.equal(saved[name], first[name])}
    parts = {name.split(".")[1] for name in moved}
    assert parts == {"--frozen_teacher": set(), "--shared_head": {"vit"}}.get(flags, {"vit", "head"})
    for name in moved:  # by a hundredth of the way to the student
        ours = saved[name.replace("teacher", "student")]
        assert torch.allclose(saved[name], first[name] + 0.01 * (ours - first[name]), atol=1e-7), name
    blocks = range(len(one.before.blocks))
    wanted = {f"blocks.{b}.attn.{part}.{m}" for b in blocks for part in ("qkv", "proj") for m in "AB"}
    if "--full_finetune" in flags:
        wanted = {name for name, _ in one.before.named_parameters() if name != "mask_token"}
    assert {name[12:] for name in saved if name.startswith("student.vit.")} == wanted
    adapters, student = one.out / "adapters.safetensors", lift.load_vit(one.out / "student")
    assert adapters.exists() == ("--full_finetune" not in flags)
    if adapters.exists():
        for name, value in lift.load_file(adapters).items():
            one.student.vit.get_parameter(name).copy_(value)
        assert torch.equal(student.blocks[0].mlp.fc1.weight, one.before.blocks[0].mlp.fc1.weight)
        assert (one.student.vit(one.t.images).patches - student(one.t.images).patches).abs().max() < 1e-4


@pytest.mark.parametrize("name,formula", [
    ("cosine", lambda a, b: 1 - F.cosine_similarity(a, b, dim=1).mean()),
    ("feature", lambda a, b: (a - b).abs().mean()),
    ("correspondence", lambda a, b: -torch.stack([(F.cosine_similarity(x[None], b) / 0.07).log_softmax(0)[n]
                                                  for n, x in enumerate(a)]).mean())])
@torch.no_grad()
def test_losses_on_tokens(one_step, name, formula):
    one = one_step("--loss", name)
    goal, valid = definition(one)
    seen = one.before(one.t.images[2:]).patches[0]
    assert one.line["loss"] == pytest.approx(formula(seen[valid], goal[valid]).item(), rel=1e-3)
    assert one.student.head is None and not any("head" in key for key in one.saved)


@torch.no_grad()
def test_superpixels_take_the_place_of_masks(one_step, capsys):
    one = one_step("--masks", "superpixels")
    again = one_step("--masks", "superpixels")  # the same --out, and said to be
    assert capsys.readouterr().out.count(f"{one.out}/student is of an earlier run") == 1 and again.line["loss"] == one.line["loss"]
    for image, mask in zip(one.t.images, one.t.masks):
        assert torch.equal(mask, data.superpixels(image, 64))
    assert one.line["loss"] == pytest.approx(expected_loss(one, *definition(one)), rel=1e-3)


@torch.no_grad()
def test_the_target_can_be_a_context_or_the_image_itself(one_step):
    one = one_step("--target", "context")
    _, (a, b, target) = one.place
    assert target == a and one_step().place[1][:2] == (a, b)  # the same contexts as without the flag
    assert one.line["loss"] == pytest.approx(expected_loss(one, *definition(one)), rel=1e-3)
    ways = {"masks": lift.mask_aware_upscale, "bilinear": lift.bilinear_upscale}
    for blend, (way, upscale) in zip((0.5, 1.0), ways.items()):
        one = one_step("--target", "image", "--blend", str(blend), "--upscale", way)
        t, grid = one.t, one.source.grid(one.t)
        full = upscale(one.before(distill.jitter(t.images[2:], 0)).patches[0], t.masks[2], grid)
        blended = splat.semantic_blend(full, t.masks[2], blend)
        everywhere = torch.ones_like(t.masks[2], dtype=torch.bool)
        goal, valid = splat.splat_to_tokens(blended, everywhere, grid)
        assert valid.all() and one.line["valid"] == 1
        assert one.line["loss"] == pytest.approx(expected_loss(one, goal, valid), rel=1e-4)


def test_jitter_changes_colours_and_nothing_else(rooms):
    image = rooms[0].view(0).image[None]
    changed = distill.jitter(image, 3)
    assert torch.equal(changed, distill.jitter(image, 3)) and not torch.equal(changed, distill.jitter(image, 4))
    assert changed.shape == image.shape and 0 <= changed.min() and changed.max() <= 1
    assert (changed - image).abs().mean() > 0.01
    for seed in range(8):
        pair = torch.stack([x[0].mean(0).flatten()[:2000] for x in (image, distill.jitter(image, seed))])
        assert torch.corrcoef(pair)[0, 1] > 0.9


def test_bf16_stays_close_and_full_precision_keeps_the_prototypes(one_step):
    exact, rounded = (one_step(*flags).line["loss"] for flags in ([], ["--bf16"]))
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def test_presets_hold_the_numbers_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = distill.parse(["--preset", "vits"])
    paper = dict(prototypes=65536, max_steps=50000, lr=2e-5, rank=8, hidden=2048, bottleneck=256, momentum=0.999,
                 ema_every=10, blend=0.5, batch=1, geometry="mvsplat", model="dinov2_vits14", mvsplat="tiny")
    assert {name: getattr(args, name) for name in paper} == paper
    assert distill.parse(["--preset", "vitb"]).model == "dinov2_vitb14"
    Path("re10k.ckpt").touch()
    assert distill.parse(["--preset", "vits"]).mvsplat == "re10k.ckpt"
    assert distill.parse(["--preset", "vits", "--prototypes", "7", "--lr", "1"]).prototypes == 7
    assert distill.parse([]).preset == ("vits" if torch.cuda.is_available() else "tiny")


@pytest.mark.parametrize("flags,named,asked", [
    ("--preset vits --device cpu", False, []), ("--preset tiny --device cuda", False, []),
    ("--preset tiny --device cpu", False, [1]), ("--preset tiny --device cpu", True, [])])
def test_small_tensors_get_one_thread(monkeypatch, flags, named, asked):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2") if named else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distill.few_threads(distill.parse(flags.split()))
    assert given == asked


# -------------------------------------------------------------------------------- the run


def test_the_script_improves_on_its_start(rooms_dir, tmp_path):
    out = tmp_path / "run"
    flags = "--max_steps 36 --triplets 40 --heldout 6 --eval_every 12 --geometry depth --device cpu".split()
    printed = script("--scene_dir", rooms_dir, "--out", out, "--operators", tmp_path / "operators", *flags)
    result, log = json.loads((out / "result.json").read_text()), lines_of(out)
    assert result["after"]["matching"] > result["before"]["matching"] + 0.01
    assert result["after"]["rank"] > 0.95 * result["before"]["rank"]
    assert printed.startswith("preset tiny (") and " splat operators, " in printed
    assert "before: matching" in printed
    for name in ("student", "heldout.png"):
        assert (out / name).exists() and str(out / name) in printed
    assert "40 triplets: " in printed and "6 held-out triplets" in printed
    card = (out / "student" / "README.md").read_text()
    for says in ("license: mit", "started from `tiny`", "release with blending", "6 held-out triplets",
                 f"| after | {100 * result['after']['matching']:.1f} %", "from transformers import AutoModel"):
        assert says in card
    assert [line["step"] for line in log] == list(range(36)) and log[-1]["lr"] < 0.01 * log[0]["lr"]
    assert [line["step"] + 1 for line in log if "matching" in line] == [12, 24, 36]
    assert log[-1]["matching"] == pytest.approx(result["after"]["matching"], abs=0.01)
    student, start = lift.load_vit(out / "student"), lift.load_vit("tiny")
    assert not torch.equal(student.blocks[0].mlp.fc1.weight, start.blocks[0].mlp.fc1.weight)


@pytest.fixture(scope="module")
def undisturbed(rooms_dir, tmp_path_factory):
    """A whole run, how long it took, and its arguments; another --out has to come to the same bytes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    common = ["--scene_dir", rooms_dir, "--operators", folder / "operators", "--max_steps", 12, "--ema_every", 3,
              "--save_minutes", 0, *SMALL]
    for out in ("first", "whole"):  # the first one finds no operators, and takes longer
        begin = time.monotonic()
        assert finish(fork(*common, "--out", folder / out)) == 0
    return folder / "whole", time.monotonic() - begin, common


def same(out, whole):
    stopping.same(out, whole, 12, "adapters.safetensors", "result.json", "heldout.png")


def stopped(common, out, file, number=signal.SIGTERM):
    """A run that gets the signal when `file` is there."""
    process = fork(*common, "--out", out)
    while not (out / file).exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    return finish(process)


def test_a_run_killed_at_random_points_resumes_bit_identically(undisturbed, tmp_path):
    """Five kill -9, anywhere: start, operators, a step, the end. (Within each write: test_killed.py.)"""
    whole, seconds, common = undisturbed
    out, rng = tmp_path / "run", random.Random(0)
    again = lambda: fork(*common, "--operators", tmp_path / "operators", "--out", out, "--resume")
    kill_and_resume(again, out, 5, (rng.uniform(0.1, 0.9) * seconds for _ in itertools.count()))
    same(out, whole)


def test_stopped_with_a_full_disk_and_a_damaged_checkpoint_it_comes_to_the_same(undisturbed, tmp_path):
    whole, _, common = undisturbed
    out = tmp_path / "run"
    newest, previous = distill.checkpoint_paths(out)
    assert stopped([*common, "--save_minutes", 100], out, "settings.json") == 1  # asked to, it saves the step it is at
    step = distill.read_run(newest)[0]
    assert 0 < step < 12 and len(lines_of(out)) == step and not previous.exists()
    assert stopped([*common, "--resume"], out, previous.name) == 1
    before = {file: file.read_bytes() for file in (newest, previous)}
    assert finish(fork(*common, "--out", out, "--resume", file_limit=100_000)) == 1  # no checkpoint fits
    assert {file: file.read_bytes() for file in before} == before and not list(out.glob(".*[0-9]"))
    newest.write_bytes(before[newest][:5000])
    step = distill.read_run(previous)[0]
    for flags, says in (([], f"a run stopped here at step {step} of 12; --resume goes on"),
                        (["--lr", "0.5", "--resume"], "lr 0.003 -> 0.5"),
                        (["--loss", "cosine", "--resume"], "loss distill -> cosine")):
        assert says in refusal(*common, "--out", out, *flags)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["prototypes"] == 128 and settings["lr"] == 0.003 and settings["preset"] == "tiny"
    assert finish(fork(*common, "--out", out, "--resume")) == 0 and 0 < step < 12
    same(out, whole)


def test_a_loss_that_is_not_finite_names_the_triplet_and_keeps_the_checkpoint(undisturbed, tmp_path, monkeypatch):
    whole, _, common = undisturbed
    objective, calls = distill.objective, itertools.count(1)

    def failing(*arguments):
        loss, entropy = objective(*arguments)
        return loss * (math.nan if next(calls) == 4 else 1), entropy

    with monkeypatch.context() as patch:
        patch.setattr(distill, "objective", failing)
        assert "step 3: the loss is nan for room_" in refusal(*common, "--out", tmp_path / "run")
    assert distill.read_run(tmp_path / "run" / "checkpoint.safetensors")[0] == 3
    gc.collect()  # the refused run, which holds the lock of its folder as long as it lives
    assert finish(fork(*common, "--out", tmp_path / "run", "--resume")) == 0
    same(tmp_path / "run", whole)


def toy_run(out, max_steps=5, resume=False):
    net = torch.nn.Linear(2, 1)
    args = SimpleNamespace(out=str(out), max_steps=max_steps, resume=resume, save_minutes=100, device="cpu")
    return distill.Run(args, {"student": {"weight": net.weight}}, torch.optim.Adam(net.parameters()))


def test_a_second_interrupt_does_not_wait_for_the_end_of_the_step(tmp_path):
    run, handlers = toy_run(tmp_path), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        for step in run:
            os.kill(os.getpid(), signal.SIGINT)
            run.log(loss=1.0)
            if step == 1:
                raise AssertionError("the first interrupt ends the run after its step")
    assert distill.read_run(run.path)[0] == 1 and len(lines_of(tmp_path)) == 1
    names = lambda: sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names() == ["checkpoint.safetensors"]  # renamed, not copied
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 1, "lo')  # as a power cut may leave it
    del run
    run = toy_run(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        for step in run:
            assert step == 1 and len(lines_of(tmp_path)) == 1
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second interrupt ends the step")
    del run
    for step in (run := toy_run(tmp_path, resume=True)):
        run.args.save_minutes = 0
        run.log(loss=1.0)
    assert [distill.read_run(path)[0] for path in distill.checkpoint_paths(tmp_path)] == [5, 4] and len(names()) == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_two_processes_are_one(undisturbed, tmp_path):
    """Two gloo processes with half the batch each give the loss curve and the student of one, to rounding."""
    _, _, common = undisturbed
    own = ["--operators", tmp_path / "operators"]  # which both processes make
    common = [*common, "--batch", 2]
    assert finish(fork(*common, "--out", tmp_path / "one")) == 0
    printed = script(*common, *own, "--out", tmp_path / "two", launcher=stopping.TORCHRUN)
    assert printed.count("held-out triplets") == 1
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    assert len(two) == 12 and [line["triplets"] for line in one] == [line["triplets"] for line in two]
    assert len(one[0]["triplets"]) == 2
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    a, b = (lift.load_file(tmp_path / name / "adapters.safetensors") for name in ("one", "two"))
    assert all((a[key] - b[key]).abs().max() < 1e-3 for key in a)  # 12 Adam steps of 3e-3, whatever the gradient's size
    with pytest.raises(AssertionError, match="--batch 3 cannot be shared by 2 processes"):
        script(*common, "--batch", 3, "--out", tmp_path / "three", launcher=stopping.TORCHRUN)


# -------------------------------------------------------------------------------- fine-tuning MVSplat


def test_dissimilarity_is_one_minus_ssim():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 20, 24, generator=generator)
    assert distill.dissimilarity(a, a).abs().max() < 1e-5
    y, x = 9, 13  # one window by the definition (Wang et al. 2004), population statistics
    p, q = (image[0, y - 3:y + 4, x - 3:x + 4].double().flatten() for image in (a, b))
    m, n, v, w = p.mean(), q.mean(), p.var(correction=0), q.var(correction=0)
    covariance = ((p - m) * (q - n)).mean()
    ssim = (2 * m * n + 0.01**2) * (2 * covariance + 0.03**2) / ((m**2 + n**2 + 0.01**2) * (v + w + 0.03**2))
    assert abs(1 - distill.dissimilarity(a, b)[0, y, x].item() - ssim.item()) < 1e-5


@pytest.fixture(scope="module")
def sample(rooms):
    return splat.load_triplet(*place_of(rooms), (48, 64), "cpu")


def test_geometry_that_carries_nothing_is_said_to(rooms, sample, capsys):
    source = source_of(rooms, "--geometry", "depth")
    distill.judged_triplets(source, [place_of(rooms)])
    assert "warning" not in capsys.readouterr().out
    upside_down = torch.cat([sample.images[:2], sample.images[2:].flip(2, 3)])  # as with a wrong pose
    wrong = sample._replace(images=upside_down, masks=0 * sample.depth.long())
    with mock.patch.object(splat, "load_triplet", lambda *_: wrong):
        distill.judged_triplets(source, [place_of(rooms)])
    assert "warning: in 1 of 1 triplets" in capsys.readouterr().out


def test_without_depth_the_whole_view_counts(crooked):
    t = source_of(crooked).load(*place_of(crooked))

    def where(depth):
        with mock.patch.object(distill, "photometric", lambda image, truth, where: where):
            return distill.view_error(*splat.reconstruct("depth", t), t._replace(depth=depth))

    assert where(None).all() and where(0 * t.depth).all()  # nothing measured is as good as no depth
    seen, points = torch.zeros(48, 64, dtype=torch.bool), lift.depth_gaussians(t.depth[2:], t.K[2:], t.c2w[2:]).means
    for v in (0, 1):  # by each point of the target, in each context: is what is seen there as far away?
        p = (points - t.c2w[v, :3, 3]) @ t.c2w[v, :3, :3]
        x, y = ((p @ t.K[v].T)[:, :2] / p[:, 2:]).floor().long().T
        inside = (x >= 0) & (x < 64) & (y >= 0) & (y < 48)
        there = t.depth[v, y.clamp(0, 47), x.clamp(0, 63)]
        near = (there / p[:, 2] - 1).abs() < 0.06 * math.log(2) ** 0.5  # where cross_check falls to a half
        seen |= (inside & (there > 0) & near).view(48, 64) & (t.depth[2] > 0)
    assert torch.equal(where(t.depth), seen) and 0.3 < seen.float().mean() < 0.95


def test_the_error_of_depth_counts_where_it_is_known(crooked):
    t = source_of(crooked).load(*place_of(crooked))
    g = lift.depth_gaussians(t.depth[:2], t.K[:2], t.c2w[:2])
    assert (t.depth[:2] == 0).any() and distill.log_depth_error(g, t.depth[:2], t.c2w[:2]) < 1e-4
    farther = lift.depth_gaussians(1.2 * t.depth[:2], t.K[:2], t.c2w[:2])
    assert distill.log_depth_error(farther, t.depth[:2], t.c2w[:2]) == pytest.approx(math.log(1.2), rel=1e-3)


def test_measured_depth_is_the_best_geometry(sample):
    bent = sample._replace(depth=sample.depth * torch.tensor([1.3, 0.8, 1])[:, None, None])
    psnr = lambda t: -10 * distill.view_error(*splat.reconstruct("depth", t), t)[0].log10().item()
    assert psnr(sample) > 15 and psnr(bent) < psnr(sample) - 1


def test_the_loss_of_geometry_is_of_pixels_and_structure_and_hiding_does_not_pay(sample):
    """The loss sees uncovered pixels as black: a network that hides what it cannot explain does worse."""
    net = lift.load_mvsplat("tiny")
    mse, structure = distill.view_error(*splat.reconstruct("mvsplat", sample, net), sample)
    shown = distill.geometry_loss(net, sample, 0)
    assert torch.equal(shown, mse + 0.05 * structure) and structure > 0.01
    net.depth_predictor["to_disparity"][2].bias.data[1] -= 20  # the opacity's logit
    assert distill.geometry_loss(net, sample, 0) > 1.5 * shown


def test_photographs_alone_mend_bent_geometry(rooms_dir, tmp_path, capsys):
    """No depth is in the loss."""
    net, out = lift.load_mvsplat(bent_mvsplat(tmp_path)), tmp_path / "run"
    main("--scene_dir", rooms_dir, "--mvsplat", tmp_path / "bent.safetensors", "--out", out, *SMALL, "--heldout", 4,
         "--operators", tmp_path / "operators", "--finetune_geometry", 24, "--geometry_lr", 5e-4, "--max_steps", 1)
    result = json.loads((out / "geometry" / "result.json").read_text())
    assert result["fine-tuned"] > result["start"] + 0.5 and result["depth"] > result["start"] + 0.5
    printed, log = capsys.readouterr().out, lines_of(out / "geometry")
    assert f"start {result['start']:.2f}, fine-tuned {result['fine-tuned']:.2f}" in printed
    rates = [5e-4 * min(0.5 + 0.5 * math.cos(math.pi * n / 24), (n + 1) / 1.2) for n in range(24)]
    assert [line["lr"] for line in log] == pytest.approx(rates)  # a warm-up of a twentieth, then half a cosine
    rooms_of = lambda names: {name.split(":")[0] for name in names}
    heldout = json.loads((out / "result.json").read_text())["heldout"]
    assert not rooms_of(line["triplet"] for line in log) & rooms_of(heldout)
    theirs = lift.load_mvsplat(out / "geometry" / "mvsplat.safetensors")
    assert all(not torch.equal(value, theirs.state_dict()[key]) for key, value in net.state_dict().items())
    flags = "--scene_dir", rooms_dir, "--operators", tmp_path / "operators", "--max_steps", 1
    scenes, (place, *_), source = distill.prepare(distill.parse([*map(str, flags), *SMALL]))
    t = source.load(*place)
    with torch.no_grad():
        both = [splat.reconstruct("mvsplat", t, network)[0] for network in (net.eval(), theirs)]
        before, after = (distill.log_depth_error(g, t.depth[:2], t.c2w[:2]) for g in both)
    assert after < 0.8 * before  # depth, which no one showed to it
    (place,) = distill.draw_triplets(scenes, 1, 0)
    assert not source.path(*place).exists()
    source.use(theirs)
    assert source.path(*place).exists()  # distillation has used the new weights


def test_a_killed_fine_tuning_resumes_bit_identically(rooms_dir, tmp_path):
    common = ["--scene_dir", rooms_dir, "--operators", tmp_path / "operators", *SMALL, "--save_minutes", 0,
              "--max_steps", 2, "--pixels", 1536, "--finetune_geometry", 6, "--depth_weight", 0.05]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    main("--out", whole, *common)
    for file in ("geometry/checkpoint.safetensors", "geometry/result.json"):  # in its midst, and right after it
        assert stopped([*common, "--resume"], out, file, signal.SIGKILL) == -signal.SIGKILL
    assert "geometry_lr 0.0002 -> 0.5" in refusal("--out", out, *common, "--geometry_lr", "0.5")
    main("--out", out, *common, "--resume")
    for name in ("geometry/mvsplat.safetensors", "geometry/result.json", "student/model.safetensors", "result.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert stopping.log_of(out / "geometry") == stopping.log_of(whole / "geometry") and len(lines_of(out / "geometry")) == 6


def test_a_single_scene_without_depth_is_fine_tuned(rooms_dir, tmp_path, capsys):
    shutil.copytree(rooms_dir / "room_000", tmp_path / "scene/room", ignore=shutil.ignore_patterns("depth"))
    path = tmp_path / "scene/room/transforms.json"
    meta = json.loads(path.read_text())
    meta["frames"] = [{key: value for key, value in frame.items() if "depth" not in key} for frame in meta["frames"]]
    path.write_text(json.dumps(meta))
    flags = ["--scene_dir", tmp_path / "scene", "--operators", tmp_path / "o", *SMALL, "--finetune_geometry", 1,
             "--max_steps", 1, "--mvsplat", bent_mvsplat(tmp_path)]
    main("--out", tmp_path / "out", *flags)
    result = json.loads((tmp_path / "out/geometry/result.json").read_text())
    assert result.keys() == {"start", "fine-tuned"}
    moments = distill.read_run(tmp_path / "out/geometry/checkpoint.safetensors")[2]
    first = torch.cat([x.flatten() for key, x in moments.items() if key.endswith("exp_avg")])
    assert first.norm() == pytest.approx(0.1 * 0.5, rel=1e-3)  # of one step: the gradient was cut to length 0.5
    assert "no measured depth for --depth_weight" in refusal("--out", tmp_path / "x", *flags, "--depth_weight", "0.1")
    assert "has nothing to fine-tune" in refusal("--out", tmp_path / "x", *flags, "--geometry", "depth")
    depth = "--geometry", "depth", "--finetune_geometry", 0
    assert "no scene has measured depth" in refusal("--out", tmp_path / "x", *flags, *depth)
    assert not (tmp_path / "x").exists()


# -------------------------------------------------------------------------------- what is held out


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12])
def test_small_single_scenes_can_be_held_out_or_say_so(rooms, count, capsys):
    scene = rooms[1].subset(range(count))
    (train,), heldout, kind = distill.hold_out([scene], 6, 0)
    targets = {scene.frames[t[2]].name for _, t in heldout}
    assert heldout and len(set(t for _, t in heldout)) == len(heldout) <= 6
    held_out = not targets & {frame.name for frame in train.frames}
    assert count < 12 or distill.hold_out([scene], 6, 1)[1] != heldout == distill.hold_out([scene], 6, 0)[1]
    assert held_out == (kind == "held-out") == ("below are training views" not in capsys.readouterr().out)
    assert held_out or count < 6


def test_views_that_are_trained_on_are_not_called_held_out(rooms_dir, tmp_path, capsys):
    shutil.copytree(rooms_dir / "room_000", tmp_path / "room")
    path = tmp_path / "room/transforms.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"frames": meta["frames"][:3], "agreement": [0.31, 0.30]}))
    folders = "--scene_dir", tmp_path / "room", "--out", tmp_path / "out", "--operators", tmp_path / "o"
    main(*folders, "--max_steps", 1, *SMALL)
    printed = capsys.readouterr().out
    assert " training triplets\n" in printed and "held-out" not in printed
    assert "estimated from photos, do not trust them (neighbouring photos agree to 31 %" in printed


@pytest.mark.parametrize("flags,says", [
    ("--model dinov2_vits14", "license: apache-2.0"), ("--model my_weights", "license: other")])
def test_the_model_card_says_where_a_student_comes_from(flags, says):
    scores = distill.Agreement(0.5, 0.6, 70.0)
    card = distill.model_card(distill.parse(flags.split()), small_vit(), "2 held-out triplets", scores, scores)
    assert says in card and "last_hidden_state[:, 1:]" in card


def moved_apart(scene, which):
    scene.frames = [copy.copy(frame) for frame in scene.frames]
    for n in which:
        scene.frames[n].c2w = scene.frames[n].c2w.copy()
        scene.frames[n].c2w[:3, 3] += 1e4 * n + 1e3
    return scene


def test_distillation_and_probes_hold_out_the_same(rooms):
    probe = importlib.import_module("05_probe")
    scene = moved_apart(rooms[0].subset(range(12)), (0, 1, 5))  # which make no triplet
    (train,), heldout, _ = distill.hold_out([scene], 6, 0)
    with mock.patch.object(data, "open_scenes", lambda *_: [scene]):
        (probed,), (scored,) = probe.open_split(probe.parse(["--scene_dir", str(ROOT)]))
    names = lambda s: {frame.name for frame in s.frames}
    assert names(train) == names(probed) and not names(train) & names(scored)
    assert {scene.frames[t[2]].name for _, t in heldout} <= names(scored)
    turned = [rooms[i % 4].subset(range(8)) for i in range(10)]
    for n, room in enumerate(turned):
        room.name = f"room_{n}"
    moved_apart(turned[0], range(8))
    train, heldout, _ = distill.hold_out(turned, 4, 0)
    assert [s.name for s in train] == [f"room_{n}" for n in (1, 2, 3, 4, 5, 6, 8, 9)]
    assert {s.name for s, _ in heldout} == {"room_7"}
    part = [s.subset(range(6)) for s in turned[2:]]  # as with --geometry depth, where some have no depth
    assert {s.name for s, _ in distill.hold_out(part, 4, 0, turned)[1]} == {"room_7"}


def test_a_scene_without_overlap_is_left_out(rooms, capsys):
    turned = moved_apart(rooms[0].subset(range(3)), range(3))
    turned.name = "far_apart"
    train, *_ = distill.hold_out([turned, *rooms[1:]], 4, 0)
    assert "far_apart: left out" in capsys.readouterr().out and turned not in train
    with pytest.raises(data.DataError, match="no three views overlap"):
        distill.hold_out([turned], 4, 0)


REAL = ["posed_fox_instantngp", "colmap_bartoszek_statue", "rgbd_7scenes_redkitchen/original",
        "rgbd_instances_apc_shelf", "posed_masks_dtu_scan24"]


@pytest.mark.parametrize("name", REAL)
def test_real_scenes_run_without_flags(name, tmp_path, capsys):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    main("--scene_dir", folder, "--out", tmp_path, "--operators", tmp_path / "operators", "--max_steps", 2, *SMALL)
    assert "after:" in capsys.readouterr().out
