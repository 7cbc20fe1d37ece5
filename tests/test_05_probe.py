"""05_probe.py: metrics and losses against float64 loops, matching on features that are known, files, the script."""
import importlib
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import stopping

data, lift, probe = (importlib.import_module(n) for n in ("01_data", "02_lift", "05_probe"))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[k] - theirs[k]) < tolerance * max(1, abs(theirs[k])) for k in theirs), (ours, theirs)


# ------------------------------------------------------------------------------------------------ metrics and losses


def maps_with_holes():
    truth = 1 + 3 * rand(4, 6, 7, seed=1)
    truth[rand(4, 6, 7, seed=2) < 0.3] = 0
    truth[3] = 0  # a view of which nothing is known does not count
    return truth, 1 + 3 * rand(4, 6, 7, seed=3)


def test_depth_metrics_against_loops():
    truth, guess = maps_with_holes()
    rows = []
    for t, z in zip(truth[:3].double().tolist(), guess.double().tolist()):
        known = [(a, b) for row, other in zip(t, z) for a, b in zip(row, other) if a > 0]
        rows.append((sum(abs(a - b) / a for a, b in known) / len(known),
                     math.sqrt(sum((a - b) ** 2 for a, b in known) / len(known)),
                     100 * sum(max(a / b, b / a) < 1.25 for a, b in known) / len(known)))
    expected = dict(zip(("AbsRel", "RMSE", "delta1"), np.mean(rows, 0)))
    near(probe.depth_metrics(guess, truth), expected)
    near(probe.depth_metrics(iter(guess), truth), expected)  # one view after the other
    assert probe.depth_metrics(truth, truth) == {"AbsRel": 0, "RMSE": 0, "delta1": 100}


def test_normal_metrics_against_loops():
    truth = F.normalize(randn(3, 5, 6, 3), dim=-1)
    guess = F.normalize(truth + 0.3 * randn(3, 5, 6, 3, seed=1), dim=-1)
    truth[rand(3, 5, 6) < 0.3] = 0
    rows = []
    for t, n in zip(truth.double().view(3, 30, 3).tolist(), guess.double().view(3, 30, 3).tolist()):
        known = [(a, b) for a, b in zip(t, n) if any(a)]
        length = lambda v: math.dist(v, (0, 0, 0))
        angles = [math.degrees(math.acos(sum(x * y for x, y in zip(a, b)) / length(a) / length(b))) for a, b in known]
        rows.append([math.sqrt(sum(a * a for a in angles) / len(angles))] +
                    [100 * sum(a < m for a in angles) / len(angles) for m in (11.25, 22.5, 30)])
    near(probe.normal_metrics(guess, truth), dict(zip(("RMSE", "11.25", "22.5", "30"), np.mean(rows, 0))), 1e-5)
    assert probe.normal_metrics(truth, truth) == {"RMSE": 0, "11.25": 100, "22.5": 100, "30": 100}


def test_segmentation_metrics_against_loops():
    truth, guess = (4 * rand(3, 8, 9, seed=1)).long(), (5 * rand(3, 8, 9, seed=2)).long()  # class 4 is never true
    truth[rand(3, 8, 9) < 0.2] = 255
    known = [(t, g) for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist()) if t != 255]
    iou, accuracy = [], []
    for c in range(5):
        both, true, said = (sum(test) for test in zip(*((t == g == c, t == c, g == c) for t, g in known)))
        iou.append(100 * both / (true + said - both))
        accuracy += [100 * both / true] if true else []
    ours = probe.segmentation_metrics(guess, truth, 6)  # class 5 is nowhere
    assert ours.pop("IoU") == [pytest.approx(x) for x in iou] + [None] and iou[4] == 0
    near(ours, dict(aAcc=100 * sum(t == g for t, g in known) / len(known), mIoU=sum(iou) / 5, mAcc=sum(accuracy) / 4))
    perfect = probe.segmentation_metrics(torch.where(truth == 255, 3, truth), truth, 6)
    assert perfect["aAcc"] == perfect["mIoU"] == perfect["mAcc"] == 100
    many = torch.arange(100).view(1, 10, 10) * 99  # a confusion matrix would take 800 MB
    assert probe.segmentation_metrics(many, many, 10_000)["mIoU"] == 100


def test_expected_depth_and_sig_loss_against_loops():
    logits, bins = randn(2, 5, 3, 4), torch.linspace(0.5, 4, 5)
    ours = probe.expected_depth(logits, bins)
    for b, y, x in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        share = [max(0.0, v) + 0.1 for v in logits[b, :, y, x].tolist()]
        assert abs(ours[b, y, x].item() - sum(p * z for p, z in zip(share, bins.tolist())) / sum(share)) < 1e-6
    truth, guess = maps_with_holes()
    both = zip(truth.double().flatten().tolist(), guess.double().flatten().tolist())
    g = [math.log(z + 1e-3) - math.log(t + 1e-3) for t, z in both if t]
    slow = math.sqrt(sum(x * x for x in g) / len(g) - 0.85 * (sum(g) / len(g)) ** 2)
    assert abs(probe.sig_loss(guess.double(), truth.double()).item() - slow) < 1e-9
    exact = truth.clone().requires_grad_()
    probe.sig_loss(exact, truth).backward()
    assert exact.grad.isfinite().all()


