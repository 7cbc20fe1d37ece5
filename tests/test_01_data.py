"""01_data by geometry: real scenes against independently measured figures, rooms against a float64 reference, camera
models against their definition, folders as people have them, and what can be wrong with one (as in test_hostile.py)."""
import argparse
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

data = importlib.import_module("01_data")
room_maker = importlib.import_module("tiny.rooms")

REAL = Path(__file__).parents[2] / "shared" / "data"
GL = np.diag([1.0, -1.0, -1.0, 1.0])


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no real scene: {REAL / name} is absent")
    return REAL / name


def tree(folder):  # -> {path: bytes digest} of everything below
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(folder.rglob("*"))}


def numbers(view):  # -> K, c2w in float64
    return view.K.double().numpy(), view.c2w.double().numpy()


# -------------------------------------------------------------------------------------------------- scenes made by hand


five = lambda form: [form.format(i) for i in range(5)]
NAMES, IN_IMAGES = five("{}.png"), five("images/{}.png")
LENS = np.array([[30.0, 0, 16], [0, 31, 12], [0, 0, 1]])


def pose(i):  # OpenCV camera-to-world: along x, looking along z
    c2w = np.eye(4)
    c2w[0, 3] = 0.1 * i
    return c2w


def placed(c2w):
    return dict(transform_matrix=(c2w @ GL).tolist())


def save(folder, meta, name="transforms.json"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    return meta


def describe(folder, names, file="transforms.json", size=(24, 32), zoom=1.0, more=lambda i: {}, **meta):
    """transforms.json for pictures of this size, `zoom` times as large; `more` is what is said of frame i besides."""
    frames = [dict(file_path=name) | placed(pose(i)) | more(i) for i, name in enumerate(names)]
    K, (h, w) = zoom * LENS, (zoom * n for n in size)
    meta = dict(fl_x=K[0, 0], fl_y=K[1, 1], cx=K[0, 2], cy=K[1, 2], w=w, h=h, frames=frames) | meta
    return save(folder, meta, file)


def write_scene(folder, count=4, size=(24, 32), kind="png", **how):
    """Noise pictures and their `describe`, whose contents it returns for the test to spoil and `save`."""
    names = [f"images/{i}.{kind}" for i in range(count)]
    write_maps(folder, names, *np.random.default_rng(0).integers(0, 256, (count, *size, 3)).astype(np.uint8))
    return describe(folder, names, size=size, **how)


def write_maps(folder, names, *arrays):  # the arrays in turn
    for n, array in zip(names, itertools.cycle(arrays)):
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / n, array) if n.endswith(".npy") else Image.fromarray(array).save(folder / n)


def only_scene(folder, **options):
    (scene,) = data.load_scenes(folder, **options)
    return scene


COLMAP_IDS = dict(SIMPLE_PINHOLE=0, PINHOLE=1, SIMPLE_RADIAL=2, RADIAL=3, OPENCV=4)


def write_colmap(folder, model, params, size, names, points, poses, text=False, shown=(1,), place="sparse/0"):
    """A COLMAP model from its format description; one camera, a track of two a point, `shown` points in each image."""
    sparse = folder / place
    sparse.mkdir(parents=True)
    if text:
        (sparse / "cameras.txt").write_text(f"# cameras\n7 {model} {size[1]} {size[0]} {' '.join(map(repr, params))}\n")
        lines = [f"{i + 1} {' '.join(map(repr, [*q, *t]))} 7 {n}\n1.0 2.0 -1 3.0 4.0 1\n"
                 for i, (n, (q, t)) in enumerate(zip(names, poses))]
        (sparse / "images.txt").write_text("# images\n" + "".join(lines))
        lines = [f"{i} {' '.join(map(repr, p))} 1 2 3 0.5 1 0 2 1\n" for i, p in enumerate(points)]
        (sparse / "points3D.txt").write_text("# points\n" + "".join(lines))
        return
    camera = struct.pack(f"<QiiQQ{len(params)}d", 1, 7, COLMAP_IDS[model], size[1], size[0], *params)
    (sparse / "cameras.bin").write_bytes(camera)
    seen = struct.pack("<Qddq", 1 + len(shown), 1, 2, -1) + b"".join(struct.pack("<ddq", 3, 4, n) for n in shown)
    images = b"".join(struct.pack("<i7di", i + 1, *q, *t, 7) + n.encode() + b"\0" + seen
                      for i, (n, (q, t)) in enumerate(zip(names, poses)))
    (sparse / "images.bin").write_bytes(struct.pack("<Q", len(names)) + images)
    tracks = b"".join(struct.pack("<Q3d3BdQ4i", i, *p, 1, 2, 3, 0.5, 2, 1, 0, 2, 1) for i, p in enumerate(points))
    (sparse / "points3D.bin").write_bytes(struct.pack("<Q", len(points)) + tracks)


# ---------------------------------------------------------------------------------------------------- rooms: files


def test_same_seed_same_bytes_and_an_interrupted_call_is_completed(tmp_path):
    make = lambda name, seed=3: data.make_rooms(tmp_path / name, scenes=2, views=3, size=(12, 16), seed=seed)
    make("a"), make("b"), make("other", seed=4)
    whole = tree(tmp_path / "a")
    assert len(whole) == 1 + 2 * (1 + 1 + 5 * (1 + 3))  # rooms.json; each room: itself, transforms.json, 5 folders of 3
    assert tree(tmp_path / "b") == whole
    other = tree(tmp_path / "other")
    assert other.keys() == whole.keys()
    assert all(other[f] != whole[f] for f in whole if "/images/" in f or f.endswith(".json"))

    shutil.rmtree(tmp_path / "b/room_001")  # interrupted in the second room: a hidden, half-written folder is left
    (tmp_path / "b/.room_001.99/images").mkdir(parents=True)
    (tmp_path / "b/.room_001.99/images/000.png").write_bytes(b"half")
    kept = (tmp_path / "b/room_000/transforms.json").stat().st_mtime_ns
    data.open_scenes(tmp_path / "b")
    assert tree(tmp_path / "b") == whole
    assert (tmp_path / "b/room_000/transforms.json").stat().st_mtime_ns == kept  # finished rooms are not made again
    shutil.rmtree(tmp_path / "b/room_000")
    make("b")
    assert tree(tmp_path / "b") == whole


@pytest.mark.parametrize("file, content, settings, words", [
    ("", "", dict(seed=1), "other settings"), ("", "", dict(views=4), "other settings"),
    ("", "", dict(size=(16, 16)), "other settings"), ("thesis.txt", "mine", {}, "not empty"),
    ("rooms.json", "", {}, "rooms.json"), ("rooms.json", "[]", {}, "rooms.json")])
def test_rooms_are_not_written_over_anything(tmp_path, file, content, settings, words):
    first = dict(scenes=1, views=3, size=(12, 16), seed=0)
    if file:
        (tmp_path / file).write_text(content)
    else:
        data.make_rooms(tmp_path, **first)
    before = tree(tmp_path)
    with pytest.raises(data.DataError, match=words) as error:
        data.make_rooms(tmp_path, **first | settings)
    assert "\n" not in str(error.value) and tree(tmp_path) == before


@pytest.mark.parametrize("folder", ["data", "data_small", "data_probe"])
def test_missing_data_folders_are_filled_with_their_rooms(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.BUILT_IN, folder, dict(scenes=2, views=3, size=(12, 16), seed=0))
    assert len(data.open_scenes(folder)) == 2
    assert capsys.readouterr().out.splitlines() == [f"no data yet: writing 2 built-in rooms of 3 views to {folder}/"]
    before = (tmp_path / folder / "rooms.json").stat().st_mtime_ns
    assert len(data.open_scenes(tmp_path / folder)) == 2 and capsys.readouterr().out == ""
    assert (tmp_path / folder / "rooms.json").stat().st_mtime_ns == before  # reading writes nothing
    with pytest.raises(data.DataError, match="no such folder"):
        data.open_scenes("elsewhere")


# ---------------------------------------------------------------------------------------------------- rooms: truth


