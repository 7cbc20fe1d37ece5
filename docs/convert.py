"""Turns public data sets, as people download them, into the folders that the stages read.

Run     python docs/convert.py nyuv2 downloads/nyuv2 nyuv2
        docs/reproduce.md says for each data set what to download, and what to run next
In      a folder of downloads; --help says what must lie in it
Out     images/ depth/ normals/ labels/ in train/ and val/ for 05_probe.py, a list of pairs, or scenes for 01_data.py
Not     downloading; MATLAB, HDF5 and .pth files, which need their owners' tools (the error message has the command)

Files that need no change become hard links, which take no space, or copies where the two folders lie on different
disks. Every file is written whole or not at all, so the same command goes on after an interruption. Random splits are
those of seed 0.
"""
from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import random
import re
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
data = importlib.import_module("01_data")

NYU_CAMERA = 518.86, 519.47, 325.58, 253.74  # fx, fy, cx, cy of the 640x480 frames
EXPORT_NYU = ("""python -c "import h5py, numpy as np; f = h5py.File('nyu_depth_v2_labeled.mat'); """
              """np.save('images.npy', f['images'][:].transpose(0, 3, 2, 1)); """
              """np.save('depths.npy', f['depths'][:].transpose(0, 2, 1))" """)
SCANNET_SIZE = 1296, 968  # of the colour pictures that SuperGlue's intrinsics are for
DTU_TEST = 1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118  # numbers of scans

# ------------------------------------------------------------------------------------------------ common to all


def wanted(path, remedy):
    """`path`, which must exist."""
    if not path.exists():
        raise data.DataError(f"{path} does not exist; {remedy}")
    return path


def found(folder, pattern, remedy):
    """The files of this pattern anywhere in a folder, at least one."""
    files = sorted(folder.rglob(pattern))
    if not files:
        raise data.DataError(f"{folder}: no {pattern} in it; {remedy}")
    return files


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def depth_png(depth, units) -> bytes:  # `units` of it make one of the unit of `depth`
    return png((units * depth).round().astype(np.uint16))


def text(content) -> bytes:
    return (content if isinstance(content, str) else json.dumps(content, indent=1)).encode()


def random_split(items, share) -> dict:
    """{item: "train" or "val"}, of which `share` are for training, chosen at random."""
    mixed = random.Random(0).sample(items, len(items))
    return {item: "train" if n < share * len(items) else "val" for n, item in enumerate(mixed)}


def image_and_maps(part, name, image, **maps):
    """The jobs of one image of a probing folder and of those of its maps that exist. `name` has no ending."""
    yield f"{part}/images/{name}{image.suffix.lower()}", image
    for kind, file in maps.items():
        if file is not None:
            yield f"{part}/{kind}/{name}.png", file


def ids_at_size(ids, image):  # a picture of ids, at the size of its image
    with Image.open(ids) as stored, Image.open(image) as picture:
        return ids if stored.size == picture.size else png(np.asarray(stored.resize(picture.size, Image.NEAREST)))


# ------------------------------------------------------------------------------------------------ the converters
# Each takes the folder of downloads and gives jobs: (path in the new folder, what goes there). What goes there is a
# file, bytes, or a function that makes one of the two, which is called only where the new file does not exist yet.


def nyuv2(source):
    """NYUv2's 795 training and 654 test images. Ground truth: depth in mm, 13 classes (0 = background), normals."""
    if not (source / "images.npy").exists():
        labelled = wanted(source / "nyu_depth_v2_labeled.mat", "download NYUv2's labelled set")
        raise data.DataError(f"{labelled}: an HDF5 file; pip install h5py, then in its folder: {EXPORT_NYU}")
    array = lambda name: np.load(wanted(source / name, f"in {source}: {EXPORT_NYU}"), "r")
    images, depths = array("images.npy"), array("depths.npy")
    normals = normals_of(source / "nyu_normals_gt.zip", depths)
    for part, archive in (("train", "nyuv2_train_class13.tgz"), ("val", "nyuv2_test_class13.tgz")):
        remedy = "take it from github.com/ankurhanda/nyuv2-meta-data"
        for n, labels in numbered(wanted(source / archive, remedy)).items():
            yield f"{part}/images/{n:04}.png", partial(png, images[n - 1])
            yield f"{part}/depth/{n:04}.png", partial(depth_png, depths[n - 1], 1000)
            yield f"{part}/labels/{n:04}.png", labels
            if n in normals:
                yield f"{part}/normals/{n:04}.png", normals[n]


