"""06_distill3r.py: networks and loss against the published numbers and slow loops, files against damage, commands.

The fixtures (fixtures/networks) hold what the official codes give for weights and images made by the recipes below.
"""
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import stopping
from stopping import log_of
from test_01_data import tree as contents
from test_02_lift import error_to, pick, recipe as vit_recipe, recipe_images

data, lift, distill, d3r = (importlib.import_module(n) for n in ("01_data", "02_lift", "04_distill", "06_distill3r"))
GeometricTeacher = importlib.import_module("tiny.teacher").GeometricTeacher
Pointmap, DataError = d3r.Pointmap, data.DataError
ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
NETWORKS, CACHE = FIXTURES / "networks", FIXTURES / "distill3r_cache.safetensors"
FULL = ROOT.parent / "shared/fixtures/networks/fast3r_full.safetensors"
POINTS, CONF, TOKENS = 2e-4, 3e-5, 3e-5  # max |a - b| / mean |b| that the fixtures' README demands
MAPS = {"pts3d_in_other_view": "points_global", "pts3d_local": "points_local",
        "conf": "conf_global", "conf_local": "conf_local"}
SLOW = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes 3 GB and a minute; SLOW=1 runs it")
SMALL = (28, 42)  # of pictures where a test brings its own teacher
TOY = ["--size", "48", "64", "--views", "2", "--no-mirror", "--device", "cpu"]
script = functools.partial(stopping.script, "06_distill3r")
main, message = (functools.partial(how, d3r.main) for how in (stopping.call, stopping.refusal))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def refusal(function, *arguments, kind=ValueError):  # the one line that a call ends with
    with pytest.raises(kind) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def pictures(folder, names, size=(48, 64), orientation=1):
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for n, name in enumerate(names):
        y, x = np.mgrid[0:size[0], 0:size[1]]
        ramp = np.stack([255 * (x + 0.5) / size[1], 255 * (y + 0.5) / size[0], np.full(size, 10 * n % 255)], -1)
        Image.fromarray(ramp.round().astype(np.uint8)).save(folder / name, exif=exif)
    return folder


# ------------------------------------------------------------------------------------------------ published networks


def generator_of(name):
    return seeded(zlib.crc32(name.encode()))


def recipe(key, shape):  # the fixtures' weights; the student's ViT comes in chunks
    gain = 0.15 if key.endswith(".dpt.head.4.weight") else 1.0
    return gain * vit_recipe(key.replace("encoder.blocks.", "encoder.blocks.0."), shape)


def with_recipe(model):
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(recipe(key, value.shape))
    return model.eval()


def check_maps(pointmap, truth, prefix, row=0):
    for name, ours in MAPS.items():
        theirs, value = truth[f"{prefix}/{name}"][row], getattr(pointmap, ours)
        assert value.shape[2:] == theirs.shape[2:]
        stored = value[pick(len(value), len(theirs))][:, pick(value.shape[1], theirs.shape[1])]
        assert error_to(stored, theirs) < (POINTS if name.startswith("pts") else CONF), name


FAST3R = json.loads((NETWORKS / "fast3r.json").read_text())
FAST3R_TRUTH = load_file(NETWORKS / "fast3r.safetensors")
STUDENT = json.loads((NETWORKS / "distill3r_student.json").read_text())


@functools.cache
def toy_fast3r():
    c = FAST3R["config"]
    return with_recipe(d3r.Fast3R(c["ed"], c["eh"], c["edep"], c["dd"], c["dh"], c["ddep"]))


def tiny_student(seed=0):
    torch.manual_seed(seed)
    return d3r.Student(d3r.StudentConfig.tiny).eval()


def toy_images(case, sample=0):
    c = FAST3R["cases"][case]
    return [recipe_images(f"{case}/v{i}", (c["batch"], 3, *size))[sample] for i, size in enumerate(c["views"])]


@pytest.mark.parametrize("case", FAST3R["cases"])
@torch.no_grad()
def test_fast3r_gives_the_published_numbers(case, monkeypatch):
    c, model = FAST3R["cases"][case], toy_fast3r()
    for block in model.decoder.dec_blocks:
        monkeypatch.setattr(block.attn, "sharper", c["attn_bias"])
    model.train(c["training"])
    for sample in range(c["batch"]):
        images = toy_images(case, sample)
        # The training loader stores portrait samples transposed; the network sees them upright.
        turned = [size[sample][0] > size[sample][1] for size in c["true_shape"] or ()] or [False] * len(images)
        ids = c["image_ids"][sample] if c["image_ids"] else range(len(images))
        maps = model([image.mT if t else image for image, t in zip(images, turned)], view_ids=ids)
        for i, (view, t) in enumerate(zip(maps, turned)):
            view = Pointmap(*(x.transpose(0, 1) for x in view)) if t else view
            check_maps(view, FAST3R_TRUTH, f"{case}/v{i}", sample)
    model.eval()


@pytest.mark.parametrize("case", ["n1", "n3_mixed"])
@torch.no_grad()
def test_tokens_and_levels_are_fast3rs(case):
    model, images = toy_fast3r(), toy_images(case)
    tokens = d3r.a_few_at_once(model.tokens, 8, images)
    levels = model.decoder(tokens, list(range(len(images))))
    names = ["encoder", "hook0", "hook5", "hook7", "hook10"]
    for name, ours in zip(names, [tokens[0]] + [torch.cat(list(views)) for views in levels]):
        theirs = FAST3R_TRUTH[f"{case}/{name}"][0]
        assert error_to(ours[pick(len(ours), len(theirs))], theirs) < TOKENS, name


@torch.no_grad()
def test_operations_are_fast3rs():
    ops = {key.removeprefix("ops/"): value for key, value in FAST3R_TRUTH.items() if key.startswith("ops/")}
    assert error_to(d3r.rotate(ops["rope_in"], d3r.rotary_angles(4, 6, 16)), ops["rope_out"]) < 1e-6
    for dim in (48, 384, 1024):
        assert error_to(d3r.view_codes([0, 1, 17, 512, 999], dim), ops[f"image_idx_emb_{dim}"]) < 1e-6
    points, conf = d3r.read_out(ops["post_in"].permute(0, 3, 1, 2))
    assert error_to(points, ops["pts_exp"]) < 1e-6 and error_to(conf, ops["conf_exp_1_inf"]) < 1e-6
    model, angle = toy_fast3r(), d3r.rotary_angles(4, 6, 16)  # tokens of so low variance that the norms' eps shows
    small = lambda which, dim: 3e-3 * torch.randn((1, 24, dim), generator=generator_of(f"ops/{which}_small"))
    x, y = small("enc", 64), small("dec", 48)
    for name, ours in {"enc_block0": model.encoder.enc_blocks[0](x, angle), "enc_norm": model.encoder.enc_norm(x),
                       "dec_block0": model.decoder.dec_blocks[0](y), "dec_norm": model.decoder.dec_norm(y)}.items():
        assert error_to(ours, ops[f"{name}_small"]) < TOKENS, name


@torch.no_grad()
def test_view_ids_are_drawn_number_for_number_and_from_the_generator_given():
    for known in FAST3R["image_id_draws"]:
        assert d3r.draw_view_ids(known["views"], seeded(known["manual_seed"])) == known["ids"][0]
        torch.manual_seed(known["manual_seed"])
        assert d3r.draw_view_ids(known["views"]) == known["ids"][0]
    every = d3r.draw_view_ids(1000, seeded())
    assert every[0] == 0 and sorted(every) == list(range(1000))
    call = lambda seed: toy_fast3r()(toy_images("n2_portrait"), generator=seeded(seed))[1].points_global
    assert torch.equal(call(3), call(3)) and not torch.allclose(call(3), call(4), rtol=1e-2)


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        networks = d3r.Fast3R(), d3r.Student()
    known = [(647_551_368, 712, 303_098_880, 303_361_024, 20_545_732),
             (71_969_288, 388 - 8, 21_925_632, 10_795_392, 19_624_132)]  # 8 second names
    for model, (all_of_it, tensors, *parts) in zip(networks, known):
        count = [sum(p.numel() for p in part.parameters())
                 for part in (model, model.encoder, model.decoder, model.downstream_head)]
        assert count == [all_of_it, *parts] and len(model.state_dict()) == tensors


@SLOW
@torch.no_grad()
def test_fast3r_at_full_size(tmp_path):
    if not FULL.exists():
        pytest.skip(f"{FULL} is not here")
    lift.save_tensors(tmp_path / "model.safetensors", with_recipe(d3r.built(d3r.Fast3R)).state_dict())
    truth, model = load_file(FULL), d3r.load_fast3r(tmp_path)
    images = [recipe_images(f"full/v{i}", (1, 3, 160, 224))[0] for i in range(2)]
    levels = model.decoder(d3r.a_few_at_once(model.tokens, 8, images), [0, 1])
    for name, level in zip(("hook0", "hook12", "hook18", "hook24"), levels):
        level = torch.cat(list(level))
        assert error_to(level[pick(len(level), truth[name].shape[1])], truth[name][0]) < TOKENS, name
    for i, view in enumerate(model(images, view_ids=[0, 1])):
        check_maps(view, truth, f"v{i}")