@np.errstate(divide="ignore", invalid="ignore")
def reference_cast(origin, rays, room):
    """Every surface of a room as planes and quadrics in world space, float64 -> t, outward normal, instance, label."""
    size, prims, _, _ = room
    best, normal = np.full(len(rays), np.inf), np.zeros_like(rays)
    instance, label = np.zeros((2, len(rays)), int)
    plane = lambda point, normal: ((point - origin) @ normal) / (rays @ normal)

    def quadric(centre, M):  # both roots of (p - c)^T M (p - c) = 1
        o = origin - centre
        a, b, c = np.einsum("pi,ij,pj->p", rays, M, rays), rays @ M @ o, o @ M @ o - 1
        root = np.sqrt(b * b - a * c)
        return (-b - root) / a, (-b + root) / a

    def offer(t, n, valid, which, kind):
        closer = valid & (t > 1e-3) & (t < best)
        best[closer], instance[closer], label[closer] = t[closer], which, kind
        normal[closer] = np.broadcast_to(n, rays.shape)[closer]

    for axis in range(3):
        for side in (0, 1):
            n = (1 - 2 * side) * np.eye(3)[axis]  # into the room
            which, kind = (3 + 2 * axis + side, 2) if axis < 2 else (1 + side, side)
            offer(plane(side * size, n), n, True, which, kind)
    for kind, centre, half, yaw, which, name in zip(*prims[:6]):
        # own axes -> world
        R = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
        for axis in range(3) if kind == room_maker.BOX else (2,) if kind == room_maker.CYLINDER else ():
            for side in (-1, 1):
                n = side * R[:, axis]
                t = plane(centre + half[axis] * n, n)
                own = ((origin + rays * t[:, None] - centre) @ R) / half
                flat = (np.abs(np.delete(own, axis, 1)) <= 1).all(1)
                within = flat if kind == room_maker.BOX else (own[:, :2] ** 2).sum(1) <= 1
                offer(t, n, within, which, name)
        if kind != room_maker.BOX:
            M = R @ np.diag(half**-2.0 * ([1, 1, 1] if kind == room_maker.SPHERE else [1, 1, 0])) @ R.T
            for t in quadric(centre, M):
                at = origin + rays * np.nan_to_num(t)[:, None] - centre
                n = at @ M
                within = np.isfinite(t) & ((kind == room_maker.SPHERE) | (np.abs(at[:, 2]) <= half[2]))
                offer(t, n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-12), within, which, name)
    return best, normal, instance, label


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_rooms_are_exact(rooms, rooms_dir, index):
    scene, room = rooms[index], room_maker.make_room(np.random.default_rng([0, index]))
    folder = rooms_dir / f"room_{index:03d}"
    for i in (0, 5, 11):
        frame, view = scene.frames[i], scene.view(i)
        height, width = frame.size
        y, x = np.mgrid[:height, :width] + 0.5
        (fx, _, cx), (_, fy, cy), _ = frame.K
        rays = np.stack([(x - cx) / fx, (y - cy) / fy, np.ones_like(x)], -1).reshape(-1, 3)
        t, normal, instance, label = reference_cast(frame.c2w[:3, 3], rays @ frame.c2w[:3, :3].T, room)
        stored = np.array(Image.open(folder / f"normals/{i:03d}.png"), float).reshape(-1, 3)
        normal = normal @ frame.c2w[:3, :3]
        right = (view.mask.numpy().ravel() == instance) & (view.label.numpy().ravel() == label)
        assert (~right).sum() <= 2  # an edge that passes through a pixel's centre may round either way
        # Stored to a millimetre and to 8 bits. Rays are float32, which on legs of 3 cm adds 0.1 mm and half a step.
        depth_off = np.abs(view.depth.numpy().ravel() - t)[right]
        normal_off = np.abs(stored - (normal + 1) * 127.5).max(1)[right]
        assert depth_off.max() < 0.6e-3 and (depth_off < 0.502e-3).mean() > 0.999
        assert normal_off.max() < 1.0 and (normal_off < 0.51).mean() > 0.998
        read = view.normal.reshape(-1, 3).double().numpy()
        assert np.abs(np.linalg.norm(read, axis=1) - 1).max() < 1e-5
        assert np.abs(read - normal)[right].max() < 0.015 and ((read * rays).sum(1) < 0.02).all()  # towards the camera
        assert len(np.unique(instance)) > 3


def unproject(view, step=1):  # -> (M, 3) world points of the pixels with depth, (M,) mask id
    K, c2w = numbers(view)
    depth = view.depth.numpy()[::step, ::step].astype(float)
    y, x = (np.mgrid[: view.depth.shape[0], : view.depth.shape[1]] + 0.5)[:, ::step, ::step]
    points = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], -1) * depth[..., None]
    ids = view.mask.numpy()[::step, ::step] if view.mask is not None else np.zeros(depth.shape, int)
    return points[depth > 0] @ c2w[:3, :3].T + c2w[:3, 3], ids[depth > 0]