def numbered(archive) -> dict:
    """{number at the end of its name: content} of the pictures in a .tgz."""
    with tarfile.open(archive) as tar:
        files = [(re.search(r"(\d+)\.png$", member.name), member) for member in tar if member.isfile()]
        return {int(name[1]): tar.extractfile(member).read() for name, member in files if name}


def normals_of(archive, depths) -> dict:
    """{number: function that gives the normals in our axes}; {} with a word where the archive is not there."""
    if not archive.exists():
        print(f"{archive} is not there: normals are left out")
        return {}
    opened = zipfile.ZipFile(archive)
    names = {int(n[1]): n.string for n in (re.search(r"(\d+)\.png$", name) for name in opened.namelist()) if n}
    stored = lambda n: np.asarray(Image.open(io.BytesIO(opened.read(names[n]))).convert("RGB")) / 127.5 - 1
    order, signs = axes_of([(stored(n), depths[n - 1]) for n in sorted(names)[:8]])

    def turned(n):
        normal = stored(n)[..., order] * signs
        known = np.abs(np.linalg.norm(normal, axis=-1) - 1) < 0.2  # others are no unit vectors: not measured
        return png(((normal + 1) * 127.5 * known[..., None]).round().astype(np.uint8))

    return {n: partial(turned, n) for n in names}


def axes_of(pairs):
    """Which stored axis, with which sign, is our x right, y down, z forward? The archive does not say, so the normals
    are compared with those of the depth maps. pairs: [(normals (H, W, 3), depth (H, W))] -> order (3,), signs (3,)."""
    flat = [(stored.reshape(-1, 3), depth_normals(depth).reshape(-1, 3)) for stored, depth in pairs]
    alike = sum(stored.T @ ours for stored, ours in flat)  # (stored axis, our axis)
    order = max(itertools.permutations(range(3)), key=lambda o: sum(abs(alike[a, k]) for k, a in enumerate(o)))
    return list(order), np.sign([alike[a, k] for k, a in enumerate(order)])


def depth_normals(depth):  # (H, W) metres -> (H, W, 3) towards the camera, from differences between neighbours
    fx, fy, cx, cy = np.array(NYU_CAMERA) * depth.shape[1] / 640
    rows, cols = np.mgrid[: depth.shape[0], : depth.shape[1]]
    points = np.stack([(cols - cx) / fx, (rows - cy) / fy, np.ones(depth.shape)], -1) * depth[..., None]
    normal = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True).clip(1e-12)


def scannet(source):
    """ScanNet's 25,000 frames, 80 % to train on (SnD A.6). Ground truth: depth in mm, NYU's 40 classes (0 = none)."""
    frames = [f for f in found(source, "*.jpg", "unzip scannet_frames_25k.zip there") if f.parent.name == "color"]
    for file, part in sorted(random_split(frames, 0.8).items()):
        scene = file.parents[1]
        label, depth = (scene / kind / f"{file.stem}.png" for kind in ("label", "depth"))
        labels = partial(ids_at_size, label, file) if label.exists() else None
        depth = wanted(depth, "unzip the archive again")
        yield from image_and_maps(part, f"{scene.name}/{file.stem}", file, depth=depth, labels=labels)


