"""06_distill3r.py, the networks and the loss: Fast3R's and Distill3R's own numbers, every way a file or a call can be wrong,
the loss against a loop over pixels.

The fixtures (shared/fixtures/networks) hold what the official codes give for weights and images made by the recipes below.
"""
import copy
import functools
import importlib
import json
import math
import os
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

distill3r, lift = importlib.import_module("06_distill3r"), importlib.import_module("02_lift")
FIXTURES = Path(__file__).parent / "fixtures" / "networks"
SHARED = Path(__file__).parents[2] / "shared" / "fixtures" / "networks"
POINTS, CONF, TOKENS = 2e-4, 3e-5, 3e-5  # max |a - b| / mean |b| that the fixtures' README demands; measured: 1.7e-5, 1.6e-6, 2.8e-6
MAPS = {"pts3d_in_other_view": "points_global", "pts3d_local": "points_local", "conf": "conf_global", "conf_local": "conf_local"}
SLOW = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes 3 GB and a minute; SLOW=1 runs it")

# ------------------------------------------------------------------------------------------------ the recipes of the fixtures


def generator_of(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def recipe(key, shape):
    key = key.replace("encoder.blocks.", "encoder.blocks.0.")  # the student's ViT comes in chunks
    r = torch.randn(tuple(shape), generator=generator_of(key))
    last = key.rsplit(".", 1)[-1]
    if last in ("pos_embed", "cls_token", "register_tokens", "mask_token"):
        return 0.2 * r
    if len(shape) >= 2:
        return r * ((0.15 if key.endswith(".dpt.head.4.weight") else 1.0) / torch.Size(shape[1:]).numel() ** 0.5)
    return {"gamma": 0.5 + 0.1 * r, "weight": 1 + 0.1 * r}.get(last, 0.1 * r)


def recipe_images(name, shape):  # -> (B, 3, H, W) in [0, 1]
    g = generator_of("input/" + name)
    low = torch.nn.functional.interpolate(torch.rand((*shape[:2], 8, 8), generator=g), size=shape[2:], mode="bilinear", align_corners=True)
    return 0.8 * low + 0.2 * torch.rand(shape, generator=g)


def with_recipe(model):
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(recipe(key, value.shape))
    return model.eval()


def pick(n, k):
    return torch.arange(n) if n <= k else torch.linspace(0, n - 1, k).round().long()


def error_to(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().mean()).item()


def check_maps(pointmap, truth, prefix, row=0):
    for name, ours in MAPS.items():
        theirs, value = truth[f"{prefix}/{name}"][row], getattr(pointmap, ours)
        assert value.shape[2:] == theirs.shape[2:]
        stored = value[pick(len(value), len(theirs))][:, pick(value.shape[1], theirs.shape[1])]
        assert error_to(stored, theirs) < (POINTS if name.startswith("pts") else CONF), name


def one_line(error):
    return str(error.value) if "\n" not in str(error.value) else pytest.fail(f"more than a line: {error.value}")


# ------------------------------------------------------------------------------------------------ Fast3R

TOY = json.loads((FIXTURES / "fast3r.json").read_text())
TOY_TRUTH = load_file(FIXTURES / "fast3r.safetensors")


@functools.cache
def toy_fast3r():
    c = TOY["config"]
    return with_recipe(distill3r.Fast3R(c["ed"], c["eh"], c["edep"], c["dd"], c["dh"], c["ddep"]))


def toy_images(case, sample=0):
    c = TOY["cases"][case]
    return [recipe_images(f"{case}/v{i}", (c["batch"], 3, *size))[sample] for i, size in enumerate(c["views"])]


def test_the_recipe_gives_the_weights_and_images_of_the_fixture():
    state = toy_fast3r().state_dict()
    for key, known in TOY["weights"].items():
        assert list(state[key].shape) == known["shape"] and state[key].flatten()[:4].tolist() == pytest.approx(known["first"], rel=1e-6)
    for name in (f"{case}/v{i}" for case, c in TOY["cases"].items() for i in range(len(c["views"]))):
        known = TOY["inputs"][name]
        assert (2 * recipe_images(name, known["shape"]) - 1).mean().item() == pytest.approx(known["mean"], abs=1e-7)


@pytest.mark.parametrize("case", TOY["cases"])
@torch.no_grad()
def test_fast3r_gives_the_published_numbers(case, monkeypatch):
    c, model = TOY["cases"][case], toy_fast3r()
    monkeypatch.setattr(model.decoder, "sharper", c["attn_bias"])
    model.train(c["training"])
    for sample in range(c["batch"]):
        images = toy_images(case, sample)
        # The training loader stores portrait samples transposed; the network sees them upright and its maps are transposed back.
        turned = [c["true_shape"] is not None and size[sample][0] > size[sample][1] for size in c["true_shape"] or images]
        ids = c["image_ids"][sample] if c["image_ids"] else range(len(images))
        maps = model([image.mT if t else image for image, t in zip(images, turned)], view_ids=ids)
        for i, (view, t) in enumerate(zip(maps, turned)):
            view = distill3r.Pointmap(*(x.transpose(0, 1) for x in view)) if t else view
            check_maps(view, TOY_TRUTH, f"{case}/v{i}", sample)
    model.eval()


@pytest.mark.parametrize("case", ["n1", "n3_mixed"])
@torch.no_grad()
def test_tokens_and_levels_are_fast3rs(case):
    model, images = toy_fast3r(), toy_images(case)
    tokens = model.encode(images)
    levels = model.fuse(tokens, list(range(len(images))))
    names = ["encoder", "hook0", "hook5", "hook7", "hook10"]
    for name, ours in zip(names, [tokens[0]] + [torch.cat(list(views)) for views in levels]):
        theirs = TOY_TRUTH[f"{case}/{name}"][0]
        assert error_to(ours[pick(len(ours), len(theirs))], theirs) < TOKENS, name


@torch.no_grad()
def test_operations_are_fast3rs():
    ops = {key.removeprefix("ops/"): value for key, value in TOY_TRUTH.items() if key.startswith("ops/")}
    assert error_to(distill3r.rotate(ops["rope_in"], distill3r.rotary_angles(4, 6, 16)), ops["rope_out"]) < 1e-6
    for dim in (48, 384, 1024):
        assert error_to(distill3r.view_codes([0, 1, 17, 512, 999], dim), ops[f"image_idx_emb_{dim}"]) < 1e-6
    points, conf = distill3r.read_out(ops["post_in"].permute(0, 3, 1, 2))
    assert error_to(points, ops["pts_exp"]) < 1e-6 and error_to(conf, ops["conf_exp_1_inf"]) < 1e-6
    model, angle = toy_fast3r(), distill3r.rotary_angles(4, 6, 16)  # tokens of so low variance that the norms' eps shows
    small = lambda which, dim: 3e-3 * torch.randn((1, 24, dim), generator=generator_of(f"ops/{which}_small"))
    x, y = small("enc", 64), small("dec", 48)
    for name, ours in {"enc_block0": model.encoder.enc_blocks[0](x, angle), "enc_norm": model.encoder.enc_norm(x),
                       "dec_block0": model.decoder.dec_blocks[0](y), "dec_norm": model.decoder.dec_norm(y)}.items():
        assert error_to(ours, ops[f"{name}_small"]) < TOKENS, name


def test_view_ids_are_drawn_number_for_number_and_from_the_generator_given():
    for known in TOY["image_id_draws"]:
        drawn = distill3r.draw_view_ids(known["views"], torch.Generator().manual_seed(known["manual_seed"]))
        assert drawn == known["ids"][0]
        torch.manual_seed(known["manual_seed"])
        assert distill3r.draw_view_ids(known["views"]) == known["ids"][0]
    every = distill3r.draw_view_ids(1000, torch.Generator().manual_seed(0))
    assert every[0] == 0 and sorted(every) == list(range(1000))


@torch.no_grad()
def test_inference_is_reproducible():
    images = toy_images("n2_portrait")
    call = lambda seed: toy_fast3r()(images, generator=torch.Generator().manual_seed(seed))[1].points_global
    assert torch.equal(call(3), call(3)) and not torch.allclose(call(3), call(4), rtol=1e-2)


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        fast3r, student = distill3r.Fast3R(), distill3r.Student()
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(fast3r) == 647_551_368 and len(fast3r.state_dict()) == 712
    assert [count(part) for part in (fast3r.encoder, fast3r.decoder, fast3r.downstream_head)] == [303_098_880, 303_361_024, 20_545_732]
    assert count(student) == 71_969_288 and len(student.state_dict()) == 388 - 8  # 8 second names
    assert [count(part) for part in (student.encoder, student.decoder, student.downstream_head)] == [21_925_632, 10_795_392, 19_624_132]


@SLOW
@torch.no_grad()
def test_fast3r_at_full_size(tmp_path):
    if not (SHARED / "fast3r_full.safetensors").exists():
        pytest.skip(f"{SHARED}/fast3r_full.safetensors is not here")
    lift.save_tensors(tmp_path / "model.safetensors", with_recipe(distill3r.built(distill3r.Fast3R)).state_dict())
    truth, model = load_file(SHARED / "fast3r_full.safetensors"), distill3r.load_fast3r(tmp_path)
    images = [recipe_images(f"full/v{i}", (1, 3, 160, 224))[0] for i in range(2)]
    for name, level in zip(("hook0", "hook12", "hook18", "hook24"), model.fuse(model.encode(images), [0, 1])):
        level = torch.cat(list(level))
        assert error_to(level[pick(len(level), truth[name].shape[1])], truth[name][0]) < TOKENS, name
    for i, view in enumerate(model(images, view_ids=[0, 1])):
        check_maps(view, truth, f"v{i}")


# ------------------------------------------------------------------------------------------------ the student

STUDENT = json.loads((FIXTURES / "distill3r_student.json").read_text())
ALIASES = {f"downstream_head{local}.dpt.scratch.layer_rn.{n}.weight": f"downstream_head{local}.dpt.scratch.layer{n + 1}_rn.weight"
           for local in ("", "_local") for n in range(4)}


def to_lightning(model, prefix):  # the official checkpoint: prefixed, each head's first convolutions twice, the ViT in chunks
    state = model.state_dict()
    state = {**state, **{alias: state[name] for alias, name in ALIASES.items()}}
    state = {prefix + re.sub(r"^encoder\.blocks\.", "encoder.blocks.0.", key): value for key, value in state.items()}
    return {"state_dict": {**state, "teacher_filter.threshold": torch.ones(1)}, "epoch": 7, "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 1e-4, "root": Path("/nowhere")}}


@functools.cache
def published_student():  # by way of the official layout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        torch.save(to_lightning(with_recipe(distill3r.built(distill3r.Student)), "student."), path)
        assert len([key for key in torch.load(path, weights_only=False)["state_dict"] if key.startswith("student.")]) == STUDENT["keys"]
        return distill3r.load_student(path)


@pytest.mark.parametrize("case", [c if c in ("n1", "n2_train") else pytest.param(c, marks=SLOW) for c in STUDENT["cases"]])
@torch.no_grad()
def test_the_student_gives_the_published_numbers(case):
    c, truth, model = STUDENT["cases"][case], load_file(FIXTURES / "distill3r_student.safetensors"), published_student()
    images = [recipe_images(f"student/{case}/v{i}", (1, 3, *c["size"]))[0] for i in range(c["views"])]
    draw = dict(view_ids=c["image_ids"]) if c["seed"] is None else dict(generator=torch.Generator().manual_seed(c["seed"]))
    maps = model.train(c["training"])(images, **draw, at_once=2)
    model.eval()
    for i, view in enumerate(maps):
        check_maps(view, truth, f"{case}/v{i}")


def tiny_student(seed=0):
    torch.manual_seed(seed)
    return distill3r.Student(distill3r.StudentConfig.tiny).eval()


@torch.no_grad()
def test_the_tiny_student_is_built_on_the_tiny_vit():
    model, vit, image = tiny_student(), lift.load_vit("tiny"), torch.rand(3, 48, 64)
    model.encoder.load_state_dict(vit.state_dict())
    assert torch.equal(model.encode([image])[0], vit(image[None]).patches[0])
    view = model([image])[0]
    assert [tuple(x.shape) for x in view] == [(48, 64, 3), (48, 64, 3), (48, 64), (48, 64)]
    assert view.conf_global.min() > 1 and view.conf_local.min() > 1 and all(x.isfinite().all() for x in view)


def test_a_saved_student_comes_back(tmp_path):
    model, images = tiny_student(), [torch.rand(3, 48, 64), torch.rand(3, 64, 48)]
    distill3r.save_student(model, tmp_path)
    again = distill3r.load_student(tmp_path)
    assert again.config == model.config and not again.training
    for ours, theirs in zip(model(images, [0, 5]), again(images, [0, 5])):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# ------------------------------------------------------------------------------------------------ any number of views


@torch.no_grad()
def test_values_do_not_depend_on_the_blocks():
    model = copy.deepcopy(toy_fast3r()).double()  # in float64, for kernels may round differently with the number of views
    sizes = [(48, 32), (16, 48), (48, 32), (48, 32), (16, 48)]
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(i)).double() for i, size in enumerate(sizes)]
    alone = model(images, range(5), at_once=1)
    assert [tuple(view.conf_global.shape) for view in alone] == sizes
    for at_once in (2, 8):
        for view, same in zip(model(images, range(5), at_once=at_once), alone):
            assert all(error_to(a, b) < 1e-12 for a, b in zip(view, same))