def land(points, view):  # -> z in the view, its own depth there (0 outside), its mask id there
    K, c2w = numbers(view)
    w2c = np.linalg.inv(c2w)
    p = points @ w2c[:3, :3].T + w2c[:3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.floor(p[:, 0] / p[:, 2] * K[0, 0] + K[0, 2]), np.floor(p[:, 1] / p[:, 2] * K[1, 1] + K[1, 2])
        inside = (p[:, 2] > 0) & (x >= 0) & (y >= 0) & (x < view.depth.shape[1]) & (y < view.depth.shape[0])
    col, row = np.where(inside, x, 0).astype(int), np.where(inside, y, 0).astype(int)
    ids = view.mask.numpy()[row, col] if view.mask is not None else np.zeros(len(p), int)
    return p[:, 2], np.where(inside, view.depth.numpy()[row, col], 0), ids * inside


def test_rooms_are_plausible():
    labels, patterns = set(), np.zeros((10, 6))
    for index in range(60):
        size, prims, _, walk = room_maker.make_room(np.random.default_rng([0, index]))
        cameras, look_at = walk.cameras(400)
        assert (cameras > 0.2).all() and (cameras < size - 0.2).all()
        assert np.linalg.norm(np.diff(cameras, axis=0), axis=1).max() < 0.05  # smooth
        assert (np.linalg.norm(look_at - cameras, axis=1) > 0.3).all()
        assert (prims.centre > 0).all() and (prims.centre < size).all()
        for instance in set(prims.instance[prims.label != room_maker.CLASSES.index("picture")].tolist()):
            of = prims.instance == instance
            assert abs((prims.centre[of, 2] - prims.half[of, 2]).min()) < 1e-9  # stands on the floor
        reach = np.hypot(*prims.half[:, :2].T)  # no camera within a part, whatever its yaw
        apart = np.linalg.norm(cameras[:, None, :2] - prims.centre[:, :2], axis=2) > reach
        assert (apart | (cameras[:, None, 2] > prims.centre[:, 2] + prims.half[:, 2]) | (prims.label == 9)).all()
        np.add.at(patterns, (prims.label, prims.texture[:, 0].astype(int)), 1)
        labels |= {0, 1, 2, *prims.label.tolist()}
    assert labels == set(range(10))
    expected = patterns[3:].sum(1, keepdims=True) / 6
    assert (((patterns[3:] - expected) ** 2 / expected).sum(1) < 25).all()  # no class has textures of its own


# ---------------------------------------------------------------------------------------------------- real data: depth


def depth_disagreement(views, gap, wrong=None):
    """Relative depth error of all pixels with both depths, both ways, pairs at `gap`; `wrong` misreads the poses."""
    errors = []
    for a, b in [(i, i + gap) for i in range(len(views) - gap)]:
        v, w = views[a], views[b]
        if wrong:
            v, w = (u._replace(c2w=torch.from_numpy(wrong(numbers(u)[1]))) for u in (v, w))
        z, depth, _ = land(unproject(v, step=3)[0], w)
        errors.append(np.abs(z - depth)[depth > 0] / depth[depth > 0])
    return float(np.median(np.concatenate(errors)))


@pytest.mark.parametrize("layout", [".", "original"])
def test_7scenes_depth_agrees_as_measured(layout):
    scene = only_scene(real("rgbd_7scenes_redkitchen") / layout)
    assert len(scene) == 30 and scene.kinect == (layout == "original")
    views = [scene.view(i) for i in range(30)]
    measured = [depth_disagreement(views, gap) for gap in (1, 2, 4)]
    print(f"\n7-Scenes {layout}: relative depth error at gaps 1, 2, 4:", measured)
    assert measured == pytest.approx([0.0040, 0.0055, 0.0073], rel=0.15)  # README
    assert 0.70 < np.mean([float((v.depth > 0).float().mean()) for v in views]) < 0.76  # README: valid 73 %
    assert depth_disagreement(views[:12], 4, np.linalg.inv) > 0.10  # camera-to-world taken as world-to-camera
    assert depth_disagreement(views[:12], 4, lambda c2w: c2w @ GL) > 0.10  # OpenGL axes taken as OpenCV's
    if layout == "original":
        raw = [v._replace(depth=torch.from_numpy(np.array(Image.open(f.depth)) * 1e-3))
               for v, f in zip(views, scene.frames)]
        raw = [v._replace(depth=v.depth * (v.depth < 60)) for v in raw]
        assert depth_disagreement(raw, 1) > 1.3 * measured[0]  # depth that is not registered is not this camera's


def test_registered_depth_keeps_the_nearest_surface():
    depth = np.full((480, 640), 2.0, np.float32)
    depth[150:300, 200:400] = 1.0
    depth[:, 500:] = 0  # not measured
    seen = data.register_kinect_depth(depth)
    near, known = np.abs(seen - 1) < 0.05, seen > 0
    for row in range(180, 240):  # it hides the wall behind it, and is 525 / 585 * 200 pixels wide
        at = np.nonzero(near[row])[0]
        assert 175 <= len(at) <= 185 and not (known & ~near)[row, at[0]:at[-1]].any()
    assert 0.5 < known.mean() < 0.8 and not known[:, 600:].any()


def test_apc_shelf_depth_and_instances_agree_as_measured():
    scene = only_scene(real("rgbd_instances_apc_shelf"))
    views = [scene.view(i) for i in range(15)]
    assert set(torch.cat([v.mask.unique() for v in views]).tolist()) == {0, 48, 114, 132, 144}
    errors, agree = [], []
    for points, own in (unproject(view, step=2) for view in views):
        for other in views:
            z, depth, ids = land(points, other)
            errors.append(np.abs(z - depth)[depth > 0] / depth[depth > 0])
            near = (depth > 0) & (np.abs(z - depth) < 0.02 * depth) & (own > 0)
            agree.append((ids == own)[near & (ids > 0)])
    errors = [e for e in errors if len(e) and np.median(e) > 1e-6]  # not of a view with itself
    assert abs(np.median([np.median(e) for e in errors]) - 0.0109) < 0.15 * 0.0109  # README: 1.09 %
    assert np.concatenate(agree).mean() > 0.99  # README: 99.6 %


# -------------------------------------------------------------------------------------------- real data: masks, COLMAP


def read_observations(path):  # images.bin -> [(name, quaternion, t, camera, (N, 2) pixels, (N,) point ids)]
    blob, at, found = path.read_bytes(), 8, []
    for _ in range(struct.unpack_from("<Q", blob)[0]):
        head = struct.unpack_from("<i7di", blob, at)
        end = blob.index(b"\0", at + 64)
        count = struct.unpack_from("<Q", blob, end + 1)[0]
        listed = np.frombuffer(blob, np.dtype([("xy", "<2f8"), ("id", "<i8")]), count, end + 9)
        found.append((blob[at + 64:end].decode(), np.array(head[1:5]), np.array(head[5:8]), head[8], listed["xy"],
                      listed["id"]))
        at = end + 9 + 24 * count
    return found


@pytest.mark.parametrize("model, expected", [("sparse/0", 0.296), ("sparse_distorted_bin", 0.897)])
def test_colmap_reprojection_error_is_as_measured(model, expected):
    model = real("colmap_bartoszek_statue") / model
    cameras, poses, points = data.colmap_binary(model)
    assert len(cameras) == len(poses) == 23
    errors, observed = [], read_observations(model / "images.bin")
    for (name, camera, q, t, seen), (name2, q2, t2, camera2, xy, ids) in zip(poses, observed):
        assert name == name2 and camera == camera2 and (q == q2).all() and (t == t2).all() and seen == ids.tolist()
        K, size, distortion = data.colmap_camera(*cameras[camera], model)
        if "distorted" in model.name:
            assert cameras[camera][0] == "SIMPLE_RADIAL" and size == (2006, 3031) and distortion[2] != 0
        p = np.array([points[k] for k in ids[ids >= 0]]) @ data.rotation_of(q).T + t
        frame = data.Frame(name, None, K, None, size, distortion)
        straight = p @ K.T
        x, y = data.distort(straight[:, 0] / straight[:, 2], straight[:, 1] / straight[:, 2], K, frame)
        errors.append(np.hypot(x - xy[ids >= 0, 0], y - xy[ids >= 0, 1]))
    print(f"\n{model.name}: mean reprojection error {np.concatenate(errors).mean():.3f}")
    assert np.concatenate(errors).mean() == pytest.approx(expected, abs=0.002)


# ---------------------------------------------------------------------------------------------------- lenses and sizes


def lens(model, p, X):  # COLMAP's camera models as its documentation defines them: camera points -> pixels
    p = p if model in ("PINHOLE", "OPENCV") else [p[0], *p]  # else both focal lengths are one
    fx, fy, cx, cy, k1, k2, p1, p2 = [*p, 0, 0, 0, 0][:8]
    u, v = X[0] / X[2], X[1] / X[2]
    r2 = u * u + v * v
    du = u * (k1 * r2 + k2 * r2 * r2) + 2 * p1 * u * v + p2 * (r2 + 2 * u * u)
    dv = v * (k1 * r2 + k2 * r2 * r2) + 2 * p2 * u * v + p1 * (r2 + 2 * v * v)
    return fx * (u + du) + cx, fy * (v + dv) + cy


DOTS = np.array([[x, y, 4.0] for x in (-2.4, -1.2, 0.0, 1.2, 2.4) for y in (-1.6, -0.5, 0.6, 1.7)])


def dot_picture(xs, ys):
    rows, cols = np.mgrid[:240, :320] + 0.5
    glow = sum(np.exp(-((cols - x) ** 2 + (rows - y) ** 2) / 18) for x, y in zip(xs, ys))
    return np.repeat((255 * glow.clip(0, 1))[..., None], 3, 2).round().astype(np.uint8)


def dot_offsets(view, points, radius):
    """Distances from where K and c2w put the points to the centres of mass of their dots, the border left out."""
    K, c2w = numbers(view)
    p = (points - c2w[:3, 3]) @ c2w[:3, :3] @ K.T
    offsets = []
    rows, cols = np.mgrid[: view.image.shape[1], : view.image.shape[2]] + 0.5
    for x, y in p[:, :2] / p[:, 2:]:
        if radius + 1 < x < cols.shape[1] - radius - 1 and radius + 1 < y < rows.shape[0] - radius - 1:
            weight = view.image.mean(0).double().numpy() * (np.hypot(cols - x, rows - y) < radius)
            offsets.append(math.hypot((cols * weight).sum() / weight.sum() - x,
                                      (rows * weight).sum() / weight.sum() - y))
    return np.array(offsets)


CAMERAS = [("SIMPLE_PINHOLE", (200.0, 163.0, 118.0)), ("PINHOLE", (200.0, 205.0, 163.0, 118.0)),
           ("SIMPLE_RADIAL", (200.0, 163.0, 118.0, -0.12)), ("RADIAL", (200.0, 163.0, 118.0, 0.10, -0.06)),
           ("OPENCV", (200.0, 205.0, 163.0, 118.0, 0.06, -0.09, -0.008, 0.012))]


def write_dots(folder, model, params, text=False):
    poses = []
    for i, name in enumerate(NAMES[:3]):
        a, t = 0.02 * i, np.array([0.05 * i, -0.03 * i, 0.1 * i])
        R = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])  # about y
        poses.append(((math.cos(a / 2), 0.0, math.sin(a / 2), 0.0), t.tolist()))
        write_maps(folder / "images", [name], dot_picture(*lens(model, params, R @ DOTS.T + t[:, None])))
    write_colmap(folder, model, params, (240, 320), NAMES[:3], DOTS.tolist() * 3, poses, text)


@pytest.mark.parametrize("kind", ["binary", "text", "transforms"])
@pytest.mark.parametrize("model, params", CAMERAS)
def test_cameras_put_points_where_the_picture_has_them(tmp_path, model, params, kind):
    write_dots(tmp_path, model, params, kind == "text")
    scene = only_scene(tmp_path)
    if kind == "transforms":
        frame = scene.frames[0]
        keys = dict(zip(("p1", "p2", "k1", "k2"), frame.distortion))
        keys |= dict(fl_x=frame.K[0, 0], fl_y=frame.K[1, 1], cx=frame.K[0, 2], cy=frame.K[1, 2], w=320, h=240)
        save(tmp_path, keys | dict(frames=[dict(file_path=f"images/{f.name}") | placed(f.c2w) for f in scene.frames]))
        scene = only_scene(tmp_path)
    for i in range(3):
        offsets = dot_offsets(scene.view(i), DOTS, 10)
        assert len(offsets) >= 12 and offsets.max() < 0.12
    if "PINHOLE" not in model:
        scene = only_scene(tmp_path)
        scene.frames[0].distortion = ()
        assert dot_offsets(scene.view(0), DOTS, 10).max() > 0.5


