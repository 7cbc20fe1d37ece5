"""Broken inputs: kinds of files x ways to break them, each opened by the function or command that a user takes.

    python tests/test_hostile.py              all cases: what became of each, and the counts by kind of input
    python tests/test_hostile.py colmap       those whose names have these words

A worker process with little memory opens them. Fine are `refused` (one line that names the file), `same` (the numbers
of the good input), `noted` (other numbers, and the user is told) and `legal` (other numbers, and nobody could know
better: LEGAL). All else is a fault: a traceback, several lines, no file's name, a hang, too much memory, changed files,
wrong numbers in silence.
"""
import argparse
import collections
import contextlib
import faulthandler
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).parents[1]))
import stopping
from test_01_data import write_colmap

STAGES = data, lift, splat, distill, probe, d3r = [importlib.import_module(name) for name in (
    "01_data", "02_lift", "03_splat", "04_distill", "05_probe", "06_distill3r")]
SECONDS, MEMORY = 3, 1.5e9  # of the processor, for a case; of the worker, beyond what its libraries take
NAN, INF, DEEP = float("nan"), float("inf"), b"[" * 100_000
FINE = "refused", "same", "noted", "legal"
LEGAL = (  # other numbers, as good as any: text, numbers and JPEG have no checksum, and depth below 0 is unknown
    r"(transforms.json|001.jpg|bin) / bit|k1 = minus|class_names = (0|list)|more rows",
    r"(depth|normals)/000.npy / (nan|minus)|points3D|images.txt / word 1|photos / .* / (gone|1x1)|pairs.txt / twice",
    r"plain / .* / (gone|a folder|link)|(npy|model.safetensors) / zeros from half")

# ------------------------------------------------------------------------------------------- ways to break a file


def flips(*shares):  # one bit, at this share of the length
    def flip(content, share):
        at = min(int(share * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << int(1000 * share) % 7]) + content[at + 1:]
    return {f"bit {share:g}": lambda c, share=share: flip(c, share) for share in shares}