def to_lightning(model, prefix):  # the official checkpoint: a prefix, second names, the ViT in chunks
    state = model.state_dict()
    for local, n in itertools.product(("", "_local"), range(4)):
        scratch = f"downstream_head{local}.dpt.scratch"
        state[f"{scratch}.layer_rn.{n}.weight"] = state[f"{scratch}.layer{n + 1}_rn.weight"]
    state = {prefix + re.sub(r"^encoder\.blocks\.", "encoder.blocks.0.", key): value for key, value in state.items()}
    return {"state_dict": {**state, "teacher_filter.threshold": torch.ones(1)}, "epoch": 7,
            "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1e-4, "root": Path("/nowhere")}}


@functools.cache
def published_student():  # by way of the official layout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        torch.save(to_lightning(with_recipe(d3r.built(d3r.Student)), "student."), path)
        stored = torch.load(path, weights_only=False)["state_dict"]
        assert sum(key.startswith("student.") for key in stored) == STUDENT["keys"]
        return d3r.load_student(path)


@pytest.mark.parametrize("case", [
    pytest.param(c, marks=() if c in ("n1", "n2_train") else SLOW) for c in STUDENT["cases"]])
@torch.no_grad()
def test_the_student_gives_the_published_numbers(case):
    c, truth, model = STUDENT["cases"][case], load_file(NETWORKS / "distill3r_student.safetensors"), published_student()
    images = [recipe_images(f"student/{case}/v{i}", (1, 3, *c["size"]))[0] for i in range(c["views"])]
    draw = dict(view_ids=c["image_ids"]) if c["seed"] is None else dict(generator=seeded(c["seed"]))
    maps = model.train(c["training"])(images, **draw, at_once=2)
    model.eval()
    for i, view in enumerate(maps):
        check_maps(view, truth, f"{case}/v{i}")


# ------------------------------------------------------------------------------------------------ calls and files


@torch.no_grad()
def test_values_do_not_depend_on_the_blocks():
    model = copy.deepcopy(toy_fast3r()).double()  # kernels may round differently with the number of views
    sizes = [(48, 32), (16, 48), (48, 32), (48, 32), (16, 48)]
    images = [torch.rand(3, *size, generator=seeded(i)).double() for i, size in enumerate(sizes)]
    alone = model(images, range(5), at_once=1)
    assert [tuple(view.conf_global.shape) for view in alone] == sizes
    for at_once in (2, 8):
        for view, same in zip(model(images, range(5), at_once=at_once), alone):
            assert all(error_to(a, b) < 1e-12 for a, b in zip(view, same))


@torch.no_grad()
def test_half_precision_stays_near_and_its_maps_are_fp32():
    for model in (toy_fast3r(), tiny_student()):
        images = [torch.rand(3, *size, generator=seeded(1)) for size in ((64, 96), (48, 64))]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, [0, 7])
        for ours, exact in zip(rounded, model(images, [0, 7])):
            for a, b in zip(ours, exact):
                # 2e-2 is what the fixtures' README allows a run in bf16; exactly 0 would mean that nothing ran in it.
                assert a.dtype == torch.float32 and 0 < ((a - b).square().mean() / b.square().mean()).sqrt() < 2e-2


def test_recomputing_changes_memory_and_not_gradients():
    model, images = tiny_student().train(), [torch.rand(3, 32, 32), torch.rand(3, 32, 48), torch.rand(3, 32, 32)]
    target = [Pointmap(*(x.detach() + 1 for x in view)) for view in tiny_student(1)(images, [0, 1, 2])]
    masks, gradients, kept = [t.conf_global > 0 for t in target], [], []
    for again in (False, True):
        if again:
            d3r.recompute(model)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = d3r.pointmap_loss(model(images, [0, 1, 2], at_once=1), target, masks).total
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    used = [(a, b) for a, b in zip(*gradients) if a is not None]
    assert len(used) > 200 and all(torch.equal(a, b) for a, b in used)
    unused = {name for (name, _), g in zip(model.named_parameters(), gradients[1]) if g is None}
    assert all("refinenet4.resConfUnit1" in name or name == "encoder.mask_token" for name in unused)


@pytest.mark.parametrize("shapes, ids, words", [
    ([(3, 16, 16)] * 1001, None, "1001 views in one call, not 1 to 1000"),
    ([], None, "0 views"),
    ([(3, 16, 16), (3, 16, 30)], None, r"view 1 is \(3, 16, 30\); give \(3, H, W\), H and W multiples of 16"),
    ([(1, 3, 16, 16)], None, r"view 0 is \(1, 3, 16, 16\)"),
    ([(3, 0, 16)], None, r"view 0 is \(3, 0, 16\)"),
    ([(3, 16, 16)], [0, 1], "view_ids: 2 for 1 views"),
    ([(3, 16, 16)], [1000], r"each in 0\.\.999")])
def test_what_cannot_be_run_is_said_before_it_starts(shapes, ids, words):
    assert re.search(words, refusal(toy_fast3r(), [torch.zeros(shape) for shape in shapes], ids))


def write_fast3r(folder, state=None, sharper=False):
    folder.mkdir(exist_ok=True)
    state = state or toy_fast3r().state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    decoder = dict(num_heads=3, attn_bias_for_inference_enabled=sharper)
    config = dict(encoder_args=dict(num_heads=4), decoder_args=decoder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fast3r_is_read_from_the_published_layouts(tmp_path):
    truth = toy_fast3r().state_dict()
    torch.save(to_lightning(toy_fast3r(), "net."), tmp_path / "last.ckpt")
    for path in (write_fast3r(tmp_path), tmp_path / "model.safetensors", tmp_path / "last.ckpt"):
        model = d3r.load_fast3r(path)
        assert not model.training and not any(block.attn.sharper for block in model.decoder.dec_blocks)
        assert (model.encoder.enc_blocks[0].attn.heads, model.decoder.dec_blocks[0].attn.heads) == (4, 3)
        assert model.state_dict().keys() == truth.keys()
        assert all(torch.equal(v, truth[k]) for k, v in model.state_dict().items())
    blocks = d3r.load_fast3r(write_fast3r(tmp_path, sharper=True)).decoder.dec_blocks
    assert all(block.attn.sharper for block in blocks)


@pytest.mark.parametrize("damage, says", [
    (lambda s: s.pop("decoder.dec_blocks.3.mlp.fc2.bias"), "decoder.dec_blocks.3.mlp.fc2.bias is missing"),
    (lambda s: s.update(surplus=torch.zeros(1)), "no part of the Fast3R takes: surplus"),
    (lambda s: s.pop("encoder.enc_norm.weight"), "lacks 'encoder.enc_norm.weight'; it is no Fast3R")])
def test_fast3r_is_read_strictly(tmp_path, damage, says):
    state = dict(toy_fast3r().state_dict())
    damage(state)
    said = refusal(d3r.load_fast3r, write_fast3r(tmp_path, state))
    assert says in said and str(tmp_path / "model.safetensors") in said


def test_a_student_comes_back_from_its_folder_or_says_what_is_wrong_with_it(tmp_path):
    assert "jedyang97/Fast3R_ViT_Large_512" in refusal(d3r.load_fast3r, tmp_path / "none.safetensors")
    assert "Distill3R" in refusal(d3r.load_student, tmp_path)
    model, images = d3r.Student(d3r.StudentConfig.tiny._replace(size=(24, 40))).eval(), [torch.rand(3, 48, 64)] * 2
    d3r.save_student(model, tmp_path)
    again = d3r.load_student(tmp_path)
    assert again.config == model.config and not again.training
    for ours, theirs in zip(model(images, [0, 5]), again(images, [0, 5])):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))

    def asked(*flags):
        return d3r.model_of(d3r.parse(["infer", "--weights", str(tmp_path), *flags]), "student").view_size(480, 640)
    assert asked() == asked("--preset", "full") == (24, 40) and asked("--size", "48", "64") == (48, 64)
    (tmp_path / "config.json").unlink()  # then it is taken for the published one, whose sizes it does not have
    assert "encoder.cls_token is (1, 1, 192), but (1, 1, 384) was expected" in refusal(d3r.load_student, tmp_path)


# ------------------------------------------------------------------------------------------------ the loss


def slow_loss(pred, target, masks, weight, mean):
    """Eq. 1-6 pixel by pixel in Python's own floats; the maps are V of Pointmap's four arrays."""
    pixels = [[tuple(p) for p in np.argwhere(mask)] for mask in masks]  # of each view
    number, part = sum(map(len, pixels)), {}
    length = lambda x: math.sqrt(sum(float(v) ** 2 for v in x))
    weights = {"teacher": lambda ours, theirs: theirs, "clamped": lambda ours, theirs: min(max(theirs / 10, 0.1), 1),
               "student": lambda ours, theirs: min(max(ours / 10, 0.1), 1), "none": lambda ours, theirs: 1}
    for which in (0, 1):  # global, local
        sums = []
        for k, places in enumerate(pixels):
            inside = range(len(pixels)) if which == 0 else [k]  # the views that share a scale
            many = max(1, sum(len(pixels[i]) for i in inside))
            scales = [sum(length(maps[i][which][p]) for i in inside for p in pixels[i]) / many
                      for maps in (pred, target)]
            total = 0.0
            for p in places:
                w = weights[weight](float(pred[k][which + 2][p]), float(target[k][which + 2][p]))
                pairs = zip(pred[k][which][p], target[k][which][p])
                total += w * sum((float(a) / scales[0] - float(b) / scales[1]) ** 2 for a, b in pairs)
            sums.append((total, len(places)))
        part[which] = (sum(t for t, _ in sums) / max(1, number) if mean == "pixels"
                       else sum(t / max(1, n) for t, n in sums) / len(sums))
    apart = sum(abs(float(pred[k][c][p]) - float(target[k][c][p]))
                for k, places in enumerate(pixels) for p in places for c in (2, 3))
    confidence = apart / 2 / max(1, number)
    return 2 * part[0] + part[1] + 0.001 * confidence, part[0], part[1], confidence