@pytest.mark.parametrize("size", [(120, 160), (100, 300), (300, 100), (480, 640), (37, 53), (241, 317)])
@pytest.mark.parametrize("model, params", [CAMERAS[1], CAMERAS[4]])
def test_any_view_size_keeps_the_geometry(tmp_path, size, model, params):
    write_dots(tmp_path, model, params)
    scene = only_scene(tmp_path)
    view, full = scene.view(1, size), scene.view(1)
    assert view.image.shape == (3, *size)
    scale = max(size[0] / 240, size[1] / 320)
    # covers, and the same both ways: not stretched
    assert float(view.K[0, 0] / full.K[0, 0]) == pytest.approx(scale, rel=1e-6)
    assert float(view.K[1, 1] / full.K[1, 1]) == pytest.approx(scale, rel=1e-6)
    offsets = dot_offsets(view, DOTS, max(2.5, 11 * scale))
    assert len(offsets) >= 4 and offsets.max() < 0.12 * max(scale, 1)


def blocks(size, rows=6, cols=8):  # -> (H, W) ids 1 ... rows * cols
    y, x = np.mgrid[: size[0], : size[1]]
    return 1 + (y * rows // size[0]) * cols + x * cols // size[1]


@pytest.mark.parametrize("distortion", [{}, dict(k1=0.08, k2=-0.05, p1=0.004, p2=-0.003)])
def test_maps_are_aligned_with_the_image(tmp_path, distortion):
    size = (96, 128)
    colours = np.random.default_rng(0).integers(40, 216, (64, 3)).astype(np.uint8)
    ids = blocks(size)
    write_scene(tmp_path, 3, size, fl_x=100.0, fl_y=101.0, cx=66.0, cy=47.0, **distortion)
    normals = np.zeros((*size, 3), np.uint8) + np.array([128, 255, 128], np.uint8)
    normals[ids == 1] = 128  # grey: unknown
    for folder, array in dict(images=colours[ids], masks=ids.astype(np.uint8), depth=(ids * 100).astype(np.uint16),
                              normals=normals, labels=np.where(ids == 2, 255, ids % 10).astype(np.uint8)).items():
        write_maps(tmp_path / folder, NAMES[:3], array)
    scene = only_scene(tmp_path)
    for want in (None, (96, 128), (48, 64), (192, 256), (60, 128), (96, 90)):
        view = scene.view(0, want)
        mask = view.mask
        assert mask.dtype == torch.int64 and view.label.dtype == torch.int64 and view.depth.dtype == torch.float32
        assert view.depth.shape == mask.shape == view.label.shape == view.image.shape[1:]
        assert view.normal.shape == (*mask.shape, 3)
        assert torch.allclose(view.depth, mask * 0.1)
        assert torch.equal(view.label, torch.where(mask == 2, 255, mask % 10))
        wanted = torch.tensor([0.0039, 1.0, 0.0039]) * (mask != 1)[..., None]
        assert torch.allclose(view.normal, wanted, atol=1e-3)
        flat = F.max_pool2d(mask[None, None].float(), 5, 1, 2) == -F.max_pool2d(-mask[None, None].float(), 5, 1, 2)
        expected = torch.from_numpy(colours).float()[mask].permute(2, 0, 1) / 255
        assert ((view.image - expected).abs().amax(0)[flat[0, 0]] < 0.03).float().mean() > 0.995
        if not distortion and want in (None, (96, 128)):
            assert torch.equal((view.image * 255).round(), (expected * 255).round())
        if not distortion and want == (192, 256):
            assert torch.equal(mask, torch.from_numpy(ids).repeat_interleave(2, 0).repeat_interleave(2, 1))
        if not distortion and want == (60, 128):  # cut at the centre
            assert torch.equal(mask, torch.from_numpy(ids)[18:78])
        mask.zero_()
        assert scene.view(0, want).mask.any()  # it was the caller's own


# -------------------------------------------------------------------------------------------------- transforms variants


def test_fisheye_files_of_scannetpp_are_passed_over(tmp_path):
    scene = tmp_path / "0a1b"
    meta = write_scene(scene / "dslr", kind="JPG")
    (scene / "dslr/transforms.json").rename(scene / "dslr/images/unused.txt")
    save(scene, meta, "dslr/nerfstudio/transforms_undistorted.json")
    save(scene, meta | dict(camera_model="OPENCV_FISHEYE"), "dslr/nerfstudio/transforms.json")
    found = only_scene(tmp_path)
    assert found.name == "0a1b" and len(found) == 4
    assert any("ignored" in note and "transforms.json" in note for note in found.notes)
    (scene / "dslr/nerfstudio/transforms_undistorted.json").unlink()
    with pytest.raises(data.DataError, match="(?i)fisheye.*undistort"):
        data.load_scenes(tmp_path)


def test_depth_of_another_resolution_arrays_and_scale(tmp_path):
    depths = ["d/0.npy", "d/1.npy", "d/2.png", None]
    write_scene(tmp_path, size=(96, 128), cx=64.0, cy=48.0, depth_unit_scale_factor=0.01,
                more=lambda i: dict(depth_file_path=depths[i]))
    ids = blocks((48, 64))
    depth = (ids * 50).astype(np.float32)
    depth[0, :4] = np.nan, np.inf, -3, 65535  # none of these is a depth
    write_maps(tmp_path, depths[:3], depth, depth[..., None].astype(np.float64), (ids * 50).astype(np.uint16))
    scene = only_scene(tmp_path)
    wanted = torch.from_numpy(blocks((96, 128))).float() * 0.5
    assert torch.allclose(scene.view(2).depth, wanted)
    wanted[:2, :8] = 0
    assert torch.allclose(scene.view(0).depth, wanted) and torch.equal(scene.view(0).depth, scene.view(1).depth)
    assert scene.view(3)[4:] == (None,) * 4 and "1 of 4 views have no depth" in scene.notes


@pytest.mark.parametrize("high", [1, 255, True])
# `masks/` is looked into anyway, but mask_path says what it holds
@pytest.mark.parametrize("folder", ["valid", "masks"])
def test_mask_path_is_two_regions(tmp_path, high, folder):
    write_scene(tmp_path, more=lambda i: dict(mask_path=f"{folder}/{i}.png"))
    inside = np.zeros((24, 32), np.uint8)
    inside[4:9, 5:30] = high
    write_maps(tmp_path / folder, NAMES[:4], inside.astype(bool) if high is True else inside)
    assert (only_scene(tmp_path).view(0).mask.numpy() == 1 + (inside > 0)).all()
    ids = blocks((24, 32)).astype(np.uint8)
    write_maps(tmp_path / "instance_segmentation", NAMES[:4], ids)  # better than two regions
    assert (only_scene(tmp_path).view(0).mask.numpy() == ids).all()


def test_ids_of_every_encoding(tmp_path):
    names = [*(f"ids/{i}.png" for i in range(5)), "ids/5.npy"]
    write_scene(tmp_path, count=6, more=lambda i: dict(instance_file_path=names[i]))
    ids = blocks((24, 32)) * 5
    colour = np.stack([ids % 256, ids * 5 % 256, 1 + 0 * ids], -1).astype(np.uint8)
    palette = Image.fromarray(ids.astype(np.uint8), "L").copy()
    palette.putpalette(np.random.default_rng(0).permutation(256).astype(np.uint8).repeat(3).tobytes())
    with_alpha = np.dstack([colour, 255 + 0 * colour[..., :1]]), np.dstack([ids, 0 * ids]).astype(np.uint8)
    write_maps(tmp_path, names, colour, colour, (ids * 100).astype(np.uint16), *with_alpha, ids)
    palette.save(tmp_path / names[1])
    assert [Image.open(tmp_path / names[i]).mode for i in (1, 3, 4)] == ["P", "RGBA", "LA"]
    scene = only_scene(tmp_path)
    coded = colour.astype(int) @ [1, 256, 65536]
    for i, wanted in enumerate((coded, ids, ids * 100, coded, ids, ids)):
        assert (scene.view(i).mask.numpy() == wanted).all(), i


def test_scenes_in_folders_come_in_natural_order(tmp_path):
    for name in ("room10", "room2", "deep/er/x1", "²", ".hidden"):
        write_scene(tmp_path / name)
    write_scene(tmp_path / "too/deep/to/be/seen")
    (tmp_path / "notes").mkdir()
    names = [s.name for s in data.load_scenes(tmp_path)]
    assert names == ["deep/er/x1", "room2", "room10", "²"]
    with pytest.raises(data.DataError, match=rf"a folder of a scene; .*{tmp_path / 'room2'}"):
        data.load_scenes(tmp_path / "room2/images")


# ------------------------------------------------------------------------------------------ folders as people have them
# One scene of five smooth pictures, laid out in the ways that people reported. What is read must be this scene.

SMOOTH = [Image.fromarray(colours).resize((32, 24), Image.BICUBIC)
          for colours in np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3)).astype(np.uint8)]
HALF = np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(24, 0)


