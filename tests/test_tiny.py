"""What stands in where nothing can be downloaded: the recipes of the semantic ViT and of Distill3R's student."""
import argparse
import copy
import importlib

import pytest
import torch

data, lift, distill3r, recipes = (importlib.import_module(n) for n in ("01_data", "02_lift", "06_distill3r", "tiny.train"))


@pytest.fixture(scope="module")
def small_rooms(tmp_path_factory):  # of a seed that nothing was trained on
    folder = tmp_path_factory.mktemp("small")
    data.make_rooms(folder, scenes=8, size=(48, 64), seed=3)
    return recipes.rooms_in_memory(data.load_scenes(folder))


def windows(rooms, stride, count=4):
    return recipes.draw_windows(rooms, count, (stride,), torch.Generator().manual_seed(0), mirror=False)


def test_tokens_match_where_the_other_views_show_the_same_place(small_rooms):
    w = windows(small_rooms, 1)
    still = w._replace(c2w=w.c2w[:, :1].expand_as(w.c2w), depth=w.depth[:, :1].expand_as(w.depth))  # one view, four times
    local, _, _ = recipes.true_points(still)
    weights, seen = recipes.matching_tokens(still, local, 8)
    same = torch.eye(48).repeat(4, 4) - torch.block_diag(*[torch.eye(48)] * 4)  # the same token of the three others
    assert seen.all() and (weights - same / 3).abs().max() < 0.1  # a token's centre lies between two pixels
    local, world, _ = recipes.true_points(w)
    weights, seen = recipes.matching_tokens(w, local, 8)
    assert 0.5 < seen.float().mean() < 1 and torch.allclose(weights.sum(-1), seen.float(), atol=1e-5)
    assert torch.allclose(world[:, 0], local[:, 0], atol=1e-5)
    at = world[:, :, 4::8, 4::8].flatten(1, 3)  # (B, V N, 3): what the centres show, in the first view's frame
    apart = (weights @ at - at).norm(dim=-1)[seen]
    chance = (at.mean(1, keepdim=True) - at).norm(dim=-1)[seen]
    assert apart.median() < 0.25 * chance.median()


@pytest.mark.parametrize("stage, trained, idle", [("tokens", "readout", "head"), ("maps", "head", "readout")])
def test_each_stage_trains_its_own_outputs_and_the_matching_heads(small_rooms, stage, trained, idle):
    trainer = recipes.StudentTrainer(argparse.Namespace(encoder="tiny", seed=0, match=0.3))
    w, generator = windows(small_rooms, 1, count=2), torch.Generator().manual_seed(0)
    ids = [distill3r.draw_view_ids(4, generator) for _ in w.depth]
    loss = recipes.learn_windows(trainer, w, ids, stage, generator)
    grads = {name: p.grad for name, p in trainer.named_parameters() if p.grad is not None and p.grad.any()}
    assert 0 < loss < float("inf") and [x.shape for x in trainer.logits] == [(192, 192)] * 2
    assert any(trained in name for name in grads) and not any(idle in name for name in grads)
    trainer.zero_grad()
    trainer.match = 0
    assert recipes.learn_windows(trainer, w, ids, stage, generator) < loss


def test_eight_bits_are_read_back():
    state = distill3r.load_student("tiny").state_dict()
    stored = recipes.in_8_bits(state)
    name = "decoder.dec_blocks.0.attn.qkv.weight"
    assert stored[name].dtype == torch.int8
    read = stored[name].float() * stored[f"{name}.scale"].float()[:, None]
    assert (read - state[name]).abs().max() < 1e-3 * state[name].abs().max()  # they come from 8 bits, so nothing is lost


def test_the_built_in_student_knows_how_the_camera_moved(small_rooms):
    student = distill3r.load_student("tiny")
    for stride in (1, 3):
        off, still, better, _ = recipes.compare_poses(student, small_rooms, stride, windows=8)
        assert off < still / 2 and better > 80, (stride, off, still, better)


def test_balanced_targets_use_all_prototypes():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8)  # the last one nearly always wins
    assert logits.argmax(1).bincount(minlength=8)[0] == 0
    even = recipes.even(logits, 1.0)
    assert torch.allclose(even.sum(1), torch.ones(64)) and (even.sum(0) / 8 - 1).abs().max() < 0.2


def test_hidden_patches_are_a_part_of_half_of_the_pictures():
    hidden = recipes.hidden_patches(400, torch.Generator().manual_seed(0)).float().mean(1)
    assert 0.4 < (hidden > 0).float().mean() < 0.6
    assert 0.19 < hidden[hidden > 0].min() and hidden.max() < 0.61


def test_self_distillation_trains_the_student_and_does_not_show_it_the_hidden_patches(small_rooms):
    generator, images = torch.Generator().manual_seed(0), small_rooms[0][0, :2].float() / 255
    images = torch.nn.functional.interpolate(images, (96, 128))
    student = recipes.SelfDistilled(lift.load_vit("tiny"))
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss = recipes.self_distillation_loss(student, teacher, images, 0.05, generator)
    loss.backward()
    assert 0 < loss < float("inf") and all(p.grad is not None for p in student.parameters())
    hidden = torch.zeros(2, 192, dtype=torch.bool)
    hidden[:, 100] = True  # the patch in row 6, column 4
    other = images.clone()
    other[:, :, 48:56, 32:40] = 0
    with torch.no_grad():
        same, plain = ([torch.equal(*pair) for pair in zip(student(images, h), student(other, h))] for h in (hidden, None))
    assert same == [True, True] and plain == [False, False]  # class token, patches