def random_views(seed, sizes, spread=1.0):
    g = seeded(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return [Pointmap(spread * draw(*s, 3), spread * draw(*s, 3) + 1, 1 + draw(*s).exp(), 1 + 3 * draw(*s).exp())
            for s in sizes]


def loss_case(name):
    sizes = {"two": [(3, 4), (5, 2)], "one": [(4, 3)]}.get(name, [(3, 4), (5, 2), (2, 2)])
    masks = [torch.rand(s, generator=seeded(9)) < 0.6 for s in sizes]
    if name == "an empty view":
        masks[1][:] = False
    return random_views(1, sizes), random_views(2, sizes, 3.0), masks


def with_gradients(views):
    return [Pointmap(*(x.clone().requires_grad_() for x in view)) for view in views]


@pytest.mark.parametrize("mean", ["pixels", "views"])
@pytest.mark.parametrize("weight", d3r.WEIGHTS)
@pytest.mark.parametrize("name", ["two", "one", "an empty view"])
def test_the_loss_is_that_of_the_loop_and_its_gradients_are_its_slopes(name, weight, mean):
    pred, target, masks = loss_case(name)
    arrays = [[[x.numpy() for x in view] for view in views] for views in (pred, target)]
    loss = d3r.pointmap_loss(pred, target, masks, weight=weight, mean=mean)
    slow = slow_loss(*arrays, [m.numpy() for m in masks], weight, mean)
    assert [x.item() for x in loss] == pytest.approx(slow, rel=1e-12)
    half = [Pointmap(*(x.half() for x in view)) for view in target]  # as the cache has it
    assert d3r.pointmap_loss(pred, half, masks).total.dtype == torch.float64

    def total(*maps):
        views = [Pointmap(*maps[n:n + 4]) for n in range(0, len(maps), 4)]
        return d3r.pointmap_loss(views, target, masks, weight=weight, mean=mean).total
    maps = [x for view in with_gradients(pred) for x in view]
    assert torch.autograd.gradcheck(total, maps, eps=1e-5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("global_target", ["direct", "aligned"])
def test_masked_pixels_may_hold_anything_and_nothing_valid_is_a_loss_of_zero(global_target):
    pred, target, masks = loss_case("three")
    results = []
    for junk in (0.0, math.nan, math.inf):
        fill = lambda views: [Pointmap(*(torch.where(m if x.ndim == 2 else m[..., None], x, junk) for x in view))
                              for view, m in zip(views, masks)]
        ours = with_gradients(fill(pred))
        loss = d3r.pointmap_loss(ours, fill(target), masks, global_target=global_target)
        gradients = [x for view in ours for x in torch.autograd.grad(loss.total, list(view), retain_graph=True)]
        results.append([*gradients, torch.stack(loss)])
    for same in zip(*results):
        assert same[0].isfinite().all() and torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    pred = with_gradients(pred)
    for mean in ("pixels", "views"):
        loss = d3r.pointmap_loss(pred, target, [m & False for m in masks], mean=mean, global_target=global_target)
        assert [x.item() for x in loss] == [0, 0, 0, 0]
        gradients = [g for view in pred for g in torch.autograd.grad(loss.total, list(view), retain_graph=True)]
        assert all((g == 0).all() for g in gradients)


LOSS = json.loads((NETWORKS / "distill3r_loss.json").read_text())
LOSS_TRUTH = load_file(NETWORKS / "distill3r_loss.safetensors")


@pytest.mark.parametrize("name, weight", [
    ("default", "clamped"), ("no_conf_weight", "none"), ("student_conf_weight", "student")])
@pytest.mark.parametrize("case", ["b1n1_masked", "b1n3_full", "b1n3_masked"])
def test_the_official_loss_is_a_pair_of_flags(case, name, weight):
    get = lambda which, *names: [Pointmap(*(x.clone() for x in maps)) for maps in
                                 zip(*(LOSS_TRUTH[f"{case}/{which}/{n}"][0] for n in names))]
    names = ("xyz_global", "xyz_local", "conf", "conf_local")
    pred, target = with_gradients(get("pred", *names)), get("target", *names[:2], "conf_global", "conf_local")
    masks, known = list(LOSS_TRUTH[f"{case}/mask"][0].bool()), LOSS["cases"][case][name]
    loss = d3r.pointmap_loss(pred, target, masks, weight=weight, mean="views")
    parts = [LOSS["alpha_g"] * loss.global_, LOSS["alpha_l"] * loss.local, LOSS["gamma"] * loss.confidence]
    assert [x.item() for x in parts] == pytest.approx([known[k] for k in ("global", "local", "confidence")], rel=1e-5)
    if f"{case}/grad_{name}/{names[0]}" in LOSS_TRUTH:
        loss.total.backward()
        for field, theirs in enumerate(names):
            ours = torch.stack([view[field].grad for view in pred])
            assert error_to(ours, LOSS_TRUTH[f"{case}/grad_{name}/{theirs}"][0]) < 2e-5


def test_local_maps_are_aligned_as_officially():
    for v in range(3):
        local, global_, conf = (LOSS_TRUTH[f"align/v{v}/{name}"][0] for name in ("local", "global", "conf"))
        view, every = Pointmap(global_, local, conf, conf), torch.ones_like(conf, dtype=torch.bool)
        for quantile, name in (((), "out_p85"), ((0.0,), "out_p0")):
            assert error_to(d3r.aligned_global(view, every, *quantile), LOSS_TRUTH[f"align/v{v}/{name}"][0]) < 2e-5
        few = torch.zeros_like(every)
        few[0, :2] = True
        assert torch.equal(d3r.aligned_global(view, few), local)  # two points fix no rotation
        few[0, :8] = True  # the two surest of eight are too few: fitted on all eight
        s, R, t = d3r.similarity(local[few], global_[few])
        assert torch.allclose(d3r.aligned_global(view, few), (s * local.double() @ R.T + t).float())
    pred, target, masks = loss_case("two")
    by_hand = [v._replace(points_global=d3r.aligned_global(v, m)) for v, m in zip(target, masks)]
    loss = d3r.pointmap_loss(pred, target, masks, global_target="aligned").total
    assert loss == d3r.pointmap_loss(pred, by_hand, masks).total != d3r.pointmap_loss(pred, target, masks).total


# ------------------------------------------------------------------------------------------------ photos and manifest


def paths_of(root, *arguments):
    return [line["path"] for line in d3r.make_manifest(root, *arguments)]


def test_the_manifest_is_in_natural_order_and_keeps_tails_and_short_scenes(crooked_dir, tmp_path):
    root = tmp_path / "holiday"
    pictures(root / "video", [f"frame{n}.png" for n in random.Random(0).sample(range(1, 46), 45)], (12, 16))
    pictures(root / "few10", ["b.jpg", "a.jpg"])
    pictures(root / "few9", ["one.PNG"], (64, 48))
    lines = d3r.make_manifest(root)
    assert {name: len(part) for name, part in d3r.samples_of(lines).items()} == {
        "few9/000": 1, "few10/000": 2, "video/000": 20, "video/001": 20, "video/002": 5}
    assert [line["scene"] for line in lines[:3]] == ["few9", "few10", "few10"]
    assert [line["path"] for line in lines[3:]] == [f"video/frame{n}.png" for n in range(1, 46)]
    assert lines[0] == dict(scene="few9", sample="few9/000", size=[64, 48], path="few9/one.PNG",
                            bytes=(root / "few9/one.PNG").stat().st_size)
    assert paths_of(root / "video", 20, 10) == [f"frame{n}.png" for n in range(1, 46, 10)]
    lines = d3r.make_manifest(crooked_dir, 5)  # of posed scenes the images alone
    assert [len(part) for part in d3r.samples_of(lines).values()] == [5, 5, 2] * 2
    assert lines[3]["path"] == "crooked_0/images/003.png" and lines[3]["size"] == [48, 64]
    assert d3r.make_manifest(crooked_dir / "crooked_1")[-1]["sample"] == "crooked_1/000"


def test_no_photo_is_lost_or_taken_for_a_map_and_bad_ones_are_named(tmp_path, capsys):
    root, bad = tmp_path / "same", pictures(tmp_path / "bad", ["a.png", "c.jpg"])
    for folder, name in (("", "a.jpg"), ("same", "b.jpg"), ("x/images", "c.jpg"), ("x/masks", "c.png")):
        pictures(root / folder, [name])
    assert sorted(paths_of(root)) == ["a.jpg", "same/b.jpg", "x/images/c.jpg"]
    for path in (tmp_path / "phone/a.HEIC", *(root / f"IMG_{n}.HEIC" for n in range(6))):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\0\0\x18ftypheic")
    assert len(paths_of(root)) == 3 and "ignored: 6 HEIC files" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    (bad / "b.png").write_bytes(b"no picture")
    for folder, words in (("phone", "1 HEIC files, which are not read; save them as JPEG or PNG"),
                          ("none", "no such folder"), ("empty", "no picture in here"),
                          ("bad", "b.png: cannot be decoded (not a picture); restore the file or pass --skip_bad")):
        assert words in refusal(d3r.make_manifest, tmp_path / folder, kind=DataError)
    (bad / "c.jpg").write_bytes((bad / "c.jpg").read_bytes()[:-200])  # cut off
    pictures(bad / ".thumbnails", ["a.png"])
    assert paths_of(bad, 20, 1, True) == ["a.png"] and "c.jpg: cannot be decoded" in capsys.readouterr().out


def test_pictures_of_other_types_are_read_and_huge_ones_are_to_be_made_smaller(tmp_path, monkeypatch):
    endings = [".Jpg", ".webp", ".tif", ".bmp", ".JPEG"]
    pictures(tmp_path / "p", [f"{n}{end}" for n, end in enumerate(endings)])
    assert [Path(path).suffix for path in paths_of(tmp_path / "p")] == endings
    scene, index = d3r.open_scene(tmp_path / "p", "p")
    assert all(scene.view(i, SMALL).image.shape == (3, *SMALL) for i in index.values())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # as if they had 200 million
    assert "make the picture smaller" in refusal(d3r.make_manifest, tmp_path / "p", kind=DataError)


@pytest.mark.parametrize("orientation", [*range(1, 9), b"junk", b"II*\0\x08"])
def test_photos_are_the_right_way_up_whatever_their_exif_says(tmp_path, orientation):
    """Pillow's own transposition is the truth where the note can be read, else the picture as it is stored."""
    picture, exif = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 4), np.uint8)), Image.Exif()
    picture.putalpha(255)  # RGBA: putting it on white loses the note
    readable = isinstance(orientation, int)
    if readable:
        exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif if readable else b"Exif\0\0" + orientation)
    (scene, _), stored = d3r.open_scene(tmp_path, tmp_path.name), Image.open(tmp_path / "a.png")
    truth = np.asarray(ImageOps.exif_transpose(stored) if readable else picture)[..., :3]
    assert scene.frames[0].size == truth.shape[:2]
    assert np.array_equal((255 * scene.view(0).image).round().permute(1, 2, 0).numpy(), truth)