@torch.no_grad()
def test_half_precision_stays_near_and_its_maps_are_fp32():
    for model in (toy_fast3r(), tiny_student()):
        images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) for size in ((64, 96), (48, 64))]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, [0, 7])
        for ours, exact in zip(rounded, model(images, [0, 7])):
            for a, b in zip(ours, exact):
                # 2e-2 is what the fixtures' README allows a run in bf16; exactly 0 would mean that nothing ran in it.
                assert a.dtype == torch.float32 and 0 < ((a - b).square().mean() / b.square().mean()).sqrt() < 2e-2


def test_recomputing_changes_memory_and_not_gradients():
    model, images = tiny_student().train(), [torch.rand(3, 32, 32), torch.rand(3, 32, 48), torch.rand(3, 32, 32)]
    target = [distill3r.Pointmap(*(x.detach() + 1 for x in view)) for view in tiny_student(1)(images, [0, 1, 2])]
    masks, gradients, kept = [t.conf_global > 0 for t in target], [], []
    for model.recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = distill3r.pointmap_loss(model(images, [0, 1, 2], at_once=1), target, masks).total
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    used = [(a, b) for a, b in zip(*gradients) if a is not None]
    assert len(used) > 200 and all(torch.equal(a, b) for a, b in used)
    unused = {name for (name, _), g in zip(model.named_parameters(), gradients[1]) if g is None}
    assert all("refinenet4.resConfUnit1" in name or name == "encoder.mask_token" for name in unused)