def scannet_pairs(source):
    """SuperGlue's 1,500 ScanNet pairs: the list, with intrinsics that fit the pictures at hand, images/ and depth/."""
    listed = found(source, "*pairs_with_gt.txt", "take scannet_test_pairs_with_gt.txt from SuperGlue's assets/")[0]
    scenes = {folder.parent.name: folder.parent for folder in source.rglob("color") if folder.is_dir()}
    lines, files = [], set()
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        names, values = line.split()[:2], line.split()[2:]
        parts = [re.fullmatch(r"(scene\d+_\d+)_frame-(\d+)\.jpg", name) for name in names]
        if not all(parts) or len(values) != 36:
            raise data.DataError(f"{listed}: line {number} is no pair as SuperGlue lists them; take the list again")
        pair = [scannet_frame(scenes.get(p[1], source / p[1]), int(p[2])) for p in parts]
        files.update(pair)
        K = [scannet_camera(values[2 + 9 * n : 11 + 9 * n], file) for n, file in enumerate(pair)]
        new = [f"{file.parents[1].name}/{file.name}" for file in pair]
        lines.append(" ".join(new + values[:2] + K + values[20:]))
    for file in sorted(files):
        scene, depth = file.parents[1], file.parents[1] / "depth" / f"{file.stem}.png"
        yield f"images/{scene.name}/{file.name}", file
        yield f"depth/{scene.name}/{depth.name}", wanted(depth, "export depth with the same tool")
    yield "pairs.txt", text("\n".join(lines) + "\n")


def scannet_frame(scene, number):
    remedy = f"export this scene's .sens with ScanNet's SensReader/python/reader.py into {scene}"
    return wanted(scene / "color" / f"{number}.jpg", remedy)


def scannet_camera(K, file) -> str:  # the nine numbers, for the size that the picture has
    with Image.open(file) as picture:
        across, down = (has / listed for has, listed in zip(picture.size, SCANNET_SIZE))
    scales = [across] * 3 + [down] * 3 + [1] * 3
    return " ".join(f"{float(k) * scale:.6g}" for k, scale in zip(K, scales))


UNDISTORT = "run ScanNet++'s toolkit: python -m dslr.undistort dslr/configs/undistort.yml"


def scannetpp(source):
    """ScanNet++'s undistorted DSLR images: scenes/ to distil on, probe/ to probe on, in its split of 230 and 50."""
    ids, classes = rendered(source, "obj_ids/*/*.png", 0), rendered(source, "semantics/*/*.png", 0)
    depths = rendered(source, "*/dslr/render_depth/*.png", 2)
    for part in ("train", "val"):
        split = found(source, f"nvs_sem_{part}.txt", "download ScanNet++'s splits/")[0]
        for scene in split.read_text().split():
            dslr, frames = wanted(source / "data" / scene / "dslr", "download this scene"), []
            meta = json.loads(wanted(dslr / "nerfstudio/transforms_undistorted.json", UNDISTORT).read_text())
            for frame in meta["frames"]:
                if frame.get("is_bad"):
                    continue
                image = wanted(dslr / "undistorted_images" / frame["file_path"], UNDISTORT)
                name = image.name.split(".")[0]
                masks, labels = (maps.get((scene, name)) and partial(ids_at_size, maps[scene, name], image)
                                 for maps in (ids, classes))
                depth = depths.get((scene, name)) and partial(undistorted_depth, depths[scene, name], dslr)
                yield from image_and_maps(f"probe/{part}", f"{scene}/{name}", image, depth=depth, labels=labels)
                yield from image_and_maps(f"scenes/{part}/{scene}", name, image, depth=depth, masks=masks)
                frames.append({"file_path": f"images/{name}{image.suffix.lower()}",
                               "transform_matrix": frame["transform_matrix"]})
            yield f"scenes/{part}/{scene}/transforms.json", text(meta | {"frames": frames, "test_frames": []})


def rendered(source, pattern, up):
    """{(scene, image): map} of what the toolkit has rendered. A map's parent number `up` has the name of its scene."""
    maps = {(f.parents[up].name, f.name.split(".")[0]): f for f in source.glob(f"**/{pattern}")}
    if not maps:
        print(f"{source}: no {pattern} in it: left out (docs/reproduce.md has the toolkit's commands)")
    return maps