SOME = {
    "empty": lambda c: b"", "9 bytes": lambda c: c[:9], "half": lambda c: c[:len(c) // 2],
    "0xff": lambda c: b"\xff" * len(c),
    "web page": lambda c: b"<!doctype html>\n404\n",
    "zeros from half": lambda c: c[:len(c) // 2] + bytes(len(c) - len(c) // 2)}
BYTES = SOME | {
    "1 byte": lambda c: c[:1], "a tenth": lambda c: c[:len(c) // 10], "all but 1": lambda c: c[:-1],
    "zeros": lambda c: bytes(len(c)),
    "a tail": lambda c: c + b"\nmore\n", "byte order": lambda c: b"\xef\xbb\xbf" + c, "twice": lambda c: c + c,
    "git lfs": lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}
FLIPS = flips(0.0, 0.003, 0.02, 0.1, 0.31, 0.47, 0.63, 0.84, 0.97, 1.0)
TEXT = {
    "deep": lambda c: DEEP, "utf-16": lambda c: c.decode().encode("utf-16"), "latin": lambda c: b"\xe9" + c,
    "zero byte": lambda c: c[:len(c) // 2] + b"\0" + c[len(c) // 2:]}


def instead(make):  # something that is no file, or the wrong one
    def broken(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)
    return broken


FILES = {
    "gone": instead(lambda path: None), "a folder": instead(Path.mkdir),
    "link to nothing": instead(lambda path: path.symlink_to("/nothing")),
    "link to itself": instead(lambda path: path.symlink_to(path))}
PIPE = {"a pipe": instead(os.mkfifo)}


def full(left):  # a disk that takes so many bytes a file
    return lambda path: resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))


DISKS = {
    "disk full": full(0), "300 bytes left": full(300), "3000 bytes left": full(3000),
    "a file there": instead(Path.touch),
    "read-only": instead(lambda path: path.symlink_to("/proc/self/fdinfo"))}
ALONE = {"two at once": full(-1)}


def number(form, value, at):  # in a binary file
    return lambda c: c[:at] + struct.pack("<" + form, value) + c[at + struct.calcsize("<" + form):]


def swap(old, new):
    return lambda c: c.replace(old, new, 1)


def edit(path, value):  # of a JSON file, at a path like "frames.0.file_path"; ... takes the key away
    def broken(content):
        meta = inner = json.loads(content)
        *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        for key in way:
            inner = inner[key]
        inner[last] = value
        if value is ...:
            del inner[last]
        return json.dumps(meta).encode()
    return broken


FEW = {"word": "x", "nan": NAN, "minus": -3, "0": 0, "1e300": 1e300, "list": []}
VALUES = FEW | {"none": None, "gone": ..., "inf": INF, "dict": {"a": 1}}
NAMES = {
    "..": "../../etc/passwd", "absolute": "/etc/passwd", "device": "../../../../../../dev/zero",
    "newline": "images/a\nb.png",
    "zero": "images/\0.png", "surrogate": "images/\ud800.png", "escape": "images/\x1b[31m.png",
    "long": "images/" + "a" * 5000,
    "folder": "images", "nothing": "", "number": 7, "other": "images/nothing.png"}


def edits(paths, values=VALUES):
    return {f"{path} = {name}": edit(path, value) for path in paths.split() for name, value in values.items()}


def words(line, *columns, values=("x", "nan", "inf", "1e300")):  # of a text file
    def broken(content, column, value):
        lines = [row.split(" ") for row in content.decode().split("\n")]
        lines[line][column] = value
        return "\n".join(map(" ".join, lines)).encode()
    return {f"word {n} = {value}": lambda c, n=n, value=value: broken(c, n, value) for n in columns for value in values}


def array(change):  # of an .npy file
    def broken(content):
        np.save(file := io.BytesIO(), change(np.load(io.BytesIO(content))))
        return file.getvalue()
    return broken


def claim(shape, kind="<f8"):  # an .npy file that says it is of this shape, and holds nothing
    np.lib.format.write_array_header_1_0(file := io.BytesIO(), dict(descr=kind, fortran_order=False, shape=shape))
    return lambda c: file.getvalue()


ARRAYS = {
    "words": array(lambda x: x.astype(str)), "objects": array(lambda x: x.astype(object)), "flat": array(np.ravel),
    "none": array(lambda x: x[:0]), "5 axes": array(lambda x: x[None, None, None]), "short": array(lambda x: x[:-1]),
    "nan": array(lambda x: x * NAN), "minus": array(lambda x: -1.0 - x), "huge": claim((2**40, 2**20)),
    "large": claim((10**9,)),
    "negative": claim((-3, 17)), "records": claim((3,), "<f8, <i4")}
LLFF = {
    f"{name} {value}": array(lambda x, at=at, value=value: np.where(np.arange(17) == at, value, x))
    for name, at in (("H", 4), ("f", 14), ("near", 15), ("R", 0)) for value in (NAN, INF, -1, 0, 1e300)}


def png(height, width, rows=b""):  # says that it is of this size
    chunk = lambda kind, c: struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return lambda c: b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PICTURES = {
    "60000x60000": png(60000, 60000), "12000x12000": png(12000, 12000), "no rows": png(24, 32), "0x0": png(0, 0),
    "1x1": png(1, 1, bytes(4)), "more rows": png(24, 32, bytes(10**7))}


def safe(change):  # of a safetensors file: change(metadata, tensors)
    def broken(content):
        length = int.from_bytes(content[:8], "little")
        meta, held = json.loads(content[8:8 + length]).get("__metadata__", {}), dict(load(content))
        change(meta, held)
        return save({name: x.contiguous() for name, x in held.items()}, meta)
    return broken


def put(name, change):  # another tensor of this name; None: the first one
    return safe(lambda meta, held: held.update({name or min(held): change(held.get(name or min(held)))}))


def without(start):
    return safe(lambda meta, held: [held.pop(name) for name in list(held) if name.startswith(start)])


def said(**metadata):
    return safe(lambda meta, held: meta.update(metadata))


SAFE = {
    "length 2**63": number("Q", 2**63, 0), "length 10**9": number("Q", 10**9, 0), "length 0": number("Q", 0, 0),
    "deep header": lambda c: len(DEEP).to_bytes(8, "little") + DEEP,
    "offsets": swap(b'"data_offsets":[0,', b'"data_offsets":[9,'),
    "no metadata": safe(lambda meta, held: meta.clear()), "no tensors": without(""),
    "one axis": put(None, lambda x: x.flatten()[:1]),
    "0 rows": put(None, lambda x: x[:0]), "doubled": put(None, lambda x: torch.cat([x, x])),
    "more": put("a\nb", lambda x: torch.ones(2))}
FLOATS = {"nan": put(None, lambda x: x * NAN), "ints": put(None, lambda x: x.long())}


class Boom:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def torch_file(content, **how):
    torch.save(content, file := io.BytesIO(), **how)
    return file.getvalue()


def state(change):
    def broken(content):
        held = torch.load(io.BytesIO(content), weights_only=True)
        return torch_file(change(held.get("state_dict", held)))
    return broken


def each(change):
    return state(lambda held: {name: change(x) for name, x in held.items()})


TORCH = {
    "runs code": lambda c: torch_file({"a": Boom()}), "pickle runs code": lambda c: pickle.dumps(Boom()),
    "old, runs code": lambda c: torch_file({"a": Boom()}, _use_new_zipfile_serialization=False),
    "empty dict": state(lambda s: {}),
    "a tensor": state(lambda s: next(iter(s.values()))), "a list": state(lambda s: list(s.values())),
    "numbers for names": state(lambda s: dict(enumerate(s.values()))),
    "itself": state(lambda s: s.update(model=s) or s),
    "newline": state(lambda s: s | {"cls_token\n": torch.ones(1)}),
    "expanded": each(lambda x: torch.zeros(1).expand(x.shape)),
    "meta": each(lambda x: x.to("meta")), "sparse": each(lambda x: x.to_sparse()), "nan": each(lambda x: x * NAN),
    "complex": each(lambda x: x + 0j)}


OPERATOR = {
    "column beyond": put("S.column", lambda x: x.fill_(9)), "columns floats": put("S.column", lambda x: x.float()),
    "counts minus": put("S.count", lambda x: x - 2), "counts huge": put("S.count", lambda x: x * 0 + 2**30),
    "counts 1 more": put("S.count", lambda x: x + 1), "weights nan": put("S.weight", lambda x: x * NAN),
    "valid gone": without("valid"),
    "valid short": put("valid", lambda x: x[:1]), "valid floats": put("valid", lambda x: x.float()),
    "other format": said(format="9"),
    **{f"tokens {value}": said(tokens=value) for value in ("", "x", "1", "9" * 18, "-1")}}


def settings(change):  # of a run's checkpoint
    return safe(lambda meta, held: meta.update(settings=json.dumps(change(json.loads(meta["settings"])))))


RUN = {
    **{f"step {value}": said(step=value) for value in ("x", "-5", "99")}, "settings list": settings(lambda s: [1]),
    "settings number": settings(lambda s: 7), "steps word": settings(lambda s: s | dict(max_steps="x")),
    "no settings": settings(lambda s: {}), "optimiser gone": without("optimiser"),
    "moments gone": without("optimiser.0.exp_avg"),
    "weights gone": without("net.weight"), "generator gone": without("generator"),
    "generator short": put("generator", lambda x: x[:9]),
    "moments misshapen": put("optimiser.0.exp_avg", lambda x: torch.ones(2, 2)),
    "optimiser more": put("optimiser.9.step", lambda x: torch.ones(1)),
    "moments nan": put("optimiser.0.exp_avg", lambda x: x * NAN),
    "weights one number": put("net.weight", lambda x: torch.ones(1)),
    "weights ints": put("net.weight", lambda x: x.long()), "weights nan": put("net.weight", lambda x: x * NAN)}
LOG = {
    "a list": lambda c: b"[1]\n" + c, "a number": lambda c: b"7\n" + c, "no step": lambda c: b'{"loss": 1}\n' + c,
    "step word": swap(b'"step": 0', b'"step": "x"'), "half a line": lambda c: c[:-9]}


def repacked(change):  # of a cached sample: change(its parts as bytes), with a checksum that is right
    def broken(content):
        parts = {name: x.numpy().tobytes() for name, x in load(content).items() if name != "sha256"}
        change(parts)
        parts["sha256"] = d3r.checksum(parts)
        return save({name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in parts.items()})
    return broken


def remapped(shape, value):  # the maps of a view are of this shape and value
    maps = d3r.coded(np.full((8, *shape), value, np.float16), np.ones(shape, bool))
    return repacked(lambda parts: parts.update({"1.maps": maps}))


SAMPLE = {
    **{f"{name} {what}": repacked(lambda parts, name=name, part=part: parts.update({name: part}))
       for name in ("1.maps", "1.mask") for what, part in (
           ("bomb", zlib.compress(bytes(10**8))), ("short", zlib.compress(bytes(9))), ("raw", bytes(9)))},
    "view gone": repacked(lambda parts: parts.pop("2.maps")), "mask gone": repacked(lambda parts: parts.pop("2.mask")),
    "view more": repacked(lambda parts: parts.update({"9.maps": parts["0.maps"], "9.mask": parts["0.mask"]})),
    "maps cut off": repacked(lambda parts: parts.update({"1.maps": parts["1.maps"][:-20]})),
    "small": remapped((12, 16), 2), "nan": remapped((24, 32), NAN),
    "inf": remapped((24, 32), INF), "confidence 0": remapped((24, 32), 0)}
MANIFEST = {
    "a list": lambda c: b"[1]\n" + c, "path ..": swap(b"images/000", b"../../x"),
    "bytes word": swap(b'"bytes": ', b'"bytes": "x", "b": '),
    "sample ..": lambda c: c.replace(b'"sample": "', b'"sample": "../../'),
    "sample number": swap(b'"sample": "room_000/000"', b'"sample": 7'),
    "size words": swap(b'"size": [', b'"size": ["x", '), "path list": swap(b'"path": ', b'"path": [], "p": ')}
COLMAP = {
    "cameras": {
        "count 2**63": number("Q", 2**63, 0), "width 0": number("Q", 0, 16), "width 2**63": number("Q", 2**63, 16),
        "model 99": number("i", 99, 12),
        "fisheye": number("i", 5, 12), **{f"f {value}": number("d", value, 32) for value in (NAN, 0, -1, 1e300)}},
    "images": {
        "count 2**63": number("Q", 2**63, 0), "points 2**40": number("Q", 2**40, 80),
        "points 2**63": number("Q", 2**63, 80),
        "name ..": swap(b"000.png", b"../x.p\0"), "name line": swap(b"000.png", b"00\n.png"),
        "name latin": swap(b"000.png", b"00\xe9.png"),
        "t nan": number("d", NAN, 44), "t 1e300": number("d", 1e300, 44)},
    "points3D": {
        "count 2**63": number("Q", 2**63, 0), "track 2**63": number("Q", 2**63, 51),
        "track 2**60": number("Q", 2**60, 51),
        "x nan": number("d", NAN, 16), "x 1e300": number("d", 1e300, 16)}}

# ------------------------------------------------------------------------------------------- good inputs


def lay_out(folder, layout):
    """The files of a built-in room, as another program would have written them."""
    file = folder / "transforms.json"
    meta = json.loads(file.read_bytes()) | dict(k1=0.0)
    c2w = [np.array(frame["transform_matrix"]) * [1, -1, -1, 1] for frame in meta["frames"]]
    w2c, names = [np.linalg.inv(pose) for pose in c2w], [Path(frame["file_path"]).name for frame in meta["frames"]]
    camera = f, f, cx, cy = [meta[key] for key in ("fl_x", "fl_y", "cx", "cy")]
    file.unlink()
    if layout == "nerfstudio":
        Image.open(folder / "images" / names[1]).save(folder / "images" / "001.jpg")
        (folder / "images" / names[1]).unlink()
        text = json.dumps(meta).replace("images/001.png", "images/001.jpg")
        for kind in ("depth", "normals", "labels", "masks"):
            picture = np.asarray(Image.open(folder / kind / names[0]))
            np.save(folder / kind / "000.npy", picture / 127.5 - 1 if kind == "normals" else picture)
            text = text.replace(f"{kind}/000.png", f"{kind}/000.npy")
        file.write_text(text)
    if layout in ("instant-ngp", "scannet++"):
        keys, prefix = dict(camera_angle_x=1.1), "images/"
        if layout == "scannet++":
            keys, prefix = dict(fl_x=f, fl_y=f, cx=cx, cy=cy, w=32, h=24, is_fisheye=False), ""
            file = folder / "dslr" / "nerfstudio" / "transforms_undistorted.json"
            file.parent.mkdir(parents=True)
            (folder / "images").rename(folder / "dslr" / "undistorted_images")
        frames = [dict(file_path=prefix + name, transform_matrix=frame["transform_matrix"])
                  for name, frame in zip(names, meta["frames"])]
        file.write_text(json.dumps(keys | dict(frames=frames)))
    if layout.startswith("colmap"):
        shutil.rmtree(folder / "depth")
        quaternions = splat.rotation_to_quaternion(np.stack([pose[:3, :3] for pose in w2c])).tolist()
        points = np.random.default_rng(0).normal(size=(60, 3)) / 10
        points += np.mean([pose[:3, 3] + 2 * pose[:3, 2] for pose in c2w], 0)
        poses = [(q, pose[:3, 3].tolist()) for q, pose in zip(quaternions, w2c)]
        text = layout == "colmap text"
        write_colmap(folder, "PINHOLE", camera, (24, 32), names, points.tolist(), poses, text, range(60))
    if layout == "rgb-d":
        for n, name in enumerate(names):
            (folder / "images" / name).rename(folder / f"frame-{n:06d}.color.png")
            (folder / "depth" / name).rename(folder / f"frame-{n:06d}.depth.png")
            (folder / f"frame-{n:06d}.pose.txt").write_text("\n".join(" ".join(map(str, row)) for row in c2w[n]))
        (folder / "camera-intrinsics.txt").write_text(f"{f} 0 {cx}\n0 {f} {cy}\n0 0 1\n")
    if layout == "llff":
        columns = lambda pose: (pose[:3, 1], pose[:3, 0], -pose[:3, 2], pose[:3, 3], [24, 32, f])
        bounds = [[*np.column_stack(columns(pose)).ravel(), 1, 5] for pose in c2w]
        np.save(folder / "poses_bounds.npy", np.array(bounds))
    if layout == "pairs":
        line = *names[:2], 0, 0, *[f, 0, cx, 0, f, cy, 0, 0, 1] * 2, *(w2c[1] @ c2w[0]).ravel()
        (folder / "pairs.txt").write_text(" ".join(map(str, line)) + "\n")
    if layout == "photos":
        shutil.rmtree(folder / "depth"), shutil.rmtree(folder / "masks")


def small_run(folder, stop=None, **more):  # of the class that 04 and 06 use, with a very small network
    torch.manual_seed(0)
    net, generator = torch.nn.Linear(3, 2), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
    args = dict(out=str(folder), max_steps=4, resume=True, save_minutes=0, device="cpu", lr=0.1) | more
    run = distill.Run(argparse.Namespace(**args), {"net": dict(net.named_parameters())}, optimiser, generator=generator)
    for step in run:
        loss = net(torch.rand(4, 3, generator=generator)).square().mean()
        run.check(loss.item(), "the small run")
        loss.backward(), optimiser.step(), optimiser.zero_grad()
        run.log(loss=loss.item())
        if step + 1 == stop:
            return run  # as if it were killed here
    return list(net.parameters())


def small_vit():
    return lift.VisionTransformer(patch=4, dim=16, depth=1, heads=1, registers=1, grid=4, mlp_ratio=2)


def make_good(root):
    data.make_rooms(root / "rooms", scenes=1, views=4, size=(24, 32), seed=0)
    for layout in {row[0] for row in TABLE} - {"weights", "operator", "cache", "run"}:
        shutil.copytree(root / "rooms" / "room_000", root / layout)
        lay_out(root / layout, layout)
    torch.manual_seed(0)
    vit, weights = small_vit(), root / "weights"
    tensors = {name: x.detach() for name, x in vit.state_dict().items()}
    lift.save_vit(vit, weights / "vit")
    (weights / "vit.pth").write_bytes(torch_file(tensors))
    (weights / "old.pth").write_bytes(torch_file(tensors, _use_new_zipfile_serialization=False))
    for n in "12":
        lift.save_tensors(weights / "shards" / f"model-{n}-of-2.safetensors", tensors)
    mvsplat = lift.MVSplat(lift.MVSplatConfig(8, 8, 8, 8, 0, (8, 8, 8), 1))
    mvsplat = {f"encoder.{name}": x for name, x in mvsplat.state_dict().items()}
    (weights / "re10k.ckpt").write_bytes(torch_file(dict(state_dict=mvsplat)))
    config = d3r.StudentConfig(8, 16, 1, 1, 2, 0, 4, 16, 1, 4, (8, 8, 8, 8), 8, False, (24, 32))
    d3r.save_student(d3r.Student(config), weights / "student")
    parts = ([[0, 1], [2, 3]], (4, 8)), ([[0, 1], [0, 0]], (4, 1)), ([[0, 0], [1, 4]], (1, 8))
    matrices = [splat.sparse(*torch.tensor(at), torch.ones(2), size) for at, size in parts]
    whole = splat.SplatOperator(*matrices, torch.ones(4, dtype=torch.bool))
    splat.save_operator(whole, root / "operator" / "operator.safetensors")
    shutil.copytree(root / "rooms", root / "cache" / "rooms")
    teacher = importlib.import_module("tiny.teacher").GeometricTeacher((24, 32))
    d3r.write_cache(teacher, root / "cache" / "rooms", root / "cache" / "cache", (24, 32), 4, 1)
    (root / "cache" / "cache" / "root.json").write_text(json.dumps("rooms") + 20 * " ")
    small_run(root / "run" / "run", 3, resume=False)


# ------------------------------------------------------------------------------------------- what a user calls


def views_of(scene):
    return [scene.view(i, (24, 32)) for i in range(len(scene))]


def scenes(folder):
    found = data.load_scenes(folder)[0]
    print("\n".join(found.notes))
    return views_of(found), found.depth_range, found.class_names


def photos(folder):
    lines = d3r.make_manifest(folder, 4, 1)
    return [view.image for view in d3r.load_views(folder, lines, lambda *size: (24, 32), maps=False)]


def plain(folder):
    parts = probe.plain_folder(folder, argparse.Namespace(depth_scale=1e-3))
    return [views_of(scene) for part in parts for scene in part]


def pairs(folder):
    return [views_of(scene) for scene in probe.read_pairs(folder / "pairs.txt", argparse.Namespace(depth_scale=1e-3))]


def network(load_it, name):
    def door(folder):
        model = load_it(folder / name)
        return dict(model.state_dict()), [vars(model).get(key) for key in ("heads", "grid", "config")]
    return door


def operator(folder):
    found = splat.load_operator(folder / "operator.safetensors")
    return found(torch.ones(8, 3)), found.valid, [x.shape for x in found]


def save_operator(folder):
    splat.save_operator(splat.load_operator(folder / "operator.safetensors"), folder / "operator.safetensors")


def cached(folder):
    os.chdir(folder)  # root.json names the rooms from here
    args = d3r.parse("train --out . --preset tiny --size 24 32".split())
    return list(d3r.cached_part(args, "train", d3r.source_of(args)))


def command(main, *words):  # a {} in words is the folder
    return lambda folder: main([word.replace("{}", str(folder)) for word in words])


def two_runs(folder):  # the second begins in another process while the first goes on, and must refuse
    first = small_run(folder / "two", 1, save_minutes=9, resume=False)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(small_run, [folder / "two"], dict(resume=False))
    return id(first), time.time()


def rows(folder):
    make = lambda start, end: {"depth": torch.ones(4, 100, 100)}
    return probe.on_disk(folder / "views" / "x", {"depth": ((100, 100), torch.float32)}, 4, make, "views")["depth"][:]


KINDS = "depth", "masks", "normals", "labels"
LINKS = {key: NAMES[key] for key in ("..", "newline", "zero", "surrogate", "device")}
POSE = "frames.2.transform_matrix frames.2.transform_matrix.0 frames.2.transform_matrix.1.2"
SIDES = "x", "inf", "-7", "0"
VIT, STUDENT = network(lift.load_vit, "vit"), network(d3r.load_student, "student")
RESUMED = lambda folder: small_run(folder / "run")
TABLE = [  # folder of good files, the one that is broken or written, what is called, ways
    ("nerfstudio", "transforms.json", scenes, BYTES | FLIPS | TEXT | FILES | edits(f"w h fl_x cx k1 frames {POSE}")
     | edits("frames.2.file_path", NAMES) | edits("depth_unit_scale_factor class_names camera_model frames.3", FEW)
     | edits("frames.2.depth_file_path", LINKS)),
    *(("nerfstudio", f"images/{name}", scenes, BYTES | FLIPS | FILES | PICTURES) for name in ("000.png", "001.jpg")),
    *(("nerfstudio", f"{kind}/002.png", scenes, SOME | PICTURES | PIPE) for kind in KINDS),
    *(("nerfstudio", f"{kind}/000.npy", scenes, SOME | FILES | ARRAYS) for kind in KINDS),
    ("instant-ngp", "transforms.json", scenes, edits("camera_angle_x") | edits("frames.2.file_path", NAMES)),
    ("scannet++", "dslr/nerfstudio/transforms_undistorted.json", scenes,
     SOME | edits("is_fisheye fl_y") | edits("frames.2.file_path", NAMES)),
    *(("colmap binary", f"sparse/0/{name}.bin", scenes, BYTES | FLIPS | FILES | COLMAP[name]) for name in COLMAP),
    ("colmap text", "sparse/0/cameras.txt", scenes,
     BYTES | TEXT | FILES | PIPE | words(1, 0, 1, 4, 6) | words(1, 2, 3, values=SIDES)),
    ("colmap text", "sparse/0/images.txt", scenes,
     SOME | TEXT | words(1, 0, 1, 5, 8) | {"name ..": swap(b"000.png", b"../../x.png")}),
    ("colmap text", "sparse/0/points3D.txt", scenes, SOME | TEXT | words(1, 0, 1)),
    ("rgb-d", "frame-000001.pose.txt", scenes, BYTES | TEXT | FILES | words(0, 0, 3)),
    ("rgb-d", "camera-intrinsics.txt", scenes, BYTES | TEXT | FILES | words(0, 0, 2)),
    ("rgb-d", "frame-000001.depth.png", scenes, SOME | FILES | PICTURES),
    ("llff", "poses_bounds.npy", scenes, BYTES | FILES | ARRAYS | flips(0, 0.005, 0.03, 0.06, 0.1) | LLFF),
    ("photos", "images/001.png", photos, SOME | FLIPS | FILES | PICTURES | PIPE),
    ("plain", "images/001.png", plain, SOME | FILES | PICTURES),
    ("pairs", "pairs.txt", pairs, BYTES | TEXT | FILES | words(0, 0, 2, 4, 20, 30, 37) | {
        "name ..": swap(b"000.png", b"../../x.png"), "name zero": swap(b"000.png", b"\0.png"),
        "name itself": swap(b"000.png", b".")}),
    ("weights", "vit/model.safetensors", VIT, BYTES | flips(0, 0.001, 0.02, 0.06) | FILES | SAFE | FLOATS),
    ("weights", "vit/config.json", VIT, SOME | TEXT | FILES | edits("num_attention_heads positions", FEW)),
    ("weights", "vit.pth", network(lift.load_vit, "vit.pth"), BYTES | FLIPS | FILES | TORCH),
    ("weights", "old.pth", network(lift.load_vit, "old.pth"), SOME | flips(0, 0.001, 0.003, 0.01)),
    ("weights", "re10k.ckpt", network(lift.load_mvsplat, "re10k.ckpt"), BYTES | FLIPS | TORCH),
    ("weights", "shards/model-1-of-2.safetensors", network(lift.load_vit, "shards"), SOME),
    ("weights", "student/model.safetensors", STUDENT, SOME | SAFE | FLOATS),
    ("weights", "student/config.json", STUDENT,
     SOME | TEXT | FILES | PIPE | edits("patch enc_dim dec_heads features widths size grid", FEW)),
    ("weights", "vit", lambda folder: lift.save_vit(small_vit(), folder / "vit"), DISKS),
    ("operator", "operator.safetensors", operator,
     BYTES | flips(0, 0.02, 0.1, 0.25, 0.4, 0.55) | FILES | SAFE | OPERATOR),
    ("operator", "operator.safetensors", save_operator, DISKS),
    ("cache", "cache/room_000/000.safetensors", cached, BYTES | FLIPS | FILES | PIPE | SAFE | SAMPLE),
    ("cache", "cache/manifest.jsonl", cached, BYTES | TEXT | FILES | PIPE | MANIFEST),
    ("cache", "cache/root.json", cached, SOME | TEXT | FILES | {"null": lambda c: b"null", "a list": lambda c: b"[1]"}),
    ("cache", "new",
     command(d3r.main, *"cache --scene_dir {}/rooms --out {}/new --size 24 32 --views 4".split()), DISKS),
    ("run", "run/checkpoint.safetensors", RESUMED, BYTES | flips(0, 0.02, 0.1, 0.3, 0.5) | FILES | SAFE | RUN),
    ("run", "run/log.jsonl", RESUMED, SOME | TEXT | FILES | LOG), ("run", "run/settings.json", RESUMED, SOME | FILES),
    ("run", "run", RESUMED, DISKS),
    ("run", "two", two_runs, ALONE),
    ("rgb-d", "made", lambda folder: data.make_rooms(folder / "made", 2, 4, (24, 32)), DISKS),
    ("photos", "views", rows, DISKS),
    ("rgb-d", "out", command(data.main, "--scene_dir", "{}", "--out", "{}/out"), DISKS)]
CASES = {f"{folder} / {file} / {name}": (folder, file, door, way)
         for folder, file, door, ways in TABLE for name, way in ways.items()}
OF_PATHS = [way for ways in (FILES, PIPE, DISKS, ALONE) for way in ways.values()]

# ------------------------------------------------------------------------------------------- the judge


def numbers(x):  # of whatever is handed back, as bytes that can be compared
    if isinstance(x, torch.Tensor):
        x = x.detach().to_dense().contiguous().numpy()
    if isinstance(x, np.ndarray):
        return f"{x.dtype} {x.shape}".encode() + x.tobytes()
    x = sorted(x.items()) if isinstance(x, dict) else x
    return b"(" + b" ".join(map(numbers, x)) + b")" if isinstance(x, (list, tuple)) else repr(x).encode()


def files_in(folder):  # {path: what is there}, of files that must not be lost
    found = [path for path in folder.rglob("*") if path.name not in ("log.jsonl", "settings.json")]
    found = [path for path in found if path.is_symlink() or path.is_file()]
    content = lambda path: hashlib.sha256(path.read_bytes()).digest()
    return {path: os.readlink(path) if path.is_symlink() else content(path) for path in found}


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang


def call(door, folder, seconds=SECONDS):  # -> how it ended, what it said, its numbers
    for cache in [value for stage in STAGES for value in vars(stage).values() if hasattr(value, "cache_clear")]:
        cache.cache_clear()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with contextlib.redirect_stdout(told := io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with data.explained(argparse.Namespace(device="cpu", out="elsewhere"), "the same command starts again"):
                found = numbers(door(folder))
        return "ended", told.getvalue(), found
    except SystemExit as error:
        return "refused", str(error), None
    except (Hang, MemoryError) as error:
        return "too much", str(error), None
    except BaseException as error:
        return type(error).__name__, str(error), None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        full(resource.RLIM_INFINITY)(folder)
        os.chdir(folder.parent)


def outcome(case, good, folder, right):  # -> in some words, and what was said
    name, file, door, way = case
    shutil.copytree(good / name, folder)
    path = folder / file
    if way in OF_PATHS:
        way(path)
    else:
        content = path.read_bytes()
        path.write_bytes(way(content))
        assert path.read_bytes() != content, f"{case}: the input is as it was"
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), files_in(folder)
    how, said, found = call(door, folder)
    after, short = files_in(folder), said.replace(str(folder), "")[:300]
    if (folder / "code-was-run").exists() or (folder.parent / "code-was-run").exists():
        return "code was run", short
    if how == "ended":
        other = "noted" if door is scenes and said != right[1] else "wrong numbers"
        return "same" if found == right[2] else other, short
    if any(after.get(file) != was for file, was in before.items()):
        return "files changed", short
    if [file for file in after if file not in before and file.match(".*.*")]:
        return "left over", short
    if how == "refused" and not said.isprintable():
        return "not one line", short
    named = (path.name, str(folder), f"{path.parent.name}/{path.stem}", f"{path.parent.name}:", "rooms/")
    return "file not named" if how == "refused" and not any(name in said for name in named) else how, short


def work(good, wanted):
    signal.signal(signal.SIGPROF, hang)
    warnings.simplefilter("ignore")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (int(size + MEMORY), resource.RLIM_INFINITY))
    right = {}
    for n, (name, case) in enumerate(CASES.items()):
        if name not in wanted:
            continue
        key, folder = case[::2], good.parent / str(n)
        if key not in right:
            shutil.copytree(good / case[0], good.parent / f"good {n}")
            right[key] = call(case[2], good.parent / f"good {n}", 60)  # the first one imports much
            assert right[key][0] == "ended" or "shards" in name or case[3] in ALONE.values(), (name, right[key])
        print(json.dumps([name, "too much", ""]), flush=True)
        faulthandler.dump_traceback_later(30, exit=True)  # for what no signal ends
        print(json.dumps([name, *outcome(case, good, folder, right[key])]), flush=True)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder)


def judge(home, wanted):
    """-> {case: (outcome, what was said)}, from as many workers as it takes: a case may end one."""
    make_good(home / "good")
    found, left = {}, list(wanted)
    while left:
        process = [sys.executable, __file__, "--worker", str(home / "good")]
        worker = subprocess.run(process, input=json.dumps(left), capture_output=True, text=True, cwd=home)
        for name, what, said in map(json.loads, worker.stdout.splitlines()):
            legal = what == "wrong numbers" and any(re.search(pattern, name) for pattern in LEGAL)
            found[name] = "legal" if legal else what, said
        assert "Timeout" in worker.stderr or not worker.returncode, worker.stderr[-3000:]
        left = [name for name in left if name not in found]
    return found


def summary(found):
    counts = collections.defaultdict(collections.Counter)
    for name, (what, _) in found.items():
        counts[name.split(" / ")[0]].update([what])
        counts["all"].update([what])
    return "\n".join(f"{kind}: {count.total()} cases, " + ", ".join(f"{n} {what}" for what, n in count.most_common())
                     for kind, count in counts.items())


def test_broken_inputs_are_refused_in_one_line_or_harmless(tmp_path, capsys):
    """Every fourth case, with SLOW=1 all of them."""
    begin, found = time.monotonic(), judge(tmp_path, list(CASES)[::1 if os.environ.get("SLOW") else 4])
    with capsys.disabled():
        print(f"\n{summary(found)}\n{time.monotonic() - begin:.0f} s")
    assert len(found) >= 250
    assert not {name: outcome for name, outcome in found.items() if outcome[0] not in FINE}


ASKED = [  # stage, what it is told, what its one line says
    (distill, "--scene_dir no_such_folder", "no_such_folder: no such folder"),
    (distill, "--model no_such_weights", "no_such_weights: no such weights"),
    (distill, "--near 5 --far 3", "give --near and --far"),
    (distill, "--pixels 64", "fewer than 2x2 patches"), (distill, "--device cuda:99", "--device cuda:99"),
    (probe, "--scene_dir missing", "no such folder"), (probe, "--pixels 100", "fewer than 2x2 patches"),
    (probe, "--models nowhere.pth", "no such weights"),
    (d3r, "cache --images no_such_folder", "no_such_folder: no such folder"),
    (d3r, "cache --teacher no_such_weights", "no_such_weights: no such weights"),
    (d3r, "train", "run the cache command first"), (d3r, "cache --device cuda:99", "--device cuda:99"),
    (d3r, "infer", "no such weights; give 'tiny', the folder that `train` wrote"),
    (d3r, "eval --models student", "no such weights; give 'tiny', the folder that `train` wrote")]


@pytest.mark.parametrize("stage, words, says", ASKED)
def test_what_no_command_can_do_is_one_line(rooms_dir, tmp_path, stage, words, says):
    given = [*words.split(), "--out", tmp_path / "out", *["--preset", "tiny"] * (stage is not probe)]
    given += ["--scene_dir", rooms_dir] * ("--images" not in given and "--scene_dir" not in given)
    assert says in stopping.refusal(stage.main, *given)
    assert stage is d3r or not (tmp_path / "out").exists()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), set(json.load(sys.stdin)))
    else:
        with tempfile.TemporaryDirectory() as home:
            cases = judge(Path(home), [name for name in CASES if all(word in name for word in sys.argv[1:])])
        print("\n".join(f"{what}  {name}: {said!r}" for name, (what, said) in cases.items()), summary(cases), sep="\n")