@pytest.mark.parametrize("images, ids, words", [
    ([torch.zeros(3, 16, 16)] * 1001, None, ["1001 views", "1 to 1000", "groups that begin with the same view"]),
    ([], None, ["0 views", "1 to 1000"]),
    ([torch.zeros(3, 16, 16), torch.zeros(3, 16, 30)], None, ["view 1 is (3, 16, 30)", "multiples of 16"]),
    ([torch.zeros(1, 3, 16, 16)], None, ["view 0 is (1, 3, 16, 16)", "give (3, H, W)"]),
    ([torch.zeros(3, 0, 16)], None, ["view 0 is (3, 0, 16)"]),
    ([torch.zeros(3, 16, 16)], [0, 1], ["view_ids: 2 for 1 views"]),
    ([torch.zeros(3, 16, 16)], [1000], ["each in 0..999"])])
def test_what_cannot_be_run_is_said_before_it_starts(images, ids, words):
    with pytest.raises(ValueError) as error:
        toy_fast3r()(images, ids)
    assert all(word in one_line(error) for word in words)


@torch.no_grad()
def test_one_thousand_views_run():
    maps = tiny_student()([torch.rand(3, 8, 8)] * 1000, generator=torch.Generator().manual_seed(0), at_once=200)
    assert len(maps) == 1000 and all(view.points_global.isfinite().all() for view in maps)