def put(folder, names, zoom=1.0, turn=None):
    """The five pictures; `turn` 6 or 8 stores them lying, with the EXIF tag that turns them back."""
    tag, how = Image.Exif(), {6: Image.ROTATE_90, 8: Image.ROTATE_270}
    tag[0x0112] = turn or 1
    for name, picture in zip(names, SMOOTH):
        picture = picture.resize((int(32 * zoom), int(24 * zoom)), Image.BICUBIC)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (picture.transpose(how[turn]) if turn else picture).save(folder / name, exif=tag)


def colmap_of(folder, names=NAMES, zoom=1.0, views=5, points=((0.1, 0.2, 2.0),) * 60, spoil=lambda lines: lines, **how):
    """A COLMAP model of the first `views` pictures; `spoil` changes the lines of its images.txt."""
    K, size = (zoom * LENS).tolist(), (round(24 * zoom), round(32 * zoom))
    poses = [((1.0, 0.0, 0.0, 0.0), (-0.1 * i, 0.0, 0.0)) for i in range(views)]
    write_colmap(folder, "PINHOLE", (K[0][0], K[1][1], K[0][2], K[1][2]), size, names[:views], points, poses, **how)
    for file in folder.glob("sparse/0/images.txt"):
        file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")


def llff(folder, zoom=1.0):
    put(folder, five("images_4/{}.png"))
    size = [24 * zoom, 32 * zoom, 30.5 * zoom]  # and focal length; camera axes: down, right, backwards
    tables = [np.stack([m[:, 1], m[:, 0], -m[:, 2], m[:, 3], size], 1) for m in (pose(i)[:3] for i in range(5))]
    np.save(folder / "poses_bounds.npy", [[*table.ravel(), 0.5, 6.0] for table in tables])


def scannetpp(folder, place=None, bad=()):
    home = folder / "0a1b/dslr"
    put(home, five("undistorted_images/{}.png"))
    describe(home, NAMES, "nerfstudio/transforms_undistorted.json",
             more=lambda i: dict(mask_path=NAMES[i], is_bad=i in bad))
    if place:
        write_maps(home / place, NAMES, HALF)


def plainly(folder, names=IN_IMAGES, listed=None, turn=None, **how):
    put(folder, names, turn=turn), describe(folder, listed or names, **how)


def with_colmap(folder, **how):
    put(folder, IN_IMAGES), colmap_of(folder, **how)