class Painter:
    """A teacher whose points are the colours that it sees, so that targets can be compared with images."""
    identity = "painter"

    def __init__(self, view_size=lambda h, w: (h, w)):
        self.view_size = view_size

    def __call__(self, views, generator):
        colours = [view.image.permute(1, 2, 0) for view in views]
        return [Pointmap(c, 2 * c, *torch.full((2, *c.shape[:2]), 5.0)) for c in colours]


@pytest.mark.parametrize("view_size", [d3r.fast3r_size, lambda h, w: (h, w), lambda h, w: d3r.oriented(SMALL, h, w)])
def test_image_and_target_show_the_same_point_in_portrait_and_landscape(view_size, tmp_path):
    root = tmp_path / "p"
    pictures(root / "a", ["wide.png"], (96, 160))
    pictures(root / "b", ["tall.png"], (160, 96))
    pictures(root / "c", ["lying.png"], (160, 96), orientation=6)  # stored tall, shown wide
    pictures(root / "d", ["square.png"], (101, 101))
    d3r.write_cache(Painter(view_size), root, tmp_path / "cache", SMALL)
    cached = list(d3r.CachedViews(root, tmp_path / "cache"))
    for sample, shape in zip(cached, (SMALL, SMALL[::-1], SMALL, SMALL), strict=True):
        (image,), (target,), (mask,) = sample.images, sample.targets, sample.masks
        assert image.shape[1:] == mask.shape == shape
        # A crop to whole patches may leave out the border; inside, a ramp is the same by any resampling.
        assert mask[2:-2, 2:-2].all()
        off = torch.stack([image.permute(1, 2, 0) - x for x in (target.points_global, target.points_local / 2)])
        assert off[:, 2:-2, 2:-2].abs().max() < 0.012, sample.name
    square = cached[3].images[0]
    rows, cols = (float(square[c].max() - square[c].min()) for c in (1, 0))
    assert cols > 0.95 and rows == pytest.approx(SMALL[0] / SMALL[1] * cols, abs=0.04)  # cropped, not stretched


@pytest.mark.parametrize("stored, size", [
    ((480, 640), (384, 512)), ((640, 480), (512, 384)), ((1080, 1920), (288, 512)), ((968, 1296), (368, 512)),
    ((100, 300), (160, 512))])
def test_fast3r_looks_at_the_sizes_that_the_official_loader_gives(stored, size):
    assert d3r.fast3r_size(*stored) == size


def test_what_a_map_does_not_show_of_its_photo_is_not_known():
    middle = Pointmap(*torch.ones(2, 50, 100, 3), *torch.ones(2, 50, 100))  # of a photo of 100x100
    known = d3r.resampled(middle, (100, 100), (20, 20)).points_local.isfinite().all(-1)
    assert known[5:15].all() and not known[:5].any() and not known[15:].any()


# ------------------------------------------------------------------------------------------------ the cache


def write(root, out, strength=1, **changed):
    how = {"size": SMALL, "views": 5, **changed}
    return d3r.write_cache(GeometricTeacher(SMALL, strength), root, out, **how)