# ------------------------------------------------------------------------------------------------ weights


def write_fast3r(folder, state=None, config=None):
    save_file({k: v.contiguous() for k, v in (state or toy_fast3r().state_dict()).items()}, folder / "model.safetensors")
    heads = {"encoder_args": {"num_heads": 4}, "decoder_args": {"num_heads": 3, "attn_bias_for_inference_enabled": False}}
    (folder / "config.json").write_text(json.dumps(config or heads))
    return folder


def test_fast3r_is_read_from_the_published_layouts(tmp_path):
    truth = toy_fast3r().state_dict()
    torch.save(to_lightning(toy_fast3r(), "net."), tmp_path / "last.ckpt")
    for path in (write_fast3r(tmp_path), tmp_path / "model.safetensors", tmp_path / "last.ckpt"):
        model = distill3r.load_fast3r(path)
        assert not model.training and not model.decoder.sharper
        assert (model.encoder.head_dim, model.decoder.head_dim) == (16, 16)
        assert model.state_dict().keys() == truth.keys() and all(torch.equal(v, truth[k]) for k, v in model.state_dict().items())
    sharp = {"encoder_args": {"num_heads": 4}, "decoder_args": {"num_heads": 3, "attn_bias_for_inference_enabled": True}}
    assert distill3r.load_fast3r(write_fast3r(tmp_path, config=sharp)).decoder.sharper