turned = lambda i, scale: placed(pose(i) @ np.diag([scale] * 3 + [1]))
no_2d = lambda lines: [line for line in lines if not line.startswith("1.0 2.0")]
blank = lambda lines: [part for line in lines for part in ([line, "", ""] if "7 " in line else [line])]
PEOPLE = {  # name: what writes the folder, and what the notes must say
    "backslashes": lambda f: plainly(f, listed=five(r"images\{}.png")),
    "drive letters": lambda f: plainly(f, listed=five(r"C:\me\scene\images\{}.png")),
    "upper case": lambda f: plainly(f, five("Images/{}.PNG"), IN_IMAGES),
    "upper case, colmap": lambda f: (put(f, five("Images/{}.PNG")), colmap_of(f)),
    "another ending": lambda f: with_colmap(f, names=five("{}.jpg")),
    "accents": lambda f: plainly(f, five("images/e\u0301{}.png"), five("images/\xe9{}.png")),
    "other types": lambda f: plainly(f, [f"images/{i}.{'webp tif bmp Jpg TIFF'.split()[i]}" for i in range(5)]),
    "HEIC beside": (lambda f: (plainly(f), (f / "images/x.HEIC").write_bytes(b"?")), "1 HEIC"),
    "images_4 alone": (lambda f: plainly(f, five("images_4/{}.png"), IN_IMAGES, zoom=4),
                       "128x96: scaled to the 32x24 of images_4"),
    "shrunk after colmap": (lambda f: with_colmap(f, zoom=2.03), "65x49: scaled to the 32x24"),
    "grown after colmap": (lambda f: (put(f, IN_IMAGES, zoom=2), colmap_of(f)), "32x24: scaled to the 64x48"),
    "an angle": lambda f: plainly(f, **dict.fromkeys("fl_x cx cy w h".split()), camera_angle_x=2 * math.atan(16 / 30)),
    "intrinsics of a frame win": lambda f: plainly(f, fl_x=60.0, k1=0.2, more=lambda i: dict(fl_x=30.0, k1=0.0)),
    "3x4, blanks, no ending": lambda f: plainly(f, five("images/my photo 0.{}.png"), five("./images/my photo 0.{}"),
                                                more=lambda i: placed(pose(i)[:3])),
    "EXIF": (lambda f: plainly(f, five("images/{}.jpg"), turn=6), "EXIF"),
    "EXIF, no size": (lambda f: plainly(f, turn=8, w=None, h=None), "EXIF"),
    "EXIF, shrunk": (lambda f: (put(f, IN_IMAGES, turn=8), colmap_of(f, zoom=3)), "EXIF"),
    "ScanNet++, a bad frame": (lambda f: scannetpp(f, "undistorted_anon_masks", (1,)), "1 frames that are marked"),
    "ScanNet++, small masks": lambda f: scannetpp(f, "resized_anon_masks"),
    "ScanNet++ without masks": (scannetpp, "read without"),
    "a folder called nerfstudio": lambda f: plainly(f / "nerfstudio"),
    "rotations scaled": (lambda f: plainly(f, more=lambda i: turned(i, 2.0)), "scaled by 2"),
    "some rotations scaled": (lambda f: plainly(f, more=lambda i: turned(i, 0.5 if i % 2 else 1)), "(2 views)"),
    "several models": (lambda f: (with_colmap(f, views=3), colmap_of(f, place="sparse/1")), "sparse/0, another model"),
    "sparse/1 alone": lambda f: with_colmap(f, place="sparse/1"),
    "images.txt without 2D points": lambda f: with_colmap(f, text=True, spoil=no_2d),
    "images.txt with blank lines": lambda f: with_colmap(f, text=True, spoil=blank),
    "two spaces in names": lambda f: (put(f, five("images/a  b {}.png")),
                                      colmap_of(f, five("a  b {}.png"), text=True)),
    "no points": (lambda f: (with_colmap(f), (f / "sparse/0/points3D.bin").unlink()), "no points3D"),
    "depths/": (lambda f: (plainly(f), write_maps(f / "depths", NAMES, HALF)), "ignored: depths/"),
    "LLFF": (lambda f: llff(f, 4), "scaled to the 32x24 of images_4")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", PEOPLE)
def test_folders_as_people_have_them(tmp_path, case):
    write, words = PEOPLE[case] if isinstance(PEOPLE[case], tuple) else (PEOPLE[case], None)
    write(tmp_path)
    scene, views = only_scene(tmp_path), [0, 2, 3, 4] if "a bad frame" in case else range(5)
    assert np.allclose(scene.c2w, [pose(i) for i in views], atol=1e-6)
    for k, i in enumerate(views):
        view = scene.view(k, (24, 32))
        assert torch.allclose(view.K.double(), torch.from_numpy(LENS), atol=0.6), view.K
        assert np.abs(view.image.permute(1, 2, 0).numpy() - np.asarray(SMOOTH[i]) / 255).mean() < 0.04
    if "ScanNet++" in case and "without" not in case:
        assert set(scene.view(0).mask.unique().tolist()) == {1, 2}
    assert case != "LLFF" or scene.depth_range == (0.5, 6.0)  # its own bounds
    said = "\n".join(scene.notes)
    assert words in said if words else not re.search("scaled|EXIF|left out|without", said), said


def refit(room, folder, unit=1.0, dtype=np.uint16, scale=1.0, **meta):
    """A room again, its positions in units of 1 / `unit` metres, its depth in millimetres times `scale`."""
    old = json.loads((room / "transforms.json").read_text())
    shutil.copytree(room, folder, dirs_exist_ok=True)
    for frame in old["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[3] *= unit
        depth = np.array(Image.open(room / frame["depth_file_path"])) * scale
        if dtype == np.float32:
            frame["depth_file_path"] = frame["depth_file_path"].replace(".png", ".npy")
        write_maps(folder, [frame["depth_file_path"]], depth.astype(dtype))
    save(folder, old | dict(depth_unit_scale_factor=None) | meta)


@pytest.mark.parametrize("settings, ratio, warned", [
    (dict(), 1, False), (dict(dtype=np.float32, scale=1e-3), 1, False), (dict(unit=3.7), 1 / 3.7, True),
    (dict(dtype=np.float32), 1000, True), (dict(unit=0.2, depth_unit_scale_factor=2e-4), 1, False),
    (dict(unit=3.7, depth_unit_scale_factor=1e-3), 1 / 3.7, False),
    (dict(scale=5, integer_depth_scale=2e-4), 1, False)])
def test_the_unit_of_depth(rooms, rooms_dir, tmp_path, settings, ratio, warned):
    refit(rooms_dir / "room_000", tmp_path, **settings)
    scene = only_scene(tmp_path)
    found = scene.view(3).depth / (settings.get("unit", 1) * rooms[0].view(3).depth)
    assert float(found.median()) == pytest.approx(ratio, rel=0.01)
    warnings = [note for note in scene.notes if "depth_unit_scale_factor" in note]
    assert len(warnings) == warned


def test_depth_beside_colmap_is_scaled_to_its_points(rooms, tmp_path):
    room, names = rooms[1], [frame.image.name for frame in rooms[1].frames]
    shutil.copytree(room.frames[0].image.parent, tmp_path / "images")
    depth = np.stack([Image.open(frame.depth) for frame in room.frames])
    depth[:, :40] = 0  # not measured
    write_maps(tmp_path / "depth", names, *depth)
    points = np.concatenate([unproject(room.view(i), 16)[0] for i in range(12)]) * 0.27
    w2c = [np.linalg.inv(frame.c2w) for frame in room.frames]
    quaternion = lambda R: [1 + R.trace(), *(R - R.T)[[2, 0, 1], [1, 2, 0]]]  # none of these is half a turn
    poses = [(quaternion(m[:3, :3]), 0.27 * m[:3, 3]) for m in w2c]
    K, size = room.frames[0].K, room.frames[0].size
    write_colmap(tmp_path, "PINHOLE", (K[0, 0], K[1, 1], K[0, 2], K[1, 2]), size, names, points.tolist(), poses)
    scene = only_scene(tmp_path)
    assert float((scene.view(4).depth / room.view(4).depth)[40:].median()) == pytest.approx(0.27, rel=0.01)
    assert any("depth_unit_scale_factor" in note for note in scene.notes)
    assert scene.depth_range[1] < 0.27 * 12 and scene.range_source == "measured depth"


@pytest.mark.parametrize("low, high, wanted", [
    (1.3, 26.5, [0, 10, 20, 30]), (-3.32, -0.238, [-4, -3, -2, -1, 0]), (0.2, 0.2, [0.2, 0.25]), (0, 0, [0, 0.2]),
    (-0.95, 36.4, [-10, 0, 10, 20, 30, 40])])
def test_a_chart_is_labelled_with_round_numbers(low, high, wanted):
    found = data.round_numbers(low, high)
    assert found[0] <= low and high <= found[-1] and len(found) <= 7
    assert found.tolist() == wanted


def test_near_and_far_come_from_points_that_a_picture_shows(tmp_path):
    put(tmp_path, IN_IMAGES)
    rng = np.random.default_rng(0)
    seen = np.stack([rng.uniform(-0.5, 0.8, 200), rng.uniform(-0.5, 0.5, 200), rng.uniform(2, 3, 200)], 1)
    seen[0, 2] = 60  # one that is wrong does not count
    beside = np.stack([rng.choice([-40.0, 40.0], 300), rng.uniform(-1, 1, 300), rng.uniform(0.1, 30, 300)], 1)
    colmap_of(tmp_path, points=[*seen.tolist(), *beside.tolist()])
    scene = only_scene(tmp_path)
    near, far = scene.depth_range
    assert scene.range_source == "sparse points" and 1.5 < near < 2 and 3 < far < 4
    behind = seen * 20  # inside the pictures, but no picture was found to show them
    put(tmp_path / "b", IN_IMAGES)
    colmap_of(tmp_path / "b", points=[*seen.tolist(), *behind.tolist()], shown=range(200))
    assert only_scene(tmp_path / "b").depth_range[1] < 4
    (scene,) = data.open_scenes(tmp_path / "b", near=0.7)
    assert scene.depth_range[0] == 0.7 and 3 < scene.depth_range[1] < 4 and scene.range_source == "--near and --far"
    for wrong in (dict(near=0), dict(near=5), dict(near=1, far=1), dict(far=-1), dict(near=float("nan"))):
        with pytest.raises(data.DataError, match="0 < near < far"):
            data.open_scenes(tmp_path / "b", **wrong)


def test_one_unusable_scene_among_many(tmp_path, capsys):
    for name in ("attic", "hall"):
        write_scene(tmp_path / name, count=2 if name == "attic" else 4)
    (tmp_path / "cellar").mkdir()
    (tmp_path / "cellar/transforms.json").write_text("{")
    with pytest.raises(data.DataError, match="attic"):
        data.load_scenes(tmp_path)
    assert [scene.name for scene in data.load_scenes(tmp_path, skip_bad_frames=True)] == ["hall"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "attic" in said[0] and "cellar" in said[1]
    shutil.rmtree(tmp_path / "hall")
    with pytest.raises(data.DataError, match="cellar"):
        data.load_scenes(tmp_path, skip_bad_frames=True)


# ---------------------------------------------------------------------------------------------------- large photos


@pytest.mark.parametrize("lens", [{}, dict(k1=0.08, k2=-0.05, p1=0.004, p2=-0.003)])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_photo_is_decoded_once_and_small(tmp_path, monkeypatch, lens, kind):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).resize((1601, 1203), Image.BICUBIC)
    write_scene(tmp_path, 3, kind=kind, fl_x=1500.0, fl_y=1510.0, cx=810.0, cy=600.0, w=1601, h=1203, **lens)
    for i in range(3):
        photo.save(tmp_path / f"images/{i}.{kind}", quality=95, compress_level=1)  # either type heeds one of them
    scene, sizes, decode = only_scene(tmp_path), [], data.decode

    def watched(*args, **options):
        sizes.append((image := decode(*args, **options)).size)
        return image
    monkeypatch.setattr(data, "decode", watched)
    size = (90, 120)
    views = [scene.view(1, size) for _ in range(3)]
    assert len(sizes) == 1 and sizes[0] == ((801, 602) if kind == "jpg" else (1601, 1203))
    assert torch.equal(views[0].image, views[2].image) and views[0].image.data_ptr() != views[2].image.data_ptr()
    # undistorted at full size
    whole = Image.fromarray((255 * scene.view(1).image).round().byte().permute(1, 2, 0).numpy())
    scale, box = data.covering_crop((1203, 1601), size)
    slow = np.asarray(whole.resize(size[::-1], Image.BICUBIC, box=box), np.float32) / 255
    assert np.abs(views[0].image.permute(1, 2, 0).numpy() - slow).mean() < 1 / 255
    monkeypatch.setitem(data.VIEWS_IN_MEMORY, "most", 0)
    again = only_scene(tmp_path)
    sizes.clear()
    # no memory: made again
    assert torch.equal(again.view(1, size).image, again.view(1, size).image) and len(sizes) == 2


# ------------------------------------------------------------------------------------------------ other RGB-D sequences


def write_rgbd(folder, size=(24, 32)):
    folder.mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((*size, 3), 40 * i, np.uint8)).save(folder / f"frame-{i:06d}.color.png")
        Image.fromarray(np.full(size, 1000 + i, np.uint16)).save(folder / f"frame-{i:06d}.depth.png")
        np.savetxt(folder / f"frame-{i:06d}.pose.txt", pose(i))


NINE = "30 0 16\n0 31 12\n0 0 1"
INFO = ("m_colorWidth = 64\nm_colorHeight = 48\nm_calibrationColorIntrinsic = 60 0 32 0 0 62 24 0 0 0 1 0 0 0 0 1\n"
        "m_calibrationDepthIntrinsic = 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n")


@pytest.mark.parametrize("file, text, refusal", [
    ("camera-intrinsics.txt", NINE, None), ("../camera-intrinsics.txt", NINE, None),
    ("../info.txt", INFO, None), ("info.txt", INFO, None),
    ("camera-intrinsics.txt", "f = 30", "nine numbers"), ("camera-intrinsics.txt", "30", "nine numbers"),
    ("intrinsic_color.txt", "30 0 16 0\n0 31 12 0\n0 0 1 0\n0 0 0 1", None),
    ("camera-intrinsics.txt", "60 0 32\n0 62 24\n0 0 1", "32x24.*64x48"), (None, "", "32x24.*camera-intrinsics.txt"),
    ("camera-intrinsics.txt", "0 0 16\n0 31 12\n0 0 1", "singular")])
def test_intrinsics_of_rgbd_sequences(tmp_path, file, text, refusal):
    write_rgbd(tmp_path / "data")
    if file:
        (tmp_path / "data" / file).write_text(text)
    if refusal:
        with pytest.raises(data.DataError, match=refusal):
            data.load_scenes(tmp_path)
        return
    scene = only_scene(tmp_path)
    assert not scene.kinect and np.allclose(scene.c2w, [pose(i) for i in range(4)])
    view = scene.view(2)
    assert np.allclose(view.K, LENS) and np.allclose(view.depth, 1.002)


@pytest.mark.parametrize("text", ["-inf " * 16, "", "-1.#IND " * 16])
def test_kinect_recordings_without_a_pose(tmp_path, text):
    write_rgbd(tmp_path / "a", size=(480, 640))
    (tmp_path / "a/frame-000001.pose.txt").write_text(text)
    with pytest.raises(data.DataError, match="frame-000001.*finite"):
        data.load_scenes(tmp_path / "a")
    scene = only_scene(tmp_path / "a", skip_bad_frames=True)
    assert scene.kinect and len(scene) == 3 and any("frame-000001" in note for note in scene.notes)


# ---------------------------------------------------------------------------------------------------- bad input


def key(**changes):
    return lambda folder, meta: save(folder, meta | changes)


def frame(i, **changes):
    def spoil(folder, meta):
        meta["frames"][i] |= changes
        save(folder, meta)
    return spoil


def cut(folder, name, keep):
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def maps(kind, array):
    return lambda folder, meta: write_maps(folder / kind, NAMES[:4], array)


BAD = {  # what a person can have wrong, and what the one line names; damage of every kind is in test_hostile.py
    "missing image": (lambda f, m: (f / "images/1.png").unlink(), "1.png does not exist"),
    "cut png": (lambda f, m: cut(f, "images/1.png", 1500), "1.png.*decoded"),
    "image size": (key(w=64, h=40, cx=32.0, cy=20.0), "is 32x24, but its camera is for 64x40"),
    "intrinsics of another size": (key(w=None, h=None, cx=64.0, cy=48.2), "0.png.*centre at .64, 48.2.*128x96"),
    "not rigid": (frame(1, **placed(np.diag([2.0, 1, 1, 1]) @ pose(1))), "1.png.*not a rigid"),
    "reflected": (frame(1, **placed(np.diag([1.0, 1, -1, 1]) @ pose(1))), "1.png.*not a rigid"),
    "transposed": (frame(1, transform_matrix=(pose(3) @ GL).T.tolist()), "1.png.*transposed"),
    "ragged pose": (frame(1, transform_matrix=[[1, 2], [3]]), "frame 1.*number"),
    "no pose": (frame(1, transform_matrix=None), "frame 1 lacks 'transform_matrix'"),
    "singular K": (key(fl_x=0.0), "0.png.*intrinsics are singular"),
    "no focal length": (key(fl_x=None, fl_y=None), "fl_x.*camera_angle_x"),
    "wild distortion": (key(k1=-9.0), "0.png.*distortion"),
    "fisheye": (key(camera_model="OPENCV_FISHEYE"), "FISHEYE.*undistort"),
    "depth unit": (key(depth_unit_scale_factor=0), "depth_unit_scale_factor"),
    "mask of another size": (maps("masks", np.ones((24, 31), np.uint8)), "masks/0.png is 31x24.*32x24"),
    "depth of another shape": (maps("depth", np.ones((24, 24), np.uint16)), "depth/0.png is 24x24.*32x24"),
    "depth in colour": (maps("depth", np.ones((24, 32, 3), np.uint8)), "depth/0.png.*shape"),
    "named mask is missing": (frame(1, mask_path="ids/1.png"), "ids/1.png does not exist"),
    "twice": (frame(1, file_path="./images/../images/0.png"), "0.png is listed twice"),
    "leaves the folder": (frame(1, file_path="../x.png"), "frame 1.*outside the scene"),
    "mask leaves the folder": (frame(1, mask_path="/etc/hostname"), "frame 1.*outside the scene"),
    "agreement": (lambda f, m: save(f, m | dict(agreement=5)), "agreement.*two numbers"),
    "two views": (lambda f, m: save(f, m | dict(frames=m["frames"][:2])), "2 usable views"),
    "cut json": (lambda f, m: cut(f, "transforms.json", 40), "transforms.json.*not JSON"),
    "no frames": (lambda f, m: save(f, dict(fl_x=30)), "transforms.json.*frames"),
    "empty folder": (lambda f, m: (shutil.rmtree(f), f.mkdir()), "no scene in here.*COLMAP"),
    "no folder": (lambda f, m: shutil.rmtree(f), "no such folder"),
    "colmap without images": (lambda f, m: (shutil.rmtree(f), colmap_of(f)), "images does not exist"),
    "colmap without one image": (lambda f, m: ((f / "transforms.json").unlink(), colmap_of(f, views=4),
                                               (f / "images/2.png").unlink()), "2.png does not exist"),
    "poses_bounds": (lambda f, m: (shutil.rmtree(f), llff(f), np.save(f / "poses_bounds.npy", np.zeros((4, 17)))),
                     "poses_bounds.npy.*5 pictures")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(tmp_path, capfd, case):
    spoil, words = BAD[case]
    folder = tmp_path / "scene"
    spoil(folder, write_scene(folder))
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.main(["--scene_dir", str(folder), "--out", str(tmp_path / "out")])
    message = stop.value.code
    assert isinstance(message, str) and len(message.splitlines()) == 1, message  # a word as code: printed, status 1
    assert re.search(words, message) and "scene" in message and message.count("--skip_bad_frames") <= 1, message
    assert tree(tmp_path) == before and capfd.readouterr() == ("", "")  # nothing is written, not even --out


def test_a_file_is_flushed_aside_and_renamed(tmp_path, monkeypatch):
    done, path = [], tmp_path / "deep/x"
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        note = lambda *args, name=name, call=call: (done.append((name, path.exists())), call(*args))
        monkeypatch.setattr(os, name, note)
    data.write_whole(path, b"whole")
    assert done == [("fsync", False), ("replace", False)]  # until the rename there is no file of that name
    assert path.read_bytes() == b"whole" and [p.name for p in path.parent.iterdir()] == ["x"]


def test_bad_frames_are_left_out_when_asked(tmp_path):
    meta = write_scene(tmp_path, count=12)
    write_maps(tmp_path, [f"masks/{i}.png" for i in range(12)], blocks((24, 32)).astype(np.uint8))
    (tmp_path / "images/0.png").unlink()
    meta["frames"][1]["transform_matrix"] = np.full((4, 4), np.nan).tolist()
    for name, keep in (("images/2.png", 999), ("images/3.png", 0), ("masks/4.png", -9)):
        cut(tmp_path, name, keep)
    # Damaged inside, its end is whole; not packed, so that only its checksum shows it: seen when asked to look.
    Image.open(tmp_path / "images/5.png").save(tmp_path / "images/5.png", compress_level=0)
    blob = bytearray((tmp_path / "images/5.png").read_bytes())
    blob[900:1000] = bytes(100)
    (tmp_path / "images/5.png").write_bytes(blob)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/6.png")
    save(tmp_path, meta)
    with pytest.raises(data.DataError, match="images/0.png.*6 of 12 frames"):
        data.load_scenes(tmp_path)
    before = tree(tmp_path)
    scene = only_scene(tmp_path, skip_bad_frames=True)
    assert [f.name for f in scene.frames] == [f"images/{i}.png" for i in range(7, 12)]
    left_out = [note for note in scene.notes if note.startswith("left out: ")]
    assert len(left_out) == 7 and all(f"/{i}.png" in left_out[i] for i in range(7))
    assert scene.c2w.shape == (5, 4, 4) and scene.view(0).name == "images/7.png" and tree(tmp_path) == before

    for i in (7, 8, 9):
        (tmp_path / f"images/{i}.png").unlink()
    with pytest.raises(data.DataError, match="2 usable views.*10 left out"):
        data.load_scenes(tmp_path, skip_bad_frames=True)


# ---------------------------------------------------------------------------------------------------- scenes, triplets


def test_split_holds_scenes_out():
    for count in (1, 2, 3, 7, 8, 9, 16, 48):
        scenes = [object() for _ in range(count)]
        train, val = data.split(scenes, "train"), data.split(scenes, "val")
        assert len(train) + len(val) == count and not set(train) & set(val) and train
        assert val == (scenes[7::8] if count >= 8 else scenes[1:][-1:])
    with pytest.raises(AssertionError):
        data.split([], "test")
    assert [data.held_out_views(range(n)) for n in (1, 2, 3, 12)] == [[0], [1], [2], [2, 10]]


def test_no_contexts_are_shown_twice(monkeypatch, rooms):
    drawn = iter([(0, 1, 2), (1, 0, 2), (0, 2, 1), *[(2, 0, 1)] * 20])
    monkeypatch.setattr(data, "sample_triplet", lambda *_: next(drawn))
    assert [indices[:2] for _, indices in data.held_out_triplets(rooms[:1], seed=0)] == [(0, 1), (0, 2)]


@pytest.mark.parametrize("least, widest", [*data.LEVELS, (0.85, 0.3)])
def test_pairs_of_contexts_are_those_of_the_definition(crooked, least, widest):
    scene, (near, far) = crooked[0], crooked[0].depth_range
    centre = scene.c2w[:, :3, 3].double().numpy()

    def share(a, b):  # of what view a sees at three depths, that view b sees too
        u, v = scene.frames[a], scene.frames[b]
        places = [(x, y, t) for x in (np.arange(8) + 0.5) / 8 * u.size[1] for y in (np.arange(6) + 0.5) / 6 * u.size[0]
                  for t in (0.25, 0.5, 0.75)]
        points = [[*np.linalg.solve(u.K, [x, y, 1]) / (1 / far + t * (1 / near - 1 / far)), 1] for x, y, t in places]
        there = (np.linalg.inv(v.c2w) @ u.c2w @ np.transpose(points))[:3]
        x, y = (v.K @ there)[:2] / there[2]
        return ((there[2] > 0) & (x > 0) & (y > 0) & (x < v.size[1]) & (y < v.size[0])).mean()
    both = {(a, b): min(share(a, b), share(b, a)) for a in range(12) for b in range(12)}
    for target in range(12):
        wanted = {(a, b) for a in range(12) for b in range(a) if target not in (a, b) and both[a, b] >= 0.75 * least
                  and min(both[target, a], both[target, b]) >= least
                  and (centre[a] - centre[target]) @ (centre[b] - centre[target]) < 0
                  and 0.02 < np.linalg.norm(centre[a] - centre[b]) * (1 / near + 1 / far) / 2 < widest}
        assert {(max(pair), min(pair)) for pair in data.context_pairs(scene, target, least, widest)} == wanted


def test_triplets_are_drawn_from_the_pairs(rooms):
    scene = rooms[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = ([data.sample_triplet(scene, g) for _ in range(30)] for g in generators)
    assert first == again != other and len(set(first)) > 5
    assert all((a, b) in data.best_pairs(scene, target)[1] for a, b, target in first)
    held = {data.sample_triplet(scene, torch.Generator().manual_seed(s), targets=[4, 6])[2] for s in range(12)}
    assert held == {4, 6}


def test_triplets_of_three_views_and_of_none(tmp_path):
    write_scene(tmp_path / "three", count=3)
    g = torch.Generator().manual_seed(0)
    assert {data.sample_triplet(only_scene(tmp_path / "three"), g)[2] for _ in range(5)} == {1}
    turn = np.array([[0, 0, 1, 9], [0, 1, 0, 0], [-1, 0, 0, -9], [0, 0, 0, 1]])  # four of it: back to back on a ring
    write_scene(tmp_path / "apart", more=lambda i: placed(np.linalg.matrix_power(turn, i)))
    write_scene(tmp_path / "same", more=lambda i: placed(np.eye(4)))
    for name in ("apart", "same"):
        with pytest.raises(data.DataError, match="no three views overlap") as error:
            data.sample_triplet(only_scene(tmp_path / name), g)
        assert "\n" not in str(error.value)


def test_subset_keeps_cameras_and_depth_range(rooms):
    scene = rooms[0]
    part = scene.subset([5, 2, 9])
    assert len(part) == 3 and torch.equal(part.c2w, scene.c2w[[5, 2, 9]]) and part.depth_range == scene.depth_range
    assert torch.equal(part.view(1).image, scene.view(2).image) and len(scene) == 12
    a, b, target = data.sample_triplet(scene.subset([0, 1, 2, 3, 4]), torch.Generator().manual_seed(0))
    assert max(a, b, target) < 5


def test_depth_range_contains_what_is_seen(rooms, crooked):
    for scene in (*rooms, *crooked):
        depth = torch.cat([scene.view(i).depth.flatten() for i in range(len(scene))])[::17]
        near, far = scene.depth_range
        low, high = depth[depth > 0].quantile(torch.tensor([0.02, 0.98])).tolist()
        assert 0.5 * low < near < low and high < far < 2 * high
    ring = []
    for a in np.linspace(0, 2 * math.pi, 8, endpoint=False):  # cameras 2 from the origin, looking at it
        z = -np.array([math.cos(a), math.sin(a), 0])
        x = np.cross(z, [0, 0, 1.0])
        ring.append(np.vstack([np.stack([x, np.cross(z, x), z, -2 * z], 1), [0, 0, 0, 1]]))
    near, far = data.layout_depth_range(np.stack(ring))
    assert 0.2 < near < 1.5 and 2.5 < far < 20
    near, far = data.layout_depth_range(np.stack([pose(i) for i in range(4)]))  # parallel axes meet nowhere
    assert 0.05 < near < 0.5 and 1 < far < 10


# ---------------------------------------------------------------------------------------------------- superpixels


@pytest.mark.parametrize("size, count", [
    ((1, 1), 1), ((1, 1), 9), ((2, 3), 50), ((33, 47), 30), ((96, 128), 64), ((7, 211), 20), ((300, 1), 10),
    ((1, 300), 10), ((40, 40), 0), ((40, 40), 1)])
def test_superpixels_label_every_pixel(size, count):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    mask = data.superpixels(F.avg_pool2d(image, 5, 1, 2), count)
    assert mask.shape == size and mask.dtype == torch.int64 and mask.min() >= 1
    found, wanted = len(mask.unique()), max(1, min(count, size[0] * size[1]))
    assert 0.5 * wanted <= found <= 1.6 * wanted
    assert torch.equal(mask, data.superpixels(F.avg_pool2d(image, 5, 1, 2), count))


def test_superpixels_follow_edges():
    y, x = torch.meshgrid(torch.arange(90), torch.arange(120), indexing="ij")
    side = (x + 1.7 * y > 130)
    image = torch.where(side, torch.tensor([0.8, 0.3, 0.2])[:, None, None],
                        torch.tensor([0.2, 0.4, 0.7])[:, None, None])
    mask = data.superpixels(image, 40)
    pure = lambda ids: sum(max(int(side[ids == k].sum()),
                               int((~side)[ids == k].sum())) for k in ids.unique()) / side.numel()
    grid = (y // 15) * 8 + x // 15
    assert pure(mask) > 0.99 > 0.97 > pure(grid)  # a plain grid of as many cells mixes the sides
    flat = data.superpixels(torch.full((3, 90, 120), 0.5), 48)
    areas = flat.unique(return_counts=True)[1]
    assert areas.min() > 0.6 * 225 and areas.max() < 1.4 * 225  # nothing to follow: even cells


# ---------------------------------------------------------------------------------------------------- the report


def test_main_reports_and_draws(rooms_dir, tmp_path, capsys):
    (rooms_dir / "notes").mkdir(exist_ok=True)
    before = tree(rooms_dir)
    data.main(["--scene_dir", str(rooms_dir), "--out", str(tmp_path)])
    (rooms_dir / "notes").rmdir()
    said = capsys.readouterr().out
    for words in ("room_000: 12 views, 128x96, with mask 12, depth 12, normal 12, label 12", "from measured depth",
                  "4 scenes (3 train, 1 val), 48 views", "notes: ignored", "context baselines",
                  "contexts of 12 targets: "):
        assert words in said
    before.pop("notes")
    assert tree(rooms_dir) == before
    for index in range(4):
        with Image.open(tmp_path / f"room_{index:03d}.png") as sheet:
            assert np.array(sheet).std() > 30


def test_levels_count_targets(rooms, tmp_path):
    levels = [data.best_pairs(rooms[0], target)[0] for target in range(12)]
    said = data.describe_levels(rooms[0])
    assert f"12 targets: {levels.count(0)} at overlap 0.5 and baseline 0.4 of the depth" in said and "warning" not in said
    assert ("have none" in said) == (None in levels)
    write_scene(tmp_path, count=5, more=lambda i: placed(pose(10 * i)))  # steps of three times the depth
    (far_apart,) = data.open_scenes(tmp_path, near=0.5, far=2)
    assert "warning" in data.describe_levels(far_apart)


@pytest.mark.parametrize("error, words", [
    (data.DataError("bad"), "bad"), (ValueError("bad"), "bad"), (KeyboardInterrupt(), "stopped; again"),
    (OSError(28, "No space left", "x"), "x: No space left; once that is mended, again"),
    (RuntimeError("CUDA error: a bug"), None), (AssertionError("a device"), None)])
def test_only_expected_errors_end_in_one_line(error, words):
    args = argparse.Namespace(device="cpu", out="out")
    with pytest.raises(type(error) if words is None else SystemExit) as stop, data.explained(args, "again"):
        raise error
    assert words is None or stop.value.code == words
    args.device = "nonsense"
    with pytest.raises(SystemExit, match="--device nonsense: "), data.explained(args, ""):
        raise AssertionError("not reached")