@pytest.fixture(scope="module")
def cache(crooked_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    write(crooked_dir, out)
    return out


def maps_of(kind, shape=(17, 23)):
    if kind == "room":
        depth = torch.full(shape, 3.0)
        depth[5:12, 6:14] = 1.2
        K = torch.tensor([[20.0, 0, shape[1] / 2], [0, 20.0, shape[0] / 2], [0, 0, 1]])
        view = data.View("v", None, K, torch.eye(4), None, depth, None, None)
        return d3r.filtered(GeometricTeacher(shape)([view, view], seeded())[1], 0.3)[0]
    if kind == "bits":  # any finite float16, -0.0, subnormals and the largest among them
        bits = np.random.default_rng(0).integers(0, 2**16, (8, *shape), dtype=np.uint16)
        return np.where((bits & 0x7C00) == 0x7C00, 0x8000, bits).astype(np.uint16).view(np.float16)
    return np.full((8, *shape), {"zero": 0, "huge": -65504}[kind], np.float16)


@pytest.mark.parametrize("kind", ["room", "bits", "zero", "huge"])
@pytest.mark.parametrize("valid", [0.0, 0.03, 0.6, 1.0])
def test_the_coding_of_a_view_is_exact_to_the_bit(kind, valid):
    maps = maps_of(kind)
    mask = np.random.default_rng(1).random(maps.shape[1:]) < valid
    stored = d3r.coded(maps, mask)
    maps[:, ~mask] = np.array([np.nan, np.inf, 7.0, -0.0])[np.arange((~mask).sum()) % 4]
    assert d3r.coded(maps, mask) == stored  # what masked pixels hold does not matter
    back = d3r.decoded(stored, mask.shape)
    assert (back.view(np.uint16)[:, mask] == maps.view(np.uint16)[:, mask]).all() and (back[:, ~mask] == 0).all()


def test_the_coding_takes_half_of_zlib_on_float16(crooked_dir):
    lines = d3r.samples_of(d3r.make_manifest(crooked_dir, 4))["crooked_0/000"]
    maps = d3r.ask(GeometricTeacher((96, 128)), crooked_dir, lines, (96, 128), 0)
    plain = b"".join(x.half().numpy().tobytes() for m in maps for x in m)  # the official code's way
    assert len(d3r.pack_sample(maps, 0.3)) < 0.6 * len(zlib.compress(plain)) < 0.5 * len(plain)


def test_a_sample_comes_back_exact_to_float16_and_filtered(crooked_dir, cache):
    cached, teacher = list(d3r.CachedViews(crooked_dir, cache)), GeometricTeacher(SMALL)
    assert [len(item.targets) for item in cached] == [5, 5, 2] * 2
    samples, masked = d3r.samples_of(d3r.make_manifest(crooked_dir, 5)), 0
    for item in cached:  # portrait and landscape, with holes in the depth
        wanted = d3r.ask(teacher, crooked_dir, samples[item.name], SMALL, 0)
        for image, got, mask, want, line in zip(item.images, item.targets, item.masks, wanted, samples[item.name]):
            for a, b in zip(got, want):
                assert a.dtype == torch.float32 and torch.equal(a[mask], b.half().float()[mask])
            known = (want.points_local + want.points_global).isfinite().all(-1)
            assert torch.equal(mask, known & (torch.sigmoid((want.conf_local - 1).log()) >= 0.3))
            assert (got.conf_local[~mask] == 1).all() and (got.points_global[~mask] == 0).all()
            stored = torch.tensor(np.array(Image.open(crooked_dir / line["path"]).convert("RGB")) / 255.0).float()
            assert (image.mean((1, 2)) - stored.mean((0, 1))).abs().max() < 0.03
            masked += (known & ~mask).sum().item()
    assert masked > 0  # the filter does fire
    kept = d3r.CachedViews(crooked_dir, cache, scenes={"crooked_1"}).samples
    assert [name for name, _ in kept] == [f"crooked_1/00{n}" for n in range(3)]


def test_only_what_is_known_trusted_and_in_range_is_valid(crooked_dir, tmp_path, capsys):
    m = Pointmap(torch.ones(2, 8, 3), torch.ones(2, 8, 3), *torch.full((2, 2, 8), 5.0))
    m.points_local[0, 0], m.points_global[0, 1], m.points_global[0, 2] = torch.inf, torch.nan, 1e6
    m.conf_local[0, 3], m.conf_global[0, 4], m.conf_local[0, 5], m.conf_local[0, 6] = 1e9, torch.nan, 1.42, 1.44
    channels, mask = d3r.filtered(m, 0.3)
    assert mask[0].tolist() == [False, False, False, True, False, False, True, True] and mask[1].all()
    assert channels[7, 0, 3] == 65504
    write(crooked_dir, tmp_path / "none", views=12, tau=0.99999)
    assert "crooked_0/000.safetensors: not one pixel is trusted at --tau 0.99999" in capsys.readouterr().out
    assert not d3r.CachedViews(crooked_dir, tmp_path / "none")[0].masks[0].any()


def test_the_same_call_gives_the_same_bytes_and_shards_give_the_whole(crooked_dir, cache, tmp_path):
    for i in (2, 0, 1):
        assert len(write(crooked_dir, tmp_path / "c", shard=(i, 3))) == 2
    assert contents(tmp_path / "c") == contents(cache)
    assert write(crooked_dir, tmp_path / "c") == []


def test_damaged_samples_are_named_and_made_again(crooked_dir, cache, tmp_path, capsys):
    out = tmp_path / "c"
    shutil.copytree(cache, out)
    bad = out / "crooked_1/001.safetensors"
    good = bad.read_bytes()
    bad.write_bytes(good[:-5])
    (out / "crooked_0/000.safetensors").unlink()
    said = refusal(d3r.CachedViews, crooked_dir, out, kind=DataError)
    assert "1 of 6 samples are not there yet (crooked_0/000)" in said
    written = write(crooked_dir, out)
    assert f"{bad}: damaged, cut off" in capsys.readouterr().out
    assert [str(p.relative_to(out)) for p in written] == ["crooked_0/000.safetensors", "crooked_1/001.safetensors"]
    assert bad.read_bytes() == good


def test_other_settings_pictures_or_files_are_refused(crooked_dir, cache, tmp_path):
    out, root = tmp_path / "c", tmp_path / crooked_dir.name
    shutil.copytree(cache, out), shutil.copytree(crooked_dir, root)
    assert write(root, out) == []  # a folder that was moved is the same
    for changed, says in ((dict(strength=2), "teacher geometry, errors x 1 -> geometry, errors x 2"),
                          (dict(tau=0.5), "tau 0.3 -> 0.5"), (dict(views=4), "views 5 -> 4")):
        with pytest.raises(DataError, match=f"made of other pictures or settings .{says}"):
            write(root, out, **changed)
    cached = d3r.CachedViews(root, out)
    image, meta = root / "crooked_0/images/003.png", root / "crooked_0/transforms.json"
    kept = image.read_bytes()
    shutil.copy(root / "crooked_1/images/003.png", image)
    assert "made of other pictures" in refusal(write, root, out, kind=DataError)
    lost = "crooked_0/images/003.png: no longer the picture that the manifest lists"
    assert lost in refusal(cached.__getitem__, 0, kind=DataError)
    image.write_bytes(kept)
    frames = json.loads(meta.read_text())
    meta.write_text(json.dumps({**frames, "frames": frames["frames"][:3] + frames["frames"][4:]}))
    d3r.open_scene.cache_clear()
    assert lost in refusal(cached.__getitem__, 0, kind=DataError)
    shutil.rmtree(root / "crooked_1")
    d3r.scene_folders.cache_clear(), d3r.open_scene.cache_clear()
    assert "scene crooked_1 is no longer in here" in refusal(cached.__getitem__, 3, kind=DataError)
    assert "run the cache command first" in refusal(d3r.CachedViews, root, tmp_path / "nowhere", kind=DataError)
    pictures(tmp_path / "photos", ["a.png", "b.png"])
    said = refusal(write, tmp_path / "photos", tmp_path / "d", kind=DataError)
    assert "a.png: no measured depth for the geometric teacher; give --teacher" in said
    assert (tmp_path / "d/manifest.jsonl").exists() and write(crooked_dir, tmp_path / "d")  # without samples no obstacle


# ------------------------------------------------------------------------------------------------ the pretended Fast3R


def views_of(scene, indices, size=SMALL):
    return [scene.view(i, size) for i in indices]


def exact_maps(views, size=SMALL):
    return GeometricTeacher(size, strength=0.0)(views, seeded())


def test_pixels_without_depth_are_nan_and_not_trusted(rooms):
    views = views_of(rooms[0], (0, 1))
    for rows, known in ((slice(5, 9), 24 * 42), (slice(None), 0)):
        depth = views[0].depth.clone()
        depth[rows] = 0
        m = GeometricTeacher(SMALL)([views[0]._replace(depth=depth), views[1]], seeded())[0]
        assert m.points_local.isfinite().all(-1).sum() == known == m.points_global.isfinite().all(-1).sum()
        assert (d3r.certainty(m.conf_local)[depth == 0] < 0.01).all() and m.conf_local.isfinite().all()


# ------------------------------------------------------------------------------------------------ cameras and export


def test_a_similarity_is_recovered_and_never_a_reflection():
    g = seeded()
    for _ in range(20):
        Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=g).double())
        s, R, t = 0.3 + 2 * torch.rand((), generator=g).double(), Q * Q.det(), torch.randn(3, generator=g).double()
        x, w = torch.randn(50, 3, generator=g), torch.rand(50, generator=g)
        true = s * x.double() @ R.T + t
        y = torch.where(w[:, None] < 0.3, 100, true)  # these have no weight
        for got, want in zip(d3r.similarity(x, y, torch.where(w < 0.3, 0.0, w)), (s, R, t)):
            assert (got - want).abs().max() < 1e-6
        y = true + torch.cat([5 * torch.randn(15, 3, generator=g), torch.zeros(35, 3)])
        for got, want in zip(d3r.robust_similarity(x, y, w + 0.1, rounds=30), (s, R, t)):
            assert (got - want).abs().max() < 1e-3
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    mirror = x * torch.tensor([1.0, 1.0, -1.0])
    s, R, t = d3r.similarity(x, mirror)
    error = lambda s, R: (s * x @ R.T + t - mirror).square().sum()
    turn = torch.linalg.matrix_exp(0.01 * torch.tensor([[0.0, -1, 2], [1, 0, 1], [-2, -1, 0]], dtype=torch.float64))
    assert torch.det(R).item() == pytest.approx(1)
    assert error(s, R) < error(s * 1.01, R) and error(s, R) < error(s, R @ turn)


def test_cameras_are_recovered_from_exact_pointmaps_in_any_unit(rooms):
    views = views_of(rooms[1], (0, 3, 6, 9), (48, 64))
    units = torch.tensor([1.0, 0.5, 3.0, 1.0])
    maps = [m._replace(points_local=m.points_local * u) for m, u in zip(exact_maps(views, (48, 64)), units)]
    maps[2].points_local[:4] = torch.nan  # and some pixels are not known, or wrong and not trusted
    maps[3].points_global[10:44] = 50.0
    maps[3].conf_global[:], maps[3].conf_global[10:44] = 3.0, 1.4
    cameras = d3r.estimate_cameras(maps)
    true = torch.linalg.inv(views[0].c2w) @ torch.stack([v.c2w for v in views])
    assert (cameras.c2w - true).abs().max() < 1e-4 and (cameras.scale * units - 1).abs().max() < 1e-4
    assert (cameras.focal / views[0].K[0, 0] - 1).abs().max() < 1e-4
    doubted, (m, *_) = torch.arange(48) < 34, maps[1:2]  # most rows, of which all is wrong
    m.points_global[doubted] += 0.5
    m.points_local[doubted, :, :2] *= 1.3
    confident = torch.where(doubted[:, None], 1.5, 400.0).expand(48, 64)
    cameras = d3r.estimate_cameras([m._replace(conf_global=confident, conf_local=confident)])
    assert (cameras.c2w[0] - true[1]).abs().max() < 0.1 and abs(cameras.focal[0] / views[0].K[0, 0] - 1) < 0.02
    blind = maps[1]._replace(points_local=torch.full((48, 64, 3), torch.nan))
    assert "view 1: fewer than three of its points are known" in refusal(d3r.estimate_cameras, [maps[0], blind])


def test_pictures_of_one_size_are_of_one_camera(crooked):
    views = [crooked[0].view(i) for i in (0, 3, 2, 5)]  # two lying, two upright
    focal, alone = d3r.estimate_cameras(exact_maps(views)).focal, []
    for view in views:
        alone += [d3r.focal_length(lift.pixel_rays(view.K, *view.depth.shape), torch.ones_like(view.depth))]
    assert focal.tolist() == pytest.approx([np.mean(alone[:2])] * 2 + [np.mean(alone[2:])] * 2, rel=0.02)
    assert abs(focal[0] / focal[2] - 1) > 0.05


def test_photos_agree_where_geometry_and_cameras_are_theirs(rooms):
    views, still = views_of(rooms[1], range(4)), torch.eye(4).expand(4, 4, 4)
    points = [(lift.pixel_rays(v.K, *SMALL) * v.depth[..., None]).flatten(0, 1) for v in views]
    colours = [v.image.permute(1, 2, 0).flatten(0, 1) for v in views]
    photos, focal, c2w = [v.image for v in views], [v.K[0, 0] for v in views], torch.stack([v.c2w for v in views])

    def agree(points, colours, c2w, photos=photos, focal=focal):
        return d3r.photo_agreement(points, colours, photos, focal, c2w)
    true, nearer = agree(points, colours, c2w), agree([p / 2 for p in points], colours, c2w)
    strangers = agree(points, [c[torch.randperm(len(c), generator=seeded())] for c in colours], c2w)
    twice = [1, 2, 1, 2]  # of other sizes, with focal lengths that fit
    larger = [torch.nn.functional.interpolate(x[None], scale_factor=k)[0] for x, k in zip(photos, twice)]
    found = agree(points, colours, c2w, larger, [f * k for f, k in zip(focal, twice)])
    assert found == pytest.approx(true, abs=0.03)
    assert true > nearer + 0.1 and true > agree(points, colours, still) + 0.1 and abs(strangers) < 0.05
    assert agree(points, colours, c2w[:1].expand_as(c2w)) == pytest.approx(agree(points, colours, still), abs=1e-4)
    turned = torch.stack([torch.eye(4), torch.diag(torch.tensor([-1.0, 1, -1, 1]))])  # back to back
    assert agree(points, colours, c2w, photos[:1]) == 0.0 == agree(points, colours, turned, photos[:2])
    assert agree(points[:1] * 2, colours[:1] * 2, still, photos[:1] * 2) > 0.95