def test_angular_loss_against_loops():
    maps, truth = randn(2, 4, 3, 5).double(), F.normalize(randn(2, 3, 5, 3, seed=1).double(), dim=-1)
    truth[0, 0] = 0
    values = []
    for b, y, x in np.ndindex(2, 3, 5):
        (*n, k), t = maps[b, :, y, x].tolist(), truth[b, y, x].tolist()
        if any(t):
            angle = math.acos(sum(i * j for i, j in zip(n, t)) / math.dist(n, (0, 0, 0)))
            kappa = (k if k > 0 else math.exp(k) - 1) + 1.01
            # minus the log of the density of Bae et al., up to a constant
            values.append(-math.log((kappa**2 + 1) * math.exp(-kappa * angle) / (1 + math.exp(-kappa * math.pi))))
    assert abs(probe.angular_loss(maps, truth).item() - sum(values) / len(values)) < 1e-9
    exact = torch.cat([truth[1:].permute(0, 3, 1, 2), torch.zeros(1, 1, 3, 5)], 1).requires_grad_()
    probe.angular_loss(exact, truth[1:]).backward()
    assert exact.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ heads


def some_tokens(count=24, channels=6, seed=0):
    return probe.Features(randn(count, channels, seed=seed + 1).half(), randn(count, 3, 4, channels, seed=seed).half())


def readable(kind, size=(24, 32)):  # -> tokens and truth that a linear layer can read off them
    tokens = some_tokens(96)
    maps = F.interpolate(tokens.patches.float().permute(0, 3, 1, 2), size, mode="bilinear")
    if kind == "depth":
        return tokens, 3 + 0.8 * maps[:, 0].clamp(-2, 2) + 0.8 * tokens.cls[:, 0].float().clamp(-1, 1)[:, None, None]
    if kind == "normals":
        return tokens, F.normalize(maps[:, :3], dim=1).permute(0, 2, 3, 1)
    return tokens, maps[:, :3].argmax(1)


def halves(features, truth):  # -> what a probe takes, without its recipe
    first, second = slice(None, 48), slice(48, None)
    part = lambda views: (probe.Features(*(x[views] for x in features)), truth[views])
    return *part(first), *part(second)


RUNS = {"depth": (probe.depth_probe, probe.Recipe(80, 2e-2, 8), "RMSE"),
        "normals": (probe.normal_probe, probe.Recipe(200, 2e-2, 8), "RMSE"),
        "segmentation": (probe.segmentation_probe, probe.Recipe(200, 2e-2, 8), "mIoU")}


@pytest.mark.parametrize("kind", RUNS)
def test_a_head_reads_what_is_there_and_nothing_else(kind):
    run, recipe, score = RUNS[kind]
    tokens, truth = readable(kind)
    good, predict = run(*halves(tokens, truth), recipe)
    blind, _ = run(*halves(some_tokens(96, seed=9), truth), recipe)
    said = torch.stack(list(predict(halves(tokens, truth)[2])))
    constant = probe.baseline({kind: (truth[:48], truth[48:])})[kind]
    assert said.shape == truth[48:].shape
    if kind == "segmentation":
        assert good[score] > 80 > 45 > blind[score] and constant["aAcc"] < 40
    else:
        assert good[score] < 0.4 * constant[score] and blind[score] > 0.9 * constant[score]
    again, predict = run(*halves(tokens, truth), recipe)
    assert again == good and torch.equal(torch.stack(list(predict(halves(tokens, truth)[2]))), said)
    assert run(*halves(tokens, truth), recipe._replace(seed=1))[0] != good


@pytest.mark.parametrize("kind", RUNS)
def test_heads_are_fitted_to_training_views_alone(kind):
    run, recipe, _ = RUNS[kind]
    train, truth, val, val_truth = halves(*readable(kind))
    said = []
    for other, its_truth in ((val, val_truth), (probe.Features(*(9 + 5 * x for x in val)), 3 * val_truth)):
        _, predict = run(train, truth, other, its_truth, recipe._replace(steps=3))
        said.append(torch.stack(list(predict(val))))
    assert torch.equal(*said)  # whitening, depth bins and classes do not know of the held-out views


@pytest.mark.parametrize("kind", RUNS)
def test_views_of_which_nothing_is_known_are_not_trained_on(kind):
    run, recipe, _ = RUNS[kind]
    train, truth, *val = halves(*readable(kind))
    truth[::2] = 255 if kind == "segmentation" else 0
    run(train, truth, *val, recipe._replace(steps=20, batch=1))  # it stops where a loss is not finite


def test_an_ignored_class_is_never_predicted():
    tokens, truth = readable("segmentation")
    train, truth, val, val_truth = halves(tokens, torch.where(truth == 1, 255, 2 * truth))  # classes 0 and 4 are left
    scores, predict = probe.segmentation_probe(train, truth, val, val_truth, RUNS["segmentation"][1])
    assert torch.stack(list(predict(val))).unique().tolist() == [0, 4]
    assert [x is None for x in scores["IoU"]] == [False, True, True, True, False] and scores["mIoU"] > 85