def undistorted_depth(depth, dslr):
    """A depth map as the undistorted camera sees it; the toolkit renders for the fisheye one. z-depth stays z-depth."""
    bent, new = (json.loads(wanted(dslr / "nerfstudio" / name, "download this scene again").read_text())
                 for name in ("transforms.json", "transforms_undistorted.json"))
    stored = np.asarray(Image.open(depth))
    rows, cols = np.mgrid[: new["h"], : new["w"]] + 0.5
    x, y = (cols - new["cx"]) / new["fl_x"], (rows - new["cy"]) / new["fl_y"]
    radius = np.hypot(x, y).clip(1e-9)
    angle = np.arctan(radius)
    bend = angle * (1 + sum(bent[f"k{n}"] * angle ** (2 * n) for n in (1, 2, 3, 4))) / radius  # OpenCV's fisheye
    u = np.floor((bent["fl_x"] * x * bend + bent["cx"]) * stored.shape[1] / bent["w"]).astype(int)
    v = np.floor((bent["fl_y"] * y * bend + bent["cy"]) * stored.shape[0] / bent["h"]).astype(int)
    inside = (u >= 0) & (u < stored.shape[1]) & (v >= 0) & (v < stored.shape[0])
    return png(np.where(inside, stored[np.where(inside, v, 0), np.where(inside, u, 0)], 0).astype(np.uint16))


def ade20k(source):
    """ADE20K's scene parsing benchmark: 20,210 and 2,000 images. Ground truth: 150 classes (0 = other)."""
    root = found(source, "objectInfo150.txt", "unzip ADEChallengeData2016.zip there")[0].parent
    for part, name in (("train", "training"), ("val", "validation")):
        for image in found(root / "images" / name, "*.jpg", "unzip the archive again"):
            labels = wanted(root / "annotations" / name / f"{image.stem}.png", "unzip the archive again")
            yield from image_and_maps(part, image.stem, image, labels=labels)


def voc2012(source):
    """Pascal VOC 2012: 1,464 and 1,449 images. Ground truth: 20 classes (0 = background, 255 = border)."""
    root = found(source, "ImageSets/Segmentation/train.txt", "untar VOCtrainval_11-May-2012.tar there")[0].parents[2]
    for part in ("train", "val"):
        for name in (root / f"ImageSets/Segmentation/{part}.txt").read_text().split():
            image = wanted(root / f"JPEGImages/{name}.jpg", "untar the archive again")
            labels = wanted(root / f"SegmentationClass/{name}.png", "untar the archive again")
            yield from image_and_maps(part, name, image, labels=labels)


def kitti(source):
    """KITTI's depth selection: 1,000 frames, 85 % to train on (SnD A.6). Ground truth: depth in 1/256 m."""
    remedy = "unzip data_depth_selection.zip there"
    images = [f for f in found(source, "*.png", remedy) if f.match("val_selection_cropped/image/*.png")]
    if not images:
        raise data.DataError(f"{source}: no val_selection_cropped/image/ in it; {remedy}")
    for image, part in sorted(random_split(images, 0.85).items()):
        depth = image.parents[1] / "groundtruth_depth" / image.name.replace("_sync_image_", "_sync_groundtruth_depth_")
        yield from image_and_maps(part, image.stem, image, depth=wanted(depth, remedy))


def seven_scenes(source):
    """7-Scenes' test sequences, a scene each, of every 20th frame, as Fast3R's evaluation takes them."""
    for split in found(source, "TestSplit.txt", "unzip the seven archives, and the sequences' own inside them"):
        scene = split.parent
        for number in re.findall(r"\d+", split.read_text()):
            sequence = scene / f"seq-{int(number):02}"
            poses = found(wanted(sequence, f"unzip {sequence}.zip"), "frame-*.pose.txt", "unzip the sequence again")
            for pose, end in itertools.product(poses[::20], ("color.png", "depth.png", "pose.txt")):
                file = wanted(pose.with_name(pose.name.replace("pose.txt", end)), "unzip the sequence again")
                yield f"{scene.name}_{sequence.name}/{file.name}", file


def dtu(source):
    """DTU's 22 test scans as MVSNet prepares them, a scene each, in mm, of every 5th view as in Fast3R's evaluation."""
    root = found(source, "Cameras/train/*_cam.txt", "unpack MVSNet's dtu_training archive there")[0].parents[2]
    scans = [f"scan{n}" for n in DTU_TEST if (root / f"Rectified/scan{n}_train").is_dir()]
    if not scans:
        raise data.DataError(f"{root}/Rectified: no scan1_train or other test scan in it; unpack the archive again")
    for scan in scans:
        frames = []
        for n in range(0, 49, 5):
            image = root / f"Rectified/{scan}_train/rect_{n + 1:03}_3_r5000.png"  # the fourth of seven lights
            yield f"{scan}/images/{n:03}.png", wanted(image, "unpack the archive again")
            yield f"{scan}/depth/{n:03}.png", partial(dtu_depth, root, scan, n)
            frames.append({"file_path": f"images/{n:03}.png"} | dtu_camera(root / f"Cameras/train/{n:08}_cam.txt"))
        yield f"{scan}/transforms.json", text({"depth_unit_scale_factor": 0.1, "frames": frames})