def test_far_points_do_not_cost_the_others_their_depth_and_untrusted_scenes_are_refused(rooms, tmp_path):
    views = views_of(rooms[0], (0, 4, 8))
    maps = exact_maps(views)
    maps[1].points_local[3, 5] = maps[0].points_local[0, 0] * 1e4
    maps[0].points_local[7, 7] = torch.inf
    (scene,) = data.load_scenes(d3r.write_scene(tmp_path / "far", views, maps))
    for i, view in enumerate(views):
        got = scene.view(i, SMALL).depth
        assert (got == 0).sum() == (i < 2) and (got - view.depth)[got > 0].abs().max() < 1e-3
    doubted = [m._replace(conf_local=torch.full(SMALL, 1.2)) for m in maps]
    said = refusal(d3r.write_scene, tmp_path / "scene", views, doubted)
    assert "not one pixel is trusted at --tau 0.3" in said
    assert len(list(d3r.write_scene(tmp_path / "scene", views, doubted, tau=0.1).glob("depth/*.png"))) == 3


def check_scene(scene, pictures, views, depth_unit=1.0):
    """Poses, K and depth are the truth's up to the similarity that makes view 0 the world and multiplies by 2.5."""
    true = torch.linalg.inv(views[0].c2w) @ torch.stack([v.c2w for v in views])
    true[:, :3, 3] *= 2.5
    assert len(scene) == len(views) and (scene.c2w - true).abs().max() < 1e-3
    for i, (picture, view) in enumerate(zip(pictures, views)):
        got = scene.view(i, (48, 64))
        assert (got.K / view.K - 1)[view.K > 0].abs().max() < 1e-3
        known = got.depth > 0
        assert (got.depth * depth_unit - 2.5 * view.depth)[known].abs().max() < 1e-3
        assert known.float().mean() == pytest.approx(41 / 48 if i == 1 else 1, abs=0.001)
        assert (scene.view(i).image - picture.image).abs().mean() < 0.03  # JPEG


def test_the_exported_scene_says_the_same_in_every_format(rooms, tmp_path):
    views, images = (views_of(rooms[2], range(0, 12, 2), size) for size in ((48, 64), (96, 128)))
    maps = [m._replace(points_global=2.5 * m.points_global) for m in exact_maps(views, (48, 64))]  # unit: 0.4 m
    maps[1].conf_local[:7] = 1.2
    out = d3r.write_scene(tmp_path / "scene", images, maps)
    assert sorted(p.name for p in out.iterdir()) == [
        "cloud.ply", "cloud.png", "confidence", "depth", "images", "maps.png", "sparse", "transforms.json"]
    (scene,) = data.load_scenes(out)  # nerfstudio
    check_scene(scene, images, views)
    assert not scene.notes and (images[0].depth * 2.5).quantile(0.9) < scene.depth_range[1]
    assert len(set(data.sample_triplet(scene, seeded()))) == 3
    meta = json.loads((out / "transforms.json").read_text())
    assert meta["agreement"][0] > max(0.6, meta["agreement"][1] + 0.1)
    head, _, body = (out / "cloud.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 17984\n" in head and head.startswith(b"ply\nformat binary_little_endian 1.0\n")
    points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    first = points[:48 * 64].reshape(48, 64)
    assert len(points) == 17984 and np.abs(first["xyz"][..., 2] - 2.5 * views[0].depth.numpy()).max() < 1e-3
    small = torch.nn.functional.interpolate(images[0].image[None], (48, 64), mode="area")[0].permute(1, 2, 0)
    assert np.abs(first["rgb"] / 255 - small.numpy()).mean() < 0.02
    confidence = np.array(Image.open(out / "confidence/001.png"))
    assert confidence.shape == (48, 64) and (confidence[:7] == 43).all() and (confidence[7:] > 250).all()
    assert all(np.array(Image.open(out / name)).std() > 20 for name in ("cloud.png", "maps.png"))
    (out / "transforms.json").unlink()
    (scene,) = data.load_scenes(out)  # COLMAP
    check_scene(scene, images, views, depth_unit=meta["depth_unit_scale_factor"] / 1e-3)
    c2w = views[0].c2w.double().numpy()
    world = (scene.points / 2.5) @ c2w[:3, :3].T + c2w[:3, 3]
    seen = (world[:48 * 64] - c2w[:3, 3]) @ c2w[:3, :3]  # the points of view 0 come first
    assert len(world) == 6 * 48 * 64 - 7 * 64
    assert np.abs(seen[:, 2].reshape(48, 64) - views[0].depth.double().numpy()).max() < 1e-3


# ------------------------------------------------------------------------------------------------ evaluation


def test_accuracy_and_completeness_are_those_of_float64_and_of_the_official_code():
    nearest = lambda queries, points: np.linalg.norm(queries[:, None] - points, axis=2).min(1)
    fixture, g = load_file(CACHE), seeded()
    there, back = (d3r.nearest_distance(fixture[a], fixture[b])
                   for a, b in (("metric/rec", "metric/gt"), ("metric/gt", "metric/rec")))
    official = [0.3818563052374681, 0.32600204195973903, 0.3871100424652649, 0.35734355080179505]
    got = [there.mean(), there.double().quantile(0.5), back.mean(), back.double().quantile(0.5)]
    assert [float(x) for x in got] == pytest.approx(official, rel=1e-5)
    clusters = 0.01 * torch.randn(1111, 3, generator=g) + 100 * torch.randint(0, 3, (1111, 3), generator=g)
    queries = torch.randn(300, 3, generator=g)
    want = nearest(queries.double().numpy(), clusters.double().numpy())
    assert np.abs(d3r.nearest_distance(queries, clusters, block=32).numpy() - want).max() < 1e-5 * want.max()
    truth = torch.randn(401, 3, generator=g)
    points = truth + 0.05 * torch.randn(401, 3, generator=g)
    s, R, t = d3r.similarity(points, truth)
    aligned, b = (s * points.double() @ R.T + t).numpy(), truth.double().numpy()
    there, back = nearest(aligned, b), nearest(b, aligned)
    # Turned, larger and elsewhere:
    score, off = d3r.score_view(3 * points.flip(1) * torch.tensor([1, 1, -1]) + 1, truth)
    slow = [there.mean(), np.median(there), back.mean(), np.median(back), s.item() / 3]
    assert score == pytest.approx(slow, rel=1e-4)
    assert np.abs(off.numpy() - np.linalg.norm(aligned - b, axis=1)).max() < 1e-4


class Scaled(GeometricTeacher):
    def __call__(self, views, generator):  # where nothing is measured, nothing can be wrong
        maps = super().__call__(views, generator)
        return [m._replace(points_local=(m.points_local / 4).nan_to_num(9.0)) for m in maps]


def test_evaluation_of_the_truth_the_noisy_and_the_mean(crooked, crooked_dir, cache):
    cached = d3r.CachedViews(crooked_dir, cache)
    exact, noisy, mean = (d3r.evaluate(teacher, crooked, SMALL, views=4) for teacher in (
        Scaled(SMALL, 0.0), GeometricTeacher(SMALL), d3r.MeanTeacher(cached)))
    *distances, scale = exact["mean"].values()
    assert max(distances) < 1e-5 and scale == pytest.approx(4, rel=1e-5)
    for score in ("accuracy_median", "completeness_median"):
        assert 1e-3 < noisy["mean"][score] < 0.3 * mean["mean"][score]
    assert list(noisy["scenes"]) == [s.name for s in crooked] and noisy["mean"]["scale"] == pytest.approx(1, abs=0.05)
    assert noisy["calibration"]["rank"] < -0.3 and abs(mean["calibration"]["rank"]) < 0.02
    of_scenes = [score["accuracy_mean"] for score in mean["scenes"].values()]
    assert mean["mean"]["accuracy_mean"] == pytest.approx(np.mean(of_scenes))
    bare = data.Scene("bare", [dataclasses.replace(f, depth=None) for f in crooked[0].frames])
    with pytest.raises(DataError, match="no scene has a view with measured depth"):
        d3r.evaluate(GeometricTeacher(SMALL), [bare], SMALL)
    known = lambda mask: mask.shape == SMALL and mask[20, 10]
    values = [m.points_local[20, 10].double() for s in cached for m, mask in zip(s.targets, s.masks) if known(mask)]
    found = d3r.MeanTeacher(cached)([None], None)[0].points_local[20, 10]  # the mean of valid pixels
    assert 0 < len(values) < 16 and (found - torch.stack(values).mean(0)).abs().max() < 1e-4


def test_the_rank_correlation_is_spearmans():
    conf, noise = torch.rand(2, 1000, generator=seeded())
    assert d3r.rank_correlation(conf, 1 / (conf + 0.1)) == pytest.approx(-1)
    assert d3r.rank_correlation(torch.full((1000,), 2.0), noise) == 0
    a, b = (conf * 5).round(), (noise * 3 + conf).round()  # with many equal values
    ranks = lambda x: [((x < v).sum() + ((x == v).sum() + 1) / 2).item() for v in x]
    assert d3r.rank_correlation(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_the_table_measures_both_networks_at_the_papers_sizes(tmp_path, monkeypatch, capsys):
    sizes = {d3r.Fast3R: (64, 2, 1, 64, 2, 4), d3r.Student: (d3r.StudentConfig.tiny._replace(patch=14),)}
    built, costs, seen = d3r.built, iter(range(9, 0, -1)), []

    def cost(model, images, *_):
        seen.append((model.patch, tuple(images[0].shape)))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return next(costs), 3.0
    monkeypatch.setattr(d3r, "built", lambda network: built(network, *sizes[network]))
    main("table", "--size", 28, 42, "--counts", 2, "--out", tmp_path, "--device", "cpu")
    assert "2 views, student: " in capsys.readouterr().out
    monkeypatch.setattr(d3r, "cost_of_pass", cost)
    main("table", "--counts", 1, 2, "--out", tmp_path, "--device", "cpu")
    assert set(seen) == {(16, (3, 384, 512)), (14, (3, 378, 518))}  # Table I
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["model"], row["views"], row["seconds"]) for row in rows] == [  # the fastest of two; what does not fit
        ("teacher", 1, 8), ("student", 1, 6), ("teacher", 2, math.inf), ("student", 2, math.inf)]


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def cached(rooms_dir, tmp_path_factory):
    """Flags that the runs below share: a cache of two-view samples of small pictures."""
    folder = tmp_path_factory.mktemp("cached")
    common = ["--scene_dir", rooms_dir, "--cache", folder / "cache", "--preset", "tiny", *TOY]
    main("cache", *common, "--out", folder / "out")
    return common