@pytest.mark.parametrize("floor", [0.01, 1.0])
def test_whitening_against_singular_values(floor):
    x = randn(500, 5) @ randn(5, 5, seed=1) * torch.tensor([1, 10, 0.1, 1, 1]) + 3
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    _, s, v = np.linalg.svd(standard, full_matrices=False)
    slow = torch.from_numpy(standard @ v.T / np.sqrt(s**2 / len(x) + floor))
    ours = probe.Whitening(x, floor)(x)
    assert torch.allclose(ours.abs().double(), slow.flip(1).abs(), atol=1e-3)  # to the sign of a direction
    flat = torch.cat([x, torch.full((500, 1), 7.0), x[:, :1] + x[:, 1:2]], 1)  # constant; the sum of two
    white = probe.Whitening(flat, floor)(flat)
    assert white.isfinite().all() and white.var(0).max() < 1.01
    single = probe.Whitening(x[:1], floor)(x)  # CLS of a single image cannot be told from its mean
    assert torch.allclose(single.norm(dim=1), (x - x[0]).norm(dim=1) / math.sqrt(floor), rtol=1e-3)


@pytest.mark.parametrize("with_cls", [True, False])
def test_depth_is_read_off_tokens_that_are_four_times_as_dense(with_cls):
    tokens, truth = some_tokens(4), 1 + rand(4, 24, 32)
    _, predict = probe.depth_probe(tokens, truth, tokens, truth, probe.Recipe(1, 0.0, 2), with_cls)  # rate 0: untrained
    head, bins = probe.LinearHead(tokens, 256, with_cls, 0), torch.linspace(1e-3, truth.max().item(), 256)
    x = head.patch(tokens.patches.float())
    if with_cls:
        x = torch.cat([x, head.cls(tokens.cls.float())[:, None, None].expand(-1, 3, 4, -1)], -1)
    x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=4, mode="bilinear")  # before the linear layer, as in A.4
    share = F.conv2d(x, head.linear.weight[:, :, None, None], head.linear.bias).relu() + 0.1
    depth = (share * bins[:, None, None]).sum(1) / share.sum(1)
    depth = F.interpolate(depth[:, None], (24, 32), mode="bilinear")[:, 0]
    assert torch.allclose(torch.stack(list(predict(tokens))), depth, atol=1e-4)


def test_heads_are_trained_as_their_recipe_says(monkeypatch):
    seen = []

    class Recording(torch.optim.AdamW):
        def step(self):
            seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    tokens, truth = readable("depth")
    probe.depth_probe(tokens, truth, tokens, truth, probe.Recipe(60, 1e-2, 2))
    rates, decays = zip(*seen)
    assert rates == pytest.approx([1e-2 * min((n + 1) / 3, (1 + math.cos(math.pi * n / 60)) / 2) for n in range(60)])
    assert set(decays) == {0.01}
    with pytest.raises(ValueError, match="depth: the loss is nan at step 0"):
        probe.depth_probe(tokens, truth * torch.inf, tokens, truth, probe.Recipe(2, 1e-2, 2))


def test_the_baseline_is_that_of_training_views():
    truth, val = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), torch.tensor([[[4.0, 5.0], [0.0, 8.0]]])
    assert probe.baseline({"depth": (truth, val)})["depth"] == probe.depth_metrics(torch.full_like(val, 2.0), val)
    normal, other = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3)
    normal[0, 0, 0, 0] = normal[0, 1, :, 1] = other[..., 2] = 1  # the mean is (1, 2, 0) / 3 in direction
    expected = probe.normal_metrics(F.normalize(torch.tensor([1.0, 2, 0]), dim=0).expand(other.shape), other)
    assert probe.baseline({"normals": (normal, other)})["normals"] == pytest.approx(expected)
    label, said = torch.tensor([[[2, 2], [1, 255]]]), torch.tensor([[[1, 1], [1, 2]]])
    assert probe.baseline({"segmentation": (label, said)})["segmentation"]["aAcc"] == 25  # class 2 everywhere


# ------------------------------------------------------------------------------------------------ correspondence


def stored(scenes, size, out):
    views = probe.store_views(scenes, size, probe.parse(["--out", str(out)]))
    return views._replace(images=views.images[:], depth=views.depth[:])