def dtu_camera(file) -> dict:
    """A frame of transforms.json. The file has world-to-camera and K of a quarter of the picture's size."""
    words = wanted(file, "unpack the archive again").read_text().split()
    w2c, K = np.array(words[1:17], float).reshape(4, 4), 4 * np.array(words[18:27], float).reshape(3, 3)
    pose = np.linalg.inv(w2c) @ data.OPENGL
    return dict(transform_matrix=pose.tolist(), fl_x=K[0, 0], fl_y=K[1, 1], cx=K[0, 2], cy=K[1, 2])


def dtu_depth(root, scan, n):
    """In tenths of a mm, 0 = no surface. 512x640 where Depths_raw is there, else the training set's 128x160."""
    raw = root / f"Depths_raw/{scan}"
    folder = raw if raw.is_dir() else root / f"Depths/{scan}_train"
    depth = read_pfm(wanted(folder / f"depth_map_{n:04}.pfm", "unpack Depths/, or Depths_raw.zip, beside Cameras/"))
    visible = folder / f"depth_visual_{n:04}.png"
    if visible.exists():
        depth = depth * (np.asarray(Image.open(visible)) > 10)
    if folder == raw:
        depth = depth[::2, ::2][44:556, 80:720]  # halved and cropped as MVSNet's pictures are
    return depth_png(depth, 10)


def read_pfm(file):
    kind, size, scale, pixels = file.read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    return np.frombuffer(pixels, "<f4" if float(scale) < 0 else ">f4").reshape(height, width)[::-1]


# ------------------------------------------------------------------------------------------------ the command

CONVERTERS = {  # name: function, what must lie in SOURCE
    "nyuv2": (nyuv2, "nyu_depth_v2_labeled.mat, nyuv2_{train,test}_class13.tgz, nyu_normals_gt.zip"),
    "scannet": (scannet, "scannet_frames_25k/, unzipped"),
    "scannet_pairs": (scannet_pairs, "scannet_test_pairs_with_gt.txt, and scene0707_00/{color,depth}/ ..."),
    "scannetpp": (scannetpp, "data/, splits/, and what the toolkit has rendered (docs/reproduce.md)"),
    "ade20k": (ade20k, "ADEChallengeData2016/, unzipped"),
    "voc2012": (voc2012, "VOCdevkit/, untarred"),
    "kitti": (kitti, "depth_selection/, unzipped"),
    "7scenes": (seven_scenes, "chess/ ... stairs/, with TestSplit.txt and seq-*/ in each"),
    "dtu": (dtu, "mvs_training/dtu/ of MVSNet, and if you like Depths_raw/ in it"),
}


def put(path, content):
    """Writes one file whole, as a hard link where `content` is a file on the same disk."""
    content = content() if callable(content) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        try:
            return os.link(content.resolve(), path)
        except OSError:  # another disk, or a file system without links
            content = content.read_bytes()
    data.write_whole(path, content)


def parse(argv):
    listed = "\n".join(f"  {name:15}{what}" for name, (_, what) in CONVERTERS.items())
    parser = argparse.ArgumentParser(description="Public data sets, as downloaded, for the stages.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"what must lie in SOURCE:\n{listed}")
    parser.add_argument("dataset", choices=CONVERTERS)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the unpacked downloads")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args, written, kept = parse(argv), 0, 0
    try:
        jobs = CONVERTERS[args.dataset][0](wanted(args.source, "give the folder of the downloads"))
        for name, content in tqdm(jobs, unit="file"):
            if (args.out / name).exists():
                kept += 1
            else:
                put(args.out / name, content)
                written += 1
    except (data.DataError, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        sys.exit(f"{args.dataset}: {error}" + "; the same command goes on" * isinstance(error, OSError))
    print(f"{args.dataset}: {written} files written, {kept} were there  ->  {args.out}")


if __name__ == "__main__":
    main()