def test_the_script_improves_on_its_start_and_infers_a_scene(rooms, rooms_dir, tmp_path, capsys):
    shutil.copytree(rooms_dir, tmp_path / "data_small")  # where the script looks by itself
    out, scene = tmp_path / "out", tmp_path / "out/scene"
    printed = script("--out", out, "--max_steps", 60, "--warmup", 10, *TOY, cwd=tmp_path)
    result, log = json.loads((out / "result.json").read_text()), log_of(out)
    student, mean, teacher = (result[name]["mean"] for name in ("student", "mean", "teacher"))
    new = d3r.NetworkTeacher(d3r.new_student(d3r.parse(["train", "--preset", "tiny"])), "new", lambda *_: (48, 64))
    start = d3r.evaluate(new, rooms[3:], (48, 64), 2)["mean"]
    assert all(student[key] < 0.8 * start[key] for key in ("accuracy_median", "completeness_median"))
    assert teacher["accuracy_median"] < min(student["accuracy_median"], mean["accuracy_median"])
    assert result["student"]["scenes"].keys() == {"room_003"}
    assert [line["step"] for line in log] == list(range(60)) and log[-1]["heldout"] < 0.7 * log[9]["heldout"]
    assert sum("heldout" in line for line in log) == 6
    card = (out / "student/README.md").read_text()
    for words in ("starts from: tiny", "Teacher: geometry", "--max_steps 60", "MIT", "after 60 steps", "## Scores"):
        assert words in card
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1].replace("path/to/this/folder", str(out / "student")), told := {})
    assert len(told["cameras"].c2w) == 2
    assert log[0]["lr"] < log[10]["lr"] > log[-1]["lr"] and not any("room_003" in line["samples"][0] for line in log)
    assert all(words in printed for words in ("samples written", "accuracy", "room_003, 2 views", "photos agree"))
    main("infer", "--scene_dir", rooms_dir, "--weights", out / "student", "--out", out, *TOY)
    said, (found,) = capsys.readouterr().out, data.load_scenes(scene)
    agreed, still = json.loads((scene / "transforms.json").read_text())["agreement"]
    doubt = agreed < still + 0.02
    assert "4 scenes in here, this is room_000" in said and "12 views" in said
    assert doubt == ("do not trust the cameras" in said) == ("04_distill.py" not in said)  # one verdict
    assert len(found) == 12 and found.view(3).depth.shape == found.view(3).image.shape[1:] == (96, 128)
    assert Image.open(scene / "depth/003.png").size == (64, 48)  # images are twice as large as maps
    assert (found.view(3).depth > 0).float().mean() > 0.5 and len(set(data.sample_triplet(found, seeded()))) == 3
    infer = ["infer", "--weights", out / "student", "--out", out]
    main(*infer, "--scene_dir", rooms_dir / "room_001", *TOY, "--stride", 5)
    assert "the scene of other photos" in capsys.readouterr().out
    assert len(json.loads((scene / "transforms.json").read_text())["frames"]) == 3
    assert all(len(list((scene / part).iterdir())) == 3 for part in ("images", "depth", "confidence"))
    for folder in (scene / "images", out):  # it would find its own pictures the next time
        assert "give another --out" in message(*infer, "--images", folder)
    assert (scene / "transforms.json").exists()