@pytest.fixture(scope="module")
def room_views(rooms, tmp_path_factory):
    return stored(rooms, (96, 128), tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def views(crooked, tmp_path_factory):  # of which each has its own camera, and depth with a hole
    return stored(crooked, (48, 64), tmp_path_factory.mktemp("views"))


def test_pairs_are_of_one_scene_and_fill_the_ranges(room_views):
    pairs = probe.choose_pairs(room_views, 3, seed=0)
    ranges = [sum(low <= p.angle < high for p in pairs) for low, high in probe.VIEWPOINTS.values()]
    assert ranges[:3] == [3, 3, 3]
    assert pairs == probe.choose_pairs(room_views, 3, seed=0) != probe.choose_pairs(room_views, 3, seed=1)
    for p in pairs:
        (scene, i), (other, j) = room_views.where[p.a], room_views.where[p.b]
        R = scene.c2w[i, :3, :3].double().T @ other.c2w[j, :3, :3].double()
        axis = torch.stack([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
        angle = math.degrees(math.atan2(axis.norm(), R.trace() - 1))
        assert scene is other and p.measured and abs(angle - p.angle) < 0.05


def test_a_pair_shares_what_both_see_of_what_is_known(views):
    for a, b in ((0, 1), (3, 5), (2, 10)):
        shares = []
        for u, v in ((a, b), (b, a)):
            motion = torch.linalg.inv(views.c2w[v]) @ views.c2w[u]
            seen = lift.cross_check(views.depth[u], views.depth[v], views.K[u], views.K[v], motion) > 0.5
            shares.append(seen[views.depth[u] > 0].float().mean().item())
        assert probe.shared_share(views, probe.Pair(a, b, 0.0, True)) == pytest.approx(min(shares))
        assert abs(shares[0] - shares[1]) > 0.01
    far_apart = views._replace(K=views.K * torch.tensor([50, 50, 1.0]).view(3, 1))
    for fewer in (far_apart, views._replace(c2w=views.c2w * torch.nan)):
        assert probe.choose_pairs(fewer, 2, seed=0) == []
    said = re.search(r"(\S+) and (\S+) share most, (\d+) %", probe.why_no_pairs(far_apart))
    pairs = [probe.Pair(a, b, 0.0, True) for a, b in itertools.combinations(range(len(views.where)), 2)]
    share = {p: probe.shared_share(far_apart, p) for p in pairs if views.where[p.a][0] is views.where[p.b][0]}
    best = max(share, key=share.get)
    assert [scene.frames[i].name for scene, i in (views.where[i] for i in best[:2])] == [*said.groups()[:2]]
    assert int(said[3]) == round(100 * share[best]) < 20
    assert "two held-out views" in probe.why_no_pairs(views._replace(c2w=views.c2w * torch.nan))


def test_pairs_with_depth_come_first(views):
    depth = views.depth.clone()
    depth[::2] = 0
    pairs = probe.choose_pairs(views._replace(depth=depth), 4, seed=0)
    assert len(pairs) == 4 and all(p.measured and p.a % 2 and p.b % 2 for p in pairs)
    assert not any(p.measured for p in probe.choose_pairs(views._replace(depth=0 * depth), 2, seed=0))


def world_positions(views, i, points, depth):
    rays = F.pad(points, (0, 1), value=1.0) @ torch.linalg.inv(views.K[i]).T
    return (rays * depth[:, None]) @ views.c2w[i, :3, :3].T + views.c2w[i, :3, 3]


@pytest.mark.parametrize("of, ranges, least", [
    ("room_views", ("0-15", "15-30", "30-60"), 99), ("views", ("0-15",), 94)])  # in these some are seen by one alone
def test_true_positions_match_and_random_features_do_not(of, ranges, least, request, monkeypatch):
    views = request.getfixturevalue(of)
    pairs, original = probe.choose_pairs(views, 4, seed=0), probe.sample_points
    h, w = (side // 8 for side in views.images.shape[2:])
    frequencies, phase = randn(256, 3) / 0.3, 2 * math.pi * rand(256)

    def knowing(tokens, depth):  # the tokens say which view it is, the features where in the world each point lies
        points, _, z = original(tokens, depth)
        position = world_positions(views, int(tokens[0, 0, 0]), points, z)
        return points, (position @ frequencies.T + phase).cos(), z
    numbers = torch.arange(len(views.images)).view(-1, 1, 1, 1).expand(-1, h, w, 1).float()
    with monkeypatch.context() as patched:
        patched.setattr(probe, "sample_points", knowing)
        scores, chance, matches = probe.correspondence(probe.Features(None, numbers), views, pairs)
    assert min(scores["5 px"], *(scores[f"5 px {name}"] for name in ranges)) > least
    of_pairs = {name for name, (low, high) in probe.VIEWPOINTS.items() if any(low <= p.angle < high for p in pairs)}
    assert {name[5:] for name in scores if name.startswith("5 px ")} == of_pairs >= set(ranges)
    assert scores["1.5 patches"] >= scores["5 grid"] > least and chance["10 px"] < 12
    assert torch.cat([m.error for m in matches]).median() < 1.2
    noise = probe.Features(None, randn(len(numbers), h, w, 64))
    random, chance, matches = probe.correspondence(noise, views, pairs)
    assert abs(random["10 px"] - chance["10 px"]) < 3 and random["10 px"] < 12
    # Thresholds: the grid's spacing is 2 pixels here, a patch 8.
    share = lambda limit: pytest.approx(np.mean([100 * (m.error < limit).double().mean().item() for m in matches]))
    for score, limit in (("10 grid", 20), ("20 px", 20), ("10 px", 10), ("1.5 patches", 12)):
        assert random[score] == share(limit)


def test_matching_against_loops():
    a, b = randn(30, 5, seed=1).double(), randn(40, 5, seed=2).double()
    length = lambda v: math.dist(v, [0] * 5)
    cosine = [[sum(x * y for x, y in zip(u, v)) / length(u) / length(v) for v in b.tolist()] for u in a.tolist()]

    def best(rows):  # -> (surety, from, to) of each row, the surest first
        found = []
        for n, row in enumerate(rows):
            first, second = sorted(range(len(row)), key=lambda k: -row[k])[:2]
            found.append((1 - (1 - row[first]) / (1 - row[second]), n, first))
        return sorted(found, reverse=True)
    forward = [(i, j) for _, i, j in best(cosine)[:7]]
    backward = [(i, j) for _, j, i in best(list(map(list, zip(*cosine))))[:7]]
    index_a, index_b = probe.match(a, b, 14)
    assert list(zip(index_a.tolist(), index_b.tolist())) == forward + backward
    assert len(probe.match(a, b, 1000)[0]) == 70  # no more than there are points


def test_points_lie_at_pixels_of_known_depth_and_features_between_patches(views):
    tokens, depth = randn(3, 4, 2), 1 + rand(24, 32)
    depth[:9] = 0
    points, features, z = probe.sample_points(tokens, depth)
    assert len(points) == 16 * (12 - 4) and points[:, 1].min() > 9  # every second row: 1, 3, ...; up to 7 unknown
    for n in (0, 17, 60, 127):
        x, y = points[n].tolist()
        assert z[n] == depth[int(y), int(x)] and x % 1 == y % 1 == 0.5
        u, v = min(max(x / 8 - 0.5, 0), 3), min(max(y / 8 - 0.5, 0), 2)
        j, i = min(int(u), 2), min(int(v), 1)
        corners = [(i, j, (1 - v + i) * (1 - u + j)), (i, j + 1, (1 - v + i) * (u - j)),
                   (i + 1, j, (v - i) * (1 - u + j)), (i + 1, j + 1, (v - i) * (u - j))]
        assert torch.allclose(features[n], sum(w * tokens[r, c] for r, c, w in corners), atol=1e-5)
    depth = torch.zeros_like(views.depth)
    depth[:, ::6] = views.depth[:, ::6]  # rows 0, 6, ...; of patches of 8 pixels rows 1, 3, 5, ... are matched
    tokens, pair = probe.Features(None, randn(len(depth), 6, 8, 3)), probe.choose_pairs(views, 1, seed=0)[0]
    with pytest.raises(ValueError, match=f"{views.where[pair.a][0].name}: .* fewer than two of the matched points"):
        probe.correspondence(tokens, views._replace(depth=depth), [pair])


def test_errors_of_matches_against_loops():
    K_a, K_b = (np.array([[f, 0, 60.0], [0, f + 3, 50.0], [0, 0, 1]]) for f in (90.0, 110.0))
    c, s = math.cos(0.3), math.sin(0.3)
    a_to_b = np.array([[c, 0, s, 0.4], [0, 1, 0, -0.1], [-s, 0, c, 0.2], [0, 0, 0, 1]])
    a, b, depth = 100 * rand(20, 2, seed=1), 100 * rand(20, 2, seed=2), 1 + 3 * rand(20)
    depth[0] = -5  # stands for a point that comes to lie behind the second camera

    def project(pixel, z):
        x = K_b @ (a_to_b[:3, :3] @ (np.linalg.solve(K_a, [*pixel, 1]) * z) + a_to_b[:3, 3])
        return x[:2] / x[2], x[2]
    expected, distances = [], []
    for p, q, z in zip(a.double().numpy(), b.double().numpy(), depth.double().numpy()):
        place, in_front = project(p, z)
        expected.append(math.dist(place, q) if in_front > 0 else math.inf)
        (x, y), (u, v) = project(p, 2.0)[0], project(p, 3.0)[0]  # two places on the epipolar line
        distances.append(abs((u - x) * (y - q[1]) - (x - q[0]) * (v - y)) / math.hypot(u - x, v - y))
    cameras = [torch.from_numpy(x).float() for x in (K_a, K_b, a_to_b)]
    ours = probe.reprojection_error(a, b, depth, *cameras)
    assert ours[0] == math.inf and torch.allclose(ours[1:], torch.tensor(expected[1:]), rtol=1e-3)
    lines = probe.epipolar_error(a, b, depth, *cameras)
    assert torch.allclose(lines, torch.tensor(distances).float(), rtol=1e-3, atol=1e-3) and (lines <= ours + 1e-3).all()


def test_views_from_one_place_are_scored_without_an_epipolar_line(views, monkeypatch):
    for distance, turned in ((0, True), (4e-6, True), (1e-3, False)):  # up to the rounding of a position
        a, b = torch.eye(4), torch.eye(4)
        a[:3, 3] = b[:3, 3] = torch.tensor([4.0, -7.0, 1.0])
        b[0, 3] += distance
        assert probe.only_turned(a, b) == turned
    c2w = views.c2w.clone()
    c2w[1, :3, 3] = c2w[0, :3, 3] + 1e-7
    monkeypatch.setattr(probe, "epipolar_error", lambda *_: pytest.fail("rounding gave a line"))
    tokens = probe.Features(None, randn(len(c2w), 6, 8, 3))
    assert len(probe.match_pair(tokens, views._replace(c2w=c2w), probe.Pair(0, 1, 20.0, False), "cpu").error) == 1000


# ------------------------------------------------------------------------------------------------ features and views


def images_of(count=3, size=(24, 32)):
    return (256 * rand(count, 3, *size)).byte()


def test_features_are_those_of_the_last_block_or_after_the_norm(tmp_path):
    images, vit, kept = images_of(), lift.load_vit("tiny"), []
    vit.blocks[-1].register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.no_grad():
        tokens = vit(images.float() / 255)
    block, norm = (probe.extract("tiny", images, layer, tmp_path, "cpu") for layer in ("block", "norm"))
    assert block.patches.shape == (3, 3, 4, 192) and block.cls.shape == (3, 192)
    for ours, theirs in ((block.patches[:].flatten(1, 2), kept[0][:, 1:]), (block.cls[:], kept[0][:, 0]),
                         (norm.patches[:].flatten(1, 2), tokens.patches), (norm.cls[:], tokens.cls)):
        assert torch.allclose(ours.float(), theirs, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(block.patches[:], norm.patches[:], atol=0.1)
    images = images_of(2, (36, 44))  # 4.5 and 5.5 patches: rescaled to even numbers, 4 and 6
    with torch.no_grad():
        x = vit(F.interpolate(images.float() / 255, (32, 48), mode="bilinear", antialias=True)).patches
    ours = probe.extract("tiny", images, "norm", tmp_path, "cpu").patches
    assert torch.allclose(ours[:].float(), x.unflatten(1, (4, 6)), rtol=2e-3, atol=2e-3)


def test_models_have_names_and_stand_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c++/lr=1").mkdir(parents=True)
    for path, parts in (("c++/lr=1", ["c++/lr=1"]), ("tiny+tiny", ["tiny", "tiny"]), ("nowhere", ["nowhere"])):
        assert probe.parts_of(path) == parts
    args = probe.parse(["--models", "start=tiny", "dense=a/student", "c++/lr=1", "both=tiny+b"])
    assert args.models == {"start": "tiny", "dense": "a/student", "c++/lr=1": "c++/lr=1", "both": "tiny+b"}
    for wrong in (["--models", "tiny", "tiny"], "--crop 1 0 0 1".split()):
        with pytest.raises(SystemExit):
            probe.parse(wrong)


def test_the_second_time_a_model_sees_mirrored_images(tmp_path):
    images, pick = images_of(), torch.tensor([2, 0])
    both = probe.extract("tiny+tiny", images, "block", tmp_path, "cpu")
    single = probe.extract("tiny", images, "block", tmp_path, "cpu")
    mirrored = probe.extract("tiny", images.flip(3), "block", tmp_path, "cpu")
    assert torch.equal(both.patches[pick], torch.cat([single.patches[pick], mirrored.patches[pick].flip(2)], -1))
    assert torch.equal(both.cls[:], torch.cat([single.cls[:], mirrored.cls[:]], -1)) and both.cls.shape == (3, 384)


def test_place_share_finds_what_is_tied_to_a_place():
    views, h, w, C = 400, 6, 8, 5
    clean = randn(views, h, w, C)
    assert max(map(abs, probe.place_share(clean).values())) < 0.2  # without the correction it would be 0.25
    y = torch.linspace(-1, 1, h).view(h, 1, 1)
    smooth = probe.place_share(clean + y)  # variance 1 of the tokens, 7/15 of the places
    assert abs(smooth["all"] - 100 * (7 / 15) / (22 / 15)) < 1 and abs(smooth["rough"]) < 0.2
    rough = probe.place_share(clean + randn(1, h, w, C, seed=1))
    assert 45 < rough["all"] < 55 and 30 < rough["rough"] < rough["all"]


def test_what_is_asked_for_reaches_the_probes(tmp_path, monkeypatch):
    write_plain(tmp_path / "flat", 12)
    seen = []

    def fake(tokens, truth, val_tokens, val_truth, recipe, *more):
        seen.append((len(tokens.patches), len(truth), len(val_tokens.patches), len(val_truth), recipe.seed, *more))
        return {"RMSE": 1.0}, lambda tokens: val_truth[:]

    def extract(path, images, layer, *_):
        seen.append(layer)
        return probe.Features(torch.zeros(len(images), 3), torch.zeros(len(images), 2, 2, 3))
    monkeypatch.setattr(probe, "extract", extract)
    monkeypatch.setattr(probe, "PROBES", {"depth": fake, "segmentation": fake})
    changed = ["--layer", "norm", "--seed", "3", "--no_cls"]
    for flags, layer, seed, with_cls in (([], "block", 0, True), (changed, "norm", 3, False)):
        args = asked_of(tmp_path / "flat", tmp_path / "out", "--models", "tiny", *flags)
        probe.probe(*probe.open_data(args), args)
        assert seen == [layer, layer, (11, 11, 1, 1, seed, with_cls), (11, 11, 1, 1, seed)], seen
        seen.clear()


def test_arrays_on_disk_are_indexed_as_tensors_are(tmp_path):
    x = randn(5, 3, 2).half()
    make = lambda first, last: {"a": x[first:last]}
    rows = probe.on_disk(tmp_path / "x", {"a": ((3, 2), torch.float16)}, 5, make, "x")["a"]
    pick = torch.tensor([4, 0, 0])
    for which in (2, -1, slice(1, 4), pick, pick[:1], torch.tensor(3), (pick, torch.tensor([0, 2, 1]))):
        assert torch.equal(rows[which], x[which]), which
    assert torch.equal(torch.stack(list(rows)), x) and rows.shape == x.shape and len(rows) == 5
    with pytest.raises(data.DataError, match="y do not fit"):
        probe.on_disk(tmp_path / "y", {"a": ((10**9, 10**6), torch.float16)}, 5, make, "y")


def test_features_are_cached_by_content_and_resumed(tmp_path, monkeypatch):
    images, computed, on_disk = images_of(7), [], probe.on_disk

    def counting(stem, columns, count, make, what, at_once):
        counted = lambda first, last: computed.append(min(last, count) - first) or make(first, last)
        return on_disk(stem, columns, count, counted, what, 2)
    monkeypatch.setattr(probe, "on_disk", counting)
    get = lambda *how, model="tiny": probe.extract(model, *(how or (images, "block")), tmp_path, "cpu").patches[:]
    first = get()
    assert torch.equal(get(), first) and sum(computed) == 7  # not computed again
    for spoil, again in ((lambda f: f.write_bytes(f.read_bytes()[:-50]), 1), (Path.unlink, 7)):  # cut off, lost
        computed.clear()
        spoil(next(tmp_path.glob("*.patches")))
        assert torch.equal(get(), first) and sum(computed) == again
    vit = lift.load_vit("tiny")
    vit.blocks[3].mlp.fc1.bias.data[5] += 1e-3
    lift.save_vit(vit, tmp_path / "other")
    get(images, "norm"), get(images.flip(0), "block"), get(model=str(tmp_path / "other"))
    assert len(list(tmp_path.glob("*.patches"))) == 4  # another layer, other images, another weight


def test_models_of_other_patches_see_the_same_views_and_do_not_concatenate(tmp_path, rooms_dir):
    other = lift.VisionTransformer(patch=10, dim=64, depth=1, heads=1, grid=4)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.05)
    lift.save_vit(other, tmp_path / "other")
    features = probe.extract(str(tmp_path / "other"), images_of(), "block", tmp_path, "cpu")
    assert features.patches.shape == (3, 2, 3, 64)  # 24x32 is rescaled to 20x30
    asked = lambda *models: asked_of(rooms_dir, tmp_path, "--views", "1", "--models", *models)
    with pytest.raises(ValueError, match="patches of 8 and 10 pixels"):
        probe.open_data(asked(f"tiny+{tmp_path / 'other'}"))
    with pytest.raises((ValueError, data.DataError), match="nowhere"):  # before the first model has been probed
        probe.open_data(asked("tiny", "nowhere.pth"))


def write_plain(root, count, size=(40, 60), seed=0):
    rng = np.random.default_rng(seed)
    for kind in ("images", "depth", "labels"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(256, 90 * 256, size).astype(np.uint16)).save(root / "depth" / f"{i}.png")
        Image.fromarray(rng.integers(0, 3, size, np.uint8)).save(root / "labels" / f"{i}.png")


def asked_of(folder, out, *flags):
    return probe.parse(["--scene_dir", str(folder), "--out", str(out), *flags])


def test_images_without_poses(tmp_path, capsys):
    write_plain(tmp_path / "flat", 24)
    flags = "--depth_scale 0.00390625 --max_depth 80 --pixels 2400 --crop 0.25 1 0 0.5 --ignore_label 0".split()
    args = asked_of(tmp_path / "flat", tmp_path / "out", *flags)
    train, val = probe.open_split(args)
    assert [f.name for f in val[0].frames] == ["7", "15", "23"] and len(train[0]) == 21
    views, whole = probe.store_views(val, (40, 60), args), probe.store_views(train, (40, 60), args, "train")
    assert len(whole.images) == 21 and (whole.depth[0][:10] > 0).any()  # all images; --crop is for scores alone
    stored = np.array(Image.open(tmp_path / "flat/depth/7.png")).astype(float) / 256
    stored[(stored > 80)] = 0
    stored[:10], stored[:, 30:] = 0, 0
    assert np.allclose(views.depth[0], stored) and (stored > 0).sum() > 500 and (views.normal == 0).all()
    label = np.array(Image.open(tmp_path / "flat/labels/7.png"))
    assert (views.label[0][10:, :30].numpy() == np.where(label == 0, 255, label)[10:, :30]).all()
    assert (views.label[0][:10] == 255).all()
    for other in ("--depth_scale 0.001", "--crop 0 1 0 1"):  # no other way to read them finds these on disk
        args2 = asked_of(tmp_path / "flat", tmp_path / "out", *flags, *other.split())
        found = probe.store_views(probe.open_split(args2)[1], (40, 60), args2)
        assert not torch.equal(found.depth[0], views.depth[0])
    _, train, val, pairs = probe.open_data(args)
    assert not pairs and list(probe.truths(train, val)) == ["depth", "segmentation"]
    write_plain(tmp_path / "halves/train", 3, (40, 40))
    write_plain(tmp_path / "halves/val", 2)
    args = asked_of(tmp_path / "halves", tmp_path / "out")
    assert [len(part[0]) for part in probe.open_split(args)] == [3, 2]
    shutil.rmtree(tmp_path / "halves/val/labels")
    assert list(probe.truths(*probe.open_data(args)[1:3])) == ["depth"]
    assert "segmentation: left out, as only training views have its truth" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "halves/val/images")
    with pytest.raises(data.DataError, match="0 images in images/"):
        probe.open_split(args)


def test_the_crop_of_evaluation_is_that_of_all_maps(crooked, tmp_path):
    views = probe.store_views(crooked[:1], (48, 64), probe.parse(["--out", str(tmp_path), *"--crop 0.5 1 0 1".split()]))
    for truth, unknown in ((views.depth[0], 0), (views.normal[0].abs().sum(-1), 0), (views.label[0], 255)):
        assert (truth[:24] == unknown).all() and (truth[24:] != unknown).any()


def test_views_are_spread_and_scenes_split(rooms_dir, rooms, tmp_path):
    args = asked_of(rooms_dir, tmp_path, "--views", "3")
    train, val = probe.open_split(args)
    for part, name in ((train, "train"), (val, "val")):
        assert [s.name for s in part] == [s.name for s in data.split(rooms, name)]
    assert val and not {s.name for s in train} & {s.name for s in val}
    assert [i for _, i in probe.store_views(val, (48, 64), args).where] == [0, 6, 11] * len(val)
    truth = torch.zeros(32, 4, 4)
    truth[2] = 1.0
    assert probe.shown_views(truth).tolist() == [0, 10, 21, 31]
    assert probe.shown_views(truth, 0).tolist() == [2]  # pictures show views of which something is known


@pytest.mark.parametrize("value, kind", [(65535, "png"), (-1, "npy"), (40_000, "png")])
def test_labels_are_ids_or_unknown(tmp_path, value, kind):
    write_plain(tmp_path / "plain", 4)
    path = tmp_path / "plain/labels/0.png"
    ids = np.array(Image.open(path)).astype(np.int32)
    ids[0] = value
    path.unlink()
    np.save(path.with_suffix(".npy"), ids) if kind == "npy" else Image.fromarray(ids.astype(np.uint16)).save(path)
    args = asked_of(tmp_path / "plain", tmp_path / "out")
    if value == 40_000:
        with pytest.raises(data.DataError, match="class 40000; labels are ids"):
            probe.open_data(args)
    else:  # common for "ignore"
        assert (probe.open_data(args)[1].label[0][0] == 255).all()


def test_pairs_without_depth_are_scored_by_epipolar_lines(tmp_path, rooms):
    lines, scene = [], rooms[0]
    (tmp_path / "images").mkdir()
    for a, b in ((0, 1), (2, 5), (8, 9)):
        for i in (a, b):
            shutil.copy(scene.frames[i].image, tmp_path / "images" / f"{i}.png")
        a_to_b = np.linalg.inv(scene.frames[b].c2w) @ scene.frames[a].c2w
        if a == 8:  # a list's pairs are taken as they are: these look away from each other
            a_to_b = np.diag([-1.0, 1, -1, 1])
            a_to_b[2, 3] = -1
        numbers = [0, 0, *scene.frames[a].K.ravel(), *scene.frames[b].K.ravel(), *a_to_b.ravel()]
        lines.append(f"{a}.png {b}.png " + " ".join(f"{x:.6f}" for x in numbers))
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    args = asked_of(tmp_path / "pairs.txt", tmp_path / "out", "--models", "tiny")
    models, train, val, pairs = probe.open_data(args)
    assert train is None and [(p.a, p.b) for p in sorted(pairs)] == [(0, 1), (2, 3), (4, 5)]
    assert not any(p.measured for p in pairs)
    truth = scene.view(0, (96, 128))
    points, _, z = probe.sample_points(torch.zeros(12, 16, 1), truth.depth)
    seen = F.pad(points, (0, 1), value=1.0) @ torch.linalg.inv(val.K[0]).T * z[:, None]
    a_to_b = torch.linalg.inv(val.c2w[1]) @ val.c2w[0]
    seen = (seen @ a_to_b[:3, :3].T + a_to_b[:3, 3]) @ val.K[1].T
    true = seen[:, :2] / seen[:, 2:]
    assert probe.epipolar_error(points, true, None, val.K[0], val.K[1], a_to_b).max() < 0.05  # on the lines
    (tmp_path / "out/depth.png").write_bytes(b"of an earlier run on other data")
    table = probe.report(probe.probe(models, train, val, pairs, args), train, val, pairs, args)
    assert not (tmp_path / "out/depth.png").exists() and (tmp_path / "out/matches.png").exists()
    assert "No depth" in table and "epipolar recall 10 px" in table and "RMSE" not in table
    assert probe.table({"a": {"correspondence": {}}}, probe.COLUMNS).split() == "| | | --- | | a |".split()


# ------------------------------------------------------------------------------------------------ tables and the script


def test_the_best_model_is_bold_and_the_baseline_never():
    scores = {name: {"depth": {"RMSE": x}} for name, x in (("no features", 0.1), ("a", 0.5), ("b", 0.4))} | {"c": {}}
    assert probe.table(scores, probe.COLUMNS) == """
|             | RMSE ↓    |
| ---         | ---       |
| no features | 0.100     |
| a           | 0.500     |
| b           | **0.400** |
| c           |           |""".strip()


def test_the_script(rooms_dir, tmp_path):
    command = ["--scene_dir", rooms_dir, "--out", tmp_path, "--models", "tiny", "twice=tiny+tiny", "--max_steps", "60",
               "--views", "6", "--pairs", "1", "--device", "cpu"]
    printed = stopping.script("05_probe", *command)
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line[1:].split("|")[0].strip() for line in lines] == ["", "---", "no features", "tiny", "twice"]
    assert str(tmp_path / "report.html") in printed and "Place share: tiny " in printed
    result = json.loads((tmp_path / "results.json").read_text())
    scores = result["scores"]
    assert scores["tiny"]["segmentation"]["mIoU"] > scores["no features"]["segmentation"]["mIoU"] + 3
    assert scores["tiny"]["correspondence"]["10 px"] > scores["no features"]["correspondence"]["10 px"] + 5
    assert scores["twice"].keys() == {"depth", "normals", "segmentation", "correspondence"}
    assert scores["tiny"].keys() == {*scores["twice"], "place share"}
    assert any("depth: Recipe(steps=60" in line and "paper: Recipe(steps=307200" in line for line in result["settings"])
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 5 and "Recall by degrees that the camera turns" in page
    assert "http:" not in page and "https:" not in page  # opens offline
    assert f"{scores['tiny']['depth']['RMSE']:.3f}" in page and result["command"] in page
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line.get("head") == "segmentation"]
    assert losses[2] < losses[0] and len(losses) == 6


def test_a_score_does_not_depend_on_the_resolution_at_which_masks_are_evaluated():
    scores = []
    for times in (1, 2, 4):
        tokens, truth = readable("segmentation", (24 * times, 32 * times))
        scores.append(probe.segmentation_probe(*halves(tokens, truth), RUNS["segmentation"][1])[0]["mIoU"])
    assert min(scores) > 85 and max(scores) - min(scores) < 1, scores