@pytest.mark.parametrize("damage, words", [
    (lambda s: s.pop("decoder.dec_blocks.3.mlp.fc2.bias"), ["decoder.dec_blocks.3.mlp.fc2.bias is missing"]),
    (lambda s: s.update(surplus=torch.zeros(1)), ["no part of the Fast3R takes: surplus"]),
    (lambda s: s.update({"downstream_head.dpt.head.4.bias": torch.zeros(3)}), ["head.4.bias is (3,), but (4,) was expected"]),
    (lambda s: s.pop("encoder.enc_norm.weight"), ["lacks 'encoder.enc_norm.weight'", "no Fast3R"])])
def test_fast3r_is_read_strictly(tmp_path, damage, words):
    state = dict(toy_fast3r().state_dict())
    damage(state)
    with pytest.raises(ValueError) as error:
        distill3r.load_fast3r(write_fast3r(tmp_path, state))
    assert all(word in one_line(error) for word in [str(tmp_path / "model.safetensors"), *words])


def test_files_that_are_not_what_they_should_be(tmp_path):
    def message(load, path):
        with pytest.raises(ValueError) as error:
            load(path)
        return one_line(error)

    assert "jedyang97/Fast3R_ViT_Large_512" in message(distill3r.load_fast3r, tmp_path / "none.safetensors")
    assert "Distill3R" in message(distill3r.load_student, tmp_path)
    distill3r.save_student(tiny_student(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"patch": 8, "colour": 1}')
    assert str(config) in (said := message(distill3r.load_student, tmp_path)) and "colour" in said
    config.write_text('{"patch": 8')
    assert str(config) in (said := message(distill3r.load_student, tmp_path)) and "not JSON" in said
    config.unlink()  # then it is taken for the published one, whose sizes it does not have
    assert "encoder.cls_token is (1, 1, 192), but (1, 1, 384) was expected" in message(distill3r.load_student, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    assert "not a whole safetensors file" in message(distill3r.load_student, tmp_path)


# ------------------------------------------------------------------------------------------------ loss


def slow_loss(pred, target, masks, weight, mean):
    """Eq. 1-6 pixel by pixel in Python's own floats: V of (points_global, points_local, conf_global, conf_local), numpy."""
    pixels = [[tuple(p) for p in np.argwhere(mask)] for mask in masks]  # of each view
    number = sum(map(len, pixels))
    length = lambda x: math.sqrt(sum(float(v) ** 2 for v in x))
    part = {}
    for which in (0, 1):  # global, local
        sums = []
        for k, places in enumerate(pixels):
            inside = range(len(pixels)) if which == 0 else [k]  # the views that share a scale
            scales = [sum(length(maps[i][which][p]) for i in inside for p in pixels[i]) / max(1, sum(len(pixels[i]) for i in inside))
                      for maps in (pred, target)]
            total = 0.0
            for p in places:
                ours, theirs = float(pred[k][which + 2][p]), float(target[k][which + 2][p])
                w = {"teacher": theirs, "clamped": min(max(theirs / 10, 0.1), 1), "student": min(max(ours / 10, 0.1), 1), "none": 1}[weight]
                total += w * sum((float(a) / scales[0] - float(b) / scales[1]) ** 2 for a, b in zip(pred[k][which][p], target[k][which][p]))
            sums.append((total, len(places)))
        part[which] = (sum(t for t, _ in sums) / max(1, number) if mean == "pixels"
                       else sum(t / max(1, n) for t, n in sums) / len(sums))
    apart = sum(abs(float(pred[k][c][p]) - float(target[k][c][p])) for k, places in enumerate(pixels) for p in places for c in (2, 3))
    confidence = apart / 2 / max(1, number)
    return 2 * part[0] + part[1] + 0.001 * confidence, part[0], part[1], confidence


def random_views(seed, sizes, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    return [distill3r.Pointmap(spread * draw(*s, 3), spread * draw(*s, 3) + 1, 1 + draw(*s).exp(), 1 + 3 * draw(*s).exp()) for s in sizes]


def loss_case(name):
    sizes = {"two": [(3, 4), (5, 2)], "one": [(4, 3)]}.get(name, [(3, 4), (5, 2), (2, 2)])
    masks = [torch.rand(s, generator=torch.Generator().manual_seed(9)) < 0.6 for s in sizes]
    if name == "an empty view":
        masks[1][:] = False
    return random_views(1, sizes), random_views(2, sizes, 3.0), masks


def with_gradients(views):
    return [distill3r.Pointmap(*(x.clone().requires_grad_() for x in view)) for view in views]


@pytest.mark.parametrize("mean", ["pixels", "views"])
@pytest.mark.parametrize("weight", ["teacher", "clamped", "student", "none"])
@pytest.mark.parametrize("name", ["two", "one", "an empty view"])
def test_the_loss_is_that_of_the_loop_and_so_are_its_gradients(name, weight, mean):
    pred, target, masks = loss_case(name)
    pred = with_gradients(pred)
    loss = distill3r.pointmap_loss(pred, target, masks, weight=weight, mean=mean)
    loss.total.backward()
    arrays = [[x.detach().numpy().copy() for x in view] for view in pred]
    slow = lambda: slow_loss(arrays, [[x.numpy() for x in view] for view in target], [m.numpy() for m in masks], weight, mean)
    assert [x.item() for x in loss] == pytest.approx(slow(), rel=1e-12)
    for view, values, mask in zip(pred, arrays, masks):
        for x, array in zip(view, values):
            assert (x.grad[~mask] == 0).all()
            for place in np.argwhere(np.broadcast_to(mask.numpy().reshape(*mask.shape, *[1] * (array.ndim - 2)), array.shape))[::3]:
                place, ends = tuple(place), []
                for step in (1e-5, -1e-5):
                    array[place] += step
                    ends.append(slow()[0])
                    array[place] -= step
                assert x.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("global_target", ["direct", "aligned"])
def test_masked_pixels_may_hold_anything(global_target):
    pred, target, masks = loss_case("three")
    results = []
    for junk in (0.0, math.nan, math.inf):
        fill = lambda views: [distill3r.Pointmap(*(torch.where(m if x.ndim == 2 else m[..., None], x, junk) for x in view))
                              for view, m in zip(views, masks)]
        ours = with_gradients(fill(pred))
        loss = distill3r.pointmap_loss(ours, fill(target), masks, global_target=global_target)
        results.append([x for view in ours for x in torch.autograd.grad(loss.total, list(view), retain_graph=True)] + [torch.stack(loss)])
    for same in zip(*results):
        assert same[0].isfinite().all() and torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


@pytest.mark.parametrize("global_target", ["direct", "aligned"])
def test_nothing_valid_is_a_loss_of_zero(global_target):
    pred, target, masks = loss_case("three")
    pred = with_gradients(pred)
    for mean in ("pixels", "views"):
        loss = distill3r.pointmap_loss(pred, target, [m & False for m in masks], mean=mean, global_target=global_target)
        assert [x.item() for x in loss] == [0, 0, 0, 0]
        assert all((g == 0).all() for view in pred for g in torch.autograd.grad(loss.total, list(view), retain_graph=True))


def test_what_the_loss_does_not_see():
    pred, target, masks = loss_case("three")
    loss = distill3r.pointmap_loss(pred, target, masks)
    every = distill3r.pointmap_loss([v._replace(points_global=7 * v.points_global) for v in pred], target, masks)
    assert every.global_.item() == pytest.approx(loss.global_.item(), rel=1e-12)
    first = [pred[0]._replace(points_global=7 * pred[0].points_global, points_local=7 * pred[0].points_local), *pred[1:]]
    changed = distill3r.pointmap_loss(first, target, masks)
    assert changed.local.item() == pytest.approx(loss.local.item(), rel=1e-12)  # a scale for each view
    assert abs(changed.global_.item() / loss.global_.item() - 1) > 0.01  # one for all views
    assert [x.item() for x in distill3r.pointmap_loss(target, target, masks)] == [0, 0, 0, 0]
    half = [distill3r.Pointmap(*(x.half() for x in view)) for view in target]  # as the cache has it
    assert distill3r.pointmap_loss(pred, half, masks).total.dtype == torch.float64
    with pytest.raises(AssertionError, match="no such loss: weight 'teachers'"):
        distill3r.pointmap_loss(pred, target, masks, weight="teachers")


LOSS = json.loads((FIXTURES / "distill3r_loss.json").read_text())
LOSS_TRUTH = load_file(FIXTURES / "distill3r_loss.safetensors")


@pytest.mark.parametrize("name, weight", [("default", "clamped"), ("no_conf_weight", "none"), ("student_conf_weight", "student")])
@pytest.mark.parametrize("case", ["b1n1_masked", "b1n3_full", "b1n3_masked"])
def test_the_official_loss_is_a_pair_of_flags(case, name, weight):
    get = lambda which, *names: [distill3r.Pointmap(*(x.clone() for x in maps)) for maps in
                                 zip(*(LOSS_TRUTH[f"{case}/{which}/{n}"][0] for n in names))]
    names = ("xyz_global", "xyz_local", "conf", "conf_local")
    pred, target = with_gradients(get("pred", *names)), get("target", "xyz_global", "xyz_local", "conf_global", "conf_local")
    masks, known = list(LOSS_TRUTH[f"{case}/mask"][0].bool()), LOSS["cases"][case][name]
    loss = distill3r.pointmap_loss(pred, target, masks, weight=weight, mean="views")
    parts = [LOSS["alpha_g"] * loss.global_, LOSS["alpha_l"] * loss.local, LOSS["gamma"] * loss.confidence]
    assert [x.item() for x in parts] == pytest.approx([known[k] for k in ("global", "local", "confidence")], rel=1e-5)
    if f"{case}/grad_{name}/{names[0]}" in LOSS_TRUTH:
        loss.total.backward()
        for field, theirs in enumerate(names):
            assert error_to(torch.stack([view[field].grad for view in pred]), LOSS_TRUTH[f"{case}/grad_{name}/{theirs}"][0]) < 2e-5


def test_local_maps_are_aligned_as_officially():
    for v in range(3):
        local, global_, conf = (LOSS_TRUTH[f"align/v{v}/{name}"][0] for name in ("local", "global", "conf"))
        view, every = distill3r.Pointmap(global_, local, conf, conf), torch.ones_like(conf, dtype=torch.bool)
        for quantile, name in (((), "out_p85"), ((0.0,), "out_p0")):
            assert error_to(distill3r.aligned_global(view, every, *quantile), LOSS_TRUTH[f"align/v{v}/{name}"][0]) < 2e-5
        few = torch.zeros_like(every)
        few[0, :2] = True
        assert torch.equal(distill3r.aligned_global(view, few), local)  # two points fix no rotation
        few[0, :8] = True  # the two surest of eight are too few: fitted on all eight
        s, R, t = distill3r.similarity(local[few], global_[few])
        assert torch.allclose(distill3r.aligned_global(view, few), (s * local.double() @ R.T + t).float())


def test_aligning_the_target_is_a_flag():
    pred, target, masks = loss_case("two")
    by_hand = [v._replace(points_global=distill3r.aligned_global(v, m)) for v, m in zip(target, masks)]
    loss = distill3r.pointmap_loss(pred, target, masks, global_target="aligned")
    assert loss.total == distill3r.pointmap_loss(pred, by_hand, masks).total != distill3r.pointmap_loss(pred, target, masks).total


def test_similarity_finds_a_motion_and_never_a_reflection():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    R = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    R = R * torch.det(R).sign()
    s, found, t = distill3r.similarity(x, 2.5 * x @ R.T + torch.tensor([1.0, -2.0, 3.0]))
    assert s.item() == pytest.approx(2.5) and torch.allclose(found, R) and t.tolist() == pytest.approx([1, -2, 3])
    mirrored = distill3r.similarity(x, x * torch.tensor([1.0, 1.0, -1.0]))
    assert torch.det(mirrored[1]).item() == pytest.approx(1)
    error = lambda s, R, t: (s * x @ R.T + t - x * torch.tensor([1.0, 1.0, -1.0])).square().sum()
    turn = torch.linalg.matrix_exp(0.01 * torch.tensor([[0.0, -1, 2], [1, 0, 1], [-2, -1, 0]], dtype=torch.float64))
    least = error(*mirrored)
    assert least < error(mirrored[0] * 1.01, *mirrored[1:]) and least < error(mirrored[0], mirrored[1] @ turn, mirrored[2])


# ------------------------------------------------------------------------------------------------ efficiency


@pytest.mark.skipif(not distill3r.PEAK.exists(), reason="the peak of a CPU's memory is told by Linux alone")
def test_time_and_memory_of_the_parts():
    models = {"teacher": toy_fast3r(), "student": tiny_student()}
    costs = distill3r.efficiency(models, [3], (64, 96), repeats=1)
    assert [(c.model, c.views, c.part) for c in costs] == [(m, 3, part) for m in models for part in ("encoder", "fusion", "heads", "all")]
    cost = {(c.model, c.part): c for c in costs}
    for name in models:
        parts = [cost[name, part] for part in ("encoder", "fusion", "heads")]
        assert cost[name, "all"].seconds == pytest.approx(sum(p.seconds for p in parts)) and min(p.seconds for p in parts) > 0
        assert cost[name, "all"].gigabytes == max(p.gigabytes for p in parts)
    # 16 channels a pixel before the heads' last convolution: all views at once take 7 views' of them more than one at a time.
    heads = [next(c for c in distill3r.efficiency({"student": models["student"]}, [8], (128, 160), at_once, 1) if c.part == "heads")
             for at_once in (1, 8)]
    assert heads[1].gigabytes - heads[0].gigabytes > 7 * 128 * 160 * 16 * 4 / 1e9
    table = distill3r.efficiency_table(costs).splitlines()
    assert len(table) == 5 and "teacher" in table[0] and "student" in table[0]
    ratio = cost["teacher", "heads"].seconds / cost["student", "heads"].seconds
    assert table[3].split()[:2] == ["3", "heads"] and table[3].endswith(f"{ratio:.1f}x")


def test_the_papers_image_sizes_and_what_does_not_fit(monkeypatch):
    seen = []

    def costs(model, images, at_once):
        seen.append((model.patch, tuple(images[0].shape)))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        slow = 1 + seen.count(seen[-1]) % 2  # every second pass
        return {"encoder": (slow, 1e9), "fusion": (2.0 * slow, 3e9), "heads": (3.0 * slow, 2e9)}

    monkeypatch.setattr(distill3r, "cost_of_parts", costs)
    with torch.device("meta"):
        models = {"teacher": distill3r.Fast3R(64, 4, 1, 48, 3, 1), "student": distill3r.Student()}
    for model in models.values():
        model.to_empty(device="cpu")
    rows = distill3r.efficiency(models, [1, 2], repeats=2)
    assert set(seen) == {(16, (3, 384, 512)), (14, (3, 378, 518))}  # Table I
    whole = {(c.model, c.views): c for c in rows if c.part == "all"}
    held = 4 * (71_969_288 + 3 * 378 * 518) / 1e9  # weights and pictures
    assert whole["student", 1][3:] == pytest.approx((6.0, 3 + held)) and whole["student", 2].seconds == math.inf
    assert "inf s" in distill3r.efficiency_table(rows)