def test_fast3r_teaches_through_the_cache_and_infers_by_itself(rooms_dir, tmp_path, monkeypatch, capsys):
    """A small Fast3R with generated weights, on photos without poses, from its file through the cache to a student."""
    monkeypatch.setattr(d3r, "fast3r_size", functools.partial(d3r.fast3r_size, long_side=128))
    weights, photos = write_fast3r(tmp_path / "fast3r"), tmp_path / "photos"
    photos.mkdir()
    for n in range(4):
        shutil.copy(rooms_dir / f"room_000/images/{n:03d}.png", photos / f"img{n}.png")
    common = ["--out", tmp_path / "out", *TOY]
    main("cache", "--images", photos, "--teacher", weights, *common)
    cached = d3r.CachedViews(photos, tmp_path / "out/cache")
    assert len(cached) == 2 and cached.settings["teacher"].startswith("fast3r ")
    target, mask = cached[0].targets[1], cached[0].masks[1]
    scene, index = d3r.open_scene(photos, "photos")
    views = [scene.view(i, d3r.fast3r_size(96, 128)) for i in list(index.values())[:2]]
    said = d3r.load_fast3r(weights)([v.image for v in views], generator=seeded(zlib.crc32(b"0 photos/000")))
    expected = d3r.resampled(Pointmap(*(part.detach() for part in said[1])), (96, 128), (48, 64))
    assert mask.any() and torch.equal(target.points_global[mask], expected.points_global.half().float()[mask])
    assert "made of other pictures or settings (teacher fast3r" in message("cache", "--images", photos, *common)
    main("train", "--max_steps", 20, "--warmup", 2, *common)  # finds the photos by the cache
    losses = [line["total"] for line in log_of(tmp_path / "out")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    capsys.readouterr()
    forward = d3r.Fast3R.forward  # points before the camera, as those of a trained one
    ahead = lambda m: m._replace(points_local=m.points_local + torch.tensor([0, 0, 5.0]), conf_local=m.conf_local + 5)
    monkeypatch.setattr(d3r.Fast3R, "forward", lambda self, *a, **k: [ahead(m) for m in forward(self, *a, **k)])
    main("infer", "--images", photos, "--teacher", weights, "--out", tmp_path / "out", "--device", "cpu")
    said, (scene,) = capsys.readouterr().out, data.load_scenes(tmp_path / "out/scene")
    assert "photos, 4 views by fast3r " in said and " GB and " in said
    assert len(scene) == 4 and scene.view(0).image.shape == (3, 96, 128)
    assert "agreement" in json.loads((tmp_path / "out/scene/transforms.json").read_text())


@pytest.mark.parametrize("flags,how", [
    ([], {}),
    (["--grad_checkpoint"], {}),
    (["--weight", "none"], dict(weight="none")),
    (["--weight", "none", "--gamma", "0"], dict(weight="none", gamma=0.0)),
    (["--weight", "student", "--gamma", "0"], dict(weight="student", gamma=0.0)),
    (["--weight", "clamped", "--mean", "views", "--global_target", "aligned"],
     dict(weight="clamped", mean="views", global_target="aligned"))])
def test_a_flag_of_the_loss_does_what_it_says(cached, tmp_path, flags, how):
    """The first line of a run's log is the loss of a new student on the sample that the log names."""
    args = d3r.parse(["train", *map(str, cached), "--max_steps", "1", "--out", str(tmp_path), *flags])
    main("train", *cached, "--max_steps", 1, "--out", tmp_path, *flags)
    (line,), student = log_of(tmp_path), d3r.new_student(args)
    sample = next(s for s in d3r.CachedViews(args.scene_dir, args.cache) if s.name == line["samples"][0])
    with torch.no_grad():
        maps = student(sample.images, generator=seeded(args.seed))
    expected, plain = (d3r.pointmap_loss(maps, sample.targets, sample.masks, **kwargs) for kwargs in (how, {}))
    for name, value in zip(d3r.Loss._fields, expected):
        assert line[name] == pytest.approx(value.item(), rel=1e-5), name
    assert not how or line["total"] != pytest.approx(plain.total.item(), rel=1e-3)


def test_presets_hold_the_numbers_of_the_paper_and_rates_warm_up_and_fall():
    args = d3r.parse(["train", "--preset", "full"])
    assert (args.size, args.views, args.batch, args.max_steps) == ([224, 518], 20, 16, 60 * 22_500 // 16)
    assert (args.lr, args.final_lr, args.warmup, args.tau, args.gamma) == (1e-4, 5e-5, 3500, 0.3, 0.001) and args.bf16
    rate = [d3r.learning_rate(step, args) for step in (0, 1749, 3499, 3500, (3500 + 84_375) // 2, 84_374)]
    assert rate == pytest.approx([1e-4 / 3500, 5e-5, 1e-4, 1e-4, 7.5e-5, 5e-5], rel=1e-3)


def test_three_training_steps_are_those_by_hand(cached, tmp_path):
    """AdamW with its betas, decay and two rates, warm-up, and clipping, in plain torch; every tensor that is saved."""
    main("train", *cached, "--max_steps", 3, "--batch", 2, "--warmup", 2, "--lr", 2e-3, "--out", tmp_path)
    args = d3r.parse(["train", *map(str, cached), "--max_steps", "3", "--batch", "2"])
    student, log = d3r.new_student(args), log_of(tmp_path)
    samples = {sample.name: sample for sample in d3r.CachedViews(args.scene_dir, args.cache)}
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    rates = [1e-3, 2e-3, 2e-3]  # two steps of warm-up, then the cosine's top
    for step, rate in enumerate(rates):
        student.zero_grad()
        for n, name in enumerate(log[step]["samples"]):
            maps = student(samples[name].images, generator=seeded(args.seed + 2 * step + n))
            (d3r.pointmap_loss(maps, samples[name].targets, samples[name].masks).total / 2).backward()
        norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
        assert norm > 1 and log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and log[step]["lr"] == rate
        with torch.no_grad():
            for name, p in parameters.items():
                m, v = moments[name]
                g, lr = p.grad / norm, rate * (0.1 if name.startswith("encoder.") else 1)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - 0.01 * lr)
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    _, _, stored = distill.read_run(tmp_path / "checkpoint.safetensors")
    order = [name for encoder in (False, True) for name in parameters if name.startswith("encoder.") == encoder]
    assert len(stored) == 4 * len(order)
    for i, name in enumerate(order):
        for value, key in zip((parameters[name], *moments[name]),
                              (f"student.{name}", f"optimiser.{i}.exp_avg", f"optimiser.{i}.exp_avg_sq")):
            assert error_to(stored[key], value.detach()) < 1e-2, key
            assert (stored[key] - value).norm() < 1e-3 * value.norm(), key


def test_half_of_the_samples_are_mirrored_and_are_the_same_scene_in_a_mirror(rooms, cached, monkeypatch):
    """The truth of a mirrored picture: its points lie on its pixels' rays, in the view's own frame and the first's."""
    views = views_of(rooms[0], (0, 4), (48, 64))
    maps = exact_maps(views, (48, 64))
    sample = d3r.CachedSample("a", [v.image for v in views], maps, [torch.ones(48, 64, dtype=torch.bool)] * 2)
    flipped, K = d3r.mirrored(sample), views[1].K.clone()
    K[0, 2] = 64 - K[0, 2]
    local, shared = flipped.targets[1].points_local, flipped.targets[1].points_global.flatten(0, 1)
    assert torch.allclose(local, lift.pixel_rays(K, 48, 64) * views[1].depth.flip(1)[..., None], atol=1e-4)
    s, R, t = d3r.similarity(local.flatten(0, 1), shared)
    assert (s * local.flatten(0, 1).double() @ R.T + t - shared).abs().max() < 1e-4  # still a rigid motion
    assert s == pytest.approx(1, abs=1e-4) and torch.equal(d3r.mirrored(flipped).images[0], views[0].image)
    seen, zero = [], torch.zeros((), requires_grad=True)
    monkeypatch.setattr(d3r, "loss_of", lambda model, sample, *_: seen.append(sample) or d3r.Loss(*4 * [zero * 1]))
    d3r.learn_samples([sample] * 40, None, d3r.parse(["train", *map(str, cached), "--mirror"]), range(40))
    turned = sum(torch.equal(s.images[0], flipped.images[0]) for s in seen)
    assert 10 < turned < 30 and turned + sum(torch.equal(s.images[0], sample.images[0]) for s in seen) == 40


def test_a_new_student_starts_at_the_pretrained_vit_and_the_encoder_has_a_rate_of_its_own(cached, tmp_path):
    args = d3r.parse(["train", *map(str, cached)])
    student, images = d3r.new_student(args), torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(student.tokens(images), lift.load_vit("tiny")(images).patches)
    other = d3r.new_student(d3r.parse(["train", *map(str, cached), "--seed", "1"]))
    assert not torch.equal(student.decoder.decoder_embed.weight, other.decoder.decoder_embed.weight)
    sum(part.sum() for part in student([images[0]])[0]).backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    main("train", *cached, "--max_steps", 2, "--encoder_share", 0, "--out", tmp_path)
    before, after = d3r.new_student(args).state_dict(), d3r.load_student(tmp_path / "student").state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"decoder", "downstream_head", "downstream_head_local"}


# ------------------------------------------------------------------------------------------------ resuming runs


SIX = ["--max_steps", 6, "--warmup", 2, "--batch", 2, "--save_minutes", 0]


def test_a_loss_that_is_not_finite_names_the_sample_and_keeps_the_checkpoint(cached, tmp_path, monkeypatch):
    honest, calls, out = d3r.pointmap_loss, [0], tmp_path / "run"

    def failing(*arguments, **options):
        calls[0] += torch.is_grad_enabled()
        return d3r.Loss(*(part * (math.nan if calls[0] == 4 else 1) for part in honest(*arguments, **options)))
    monkeypatch.setattr(d3r, "pointmap_loss", failing)
    assert "step 1: the loss is nan for room_" in message("train", *cached, *SIX, "--out", out)
    assert distill.read_run(out / "checkpoint.safetensors")[0] == 1


def test_two_processes_are_one(cached, tmp_path):
    """Two gloo processes, each with half of the samples, give the cache, the loss curve and the student of one."""
    main("train", *cached, *SIX, "--out", tmp_path / "one")
    own = ["--cache", tmp_path / "cache", "--out", tmp_path / "two"]
    printed = script(*cached, *SIX, *own, launcher=stopping.TORCHRUN)
    assert printed.count("samples written") == 1 and contents(tmp_path / "cache") == contents(cached[3])
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    assert [line["samples"] for line in one] == [line["samples"] for line in two] and len(one[0]["samples"]) == 2
    assert [line["total"] for line in two] == pytest.approx([line["total"] for line in one], rel=1e-3)


def test_a_run_does_not_go_on_with_another_cache(cached, tmp_path):
    shutil.copytree(cached[3], tmp_path / "cache")
    other = ["train", *cached[:3], tmp_path / "cache", *cached[4:], "--max_steps", 2, "--out", tmp_path / "out"]
    main(*other)
    main(*other, "--resume")
    lines = (tmp_path / "cache/manifest.jsonl").read_text().splitlines(True)
    (tmp_path / "cache/manifest.jsonl").write_text("".join(line for line in lines if '"room_001' not in line))
    assert "cached" in message(*other, "--resume")


def test_training_takes_the_size_of_the_cache_and_eval_the_mean_of_it(rooms_dir, tmp_path, capsys):
    common = ["--preset", "tiny", "--device", "cpu", "--out", tmp_path, "--cache", tmp_path / "cache"]
    main("cache", *common, "--scene_dir", rooms_dir, "--size", 24, 32, "--views", 6)
    main("train", *common, "--max_steps", 1)
    assert d3r.load_student(tmp_path / "student").config.size == (24, 32)
    assert not any("room_003" in name for line in log_of(tmp_path) for name in line["samples"])  # it is held out
    assert "made with --size [24, 32], not [48, 64]; leave it out" in message("train", *common, "--size", 48, 64)
    assert "made with --views 6, not 3" in message("train", *common, "--views", 3)
    assert "--size 50 64: give multiples of 8" in message("infer", *common, "--scene_dir", rooms_dir, "--size", 50, 64)
    other = tmp_path / "other"
    shutil.copytree(rooms_dir / "room_003", other / "room_000")  # a name that the cache knows
    both = ["--models", "mean", "teacher", "--scene_dir", other, "--size", 24, 32, "--views", 2]
    (tmp_path / "cache/root.json").rename(tmp_path / "root.json")  # then it is not known what the student was trained on
    assert "does not name the cached pictures" in message("eval", *common, *both)
    (tmp_path / "root.json").rename(tmp_path / "cache/root.json")
    main("eval", *common, *both)
    found = json.loads((tmp_path / "result.json").read_text())["mean"]["mean"]
    args = d3r.parse(["eval", *map(str, common), "--size", "24", "32"])
    assert d3r.unseen(args, list("abcd")) == ["d"]
    mean = d3r.MeanTeacher(d3r.cached_part(args, "train", rooms_dir))
    assert found == d3r.evaluate(mean, data.load_scenes(other), (24, 32), 2)["mean"]
    main("eval", *common, "--cache", tmp_path / "none", *both)
    assert "mean: left out" in capsys.readouterr().out
    (other / "room_000").rename(other / "elsewhere")
    assert "no sample in it is of" in message("train", *common, "--scene_dir", other, "--max_steps", 1)
    odd = ["--cache", tmp_path / "odd", "--size", 50, 64, "--views", 2]
    main("cache", *common, *odd, "--scene_dir", rooms_dir)
    assert "multiples of 8" in message("train", *common, *odd, "--max_steps", 1)


def test_more_views_than_ids_are_asked_in_groups_of_one_frame_and_unit(rooms):
    views = views_of(rooms[0], range(12))
    units = iter([1.0, 3.0, 0.2, 5.0])

    def network(views, generator):
        unit = next(units)
        assert len(views) <= 5
        return [m._replace(points_global=unit * m.points_global) for m in exact_maps(views)]
    maps = d3r.ask_in_groups(network, views, seeded(), most=5)
    assert len(maps) == 12 and next(units, None) == 5.0
    for m, exact in zip(maps, exact_maps(views)):
        assert (m.points_global - exact.points_global).abs().max() < 1e-4


def test_memory_is_foretold():
    """GB at the peak in fp32, added up from the sizes of all tensors alive: 2.72, 4.67, 4.94 and 8.75."""
    with torch.device("meta"):
        networks = {"student": (d3r.Student(), (378, 518)), "Fast3R": (d3r.Fast3R(), (384, 512))}
    for name, views, measured in (("student", 8, 2.72), ("student", 128, 4.67), ("Fast3R", 8, 4.94), ("Fast3R", 128, 8.75)):
        model, size = networks[name]
        said = d3r.forecast(model, [size] * views, "cpu")
        assert float(re.search(r"about ([\d.]+) GB and \d+ (s|minutes) on cpu", said)[1]) == pytest.approx(measured, rel=0.1)
