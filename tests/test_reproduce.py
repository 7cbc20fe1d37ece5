"""docs/convert.py on a small imitation of each data set as it is downloaded, read back by the stage that would use it;
and the commands of docs/reproduce.md, which the stages must accept."""
import importlib
import io
import json
import re
import shlex
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
convert = importlib.import_module("convert")
data, probe = (importlib.import_module(name) for name in ("01_data", "05_probe"))
STAGES = {name: importlib.import_module(name) for name in ("04_distill", "05_probe", "06_distill3r")}


@pytest.fixture(scope="module")
def views(rooms):
    """Six views of a built-in room, with true depth, normals, masks and labels: what the imitations are made of."""
    return [rooms[0].view(i) for i in range(6)]


def pixels(view):
    return (255 * view.image).round().byte().permute(1, 2, 0).numpy()


def millimetres(view):
    return (1000 * view.depth).round().numpy().astype(np.uint16)


def labels(view):
    return view.label.numpy().astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **{"quality": 100, "subsampling": 0} if path.suffix.lower() == ".jpg" else {})


def converted(name, source, out):
    convert.main([name, str(source), str(out)])
    return out


def opened(folder, *flags):
    """{"train" or "val": the Scene that 05_probe.py would use}."""
    train, val = probe.open_split(probe.parse(["--scene_dir", str(folder), *flags]))
    return {"train": train[0], "val": val[0]}


def same_view(found, true, depth=True, label=True, near=0.0, coarse=6e-4):
    assert 255 * (found.image - true.image).abs().mean() <= near
    if depth:
        assert np.allclose(found.depth, true.depth, atol=coarse)
    if label:
        assert (found.label == true.label).all()


# ------------------------------------------------------------------------------------------------ images to probe on


def nyuv2(folder, views):
    folder.mkdir()
    np.save(folder / "images.npy", np.stack([pixels(v) for v in views]))
    np.save(folder / "depths.npy", np.stack([v.depth.numpy() for v in views]))
    for part, numbers in (("train", (1, 3, 4)), ("test", (2, 5, 6))):
        with tarfile.open(folder / f"nyuv2_{part}_class13.tgz", "w:gz") as tar:
            for n in numbers:
                content = convert.png(labels(views[n - 1]))
                member = tarfile.TarInfo(f"./new_nyu_class13_{n:04}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / "nyu_normals_gt.zip", "w") as archive:  # stored with other axes than ours
        for n, view in enumerate(views, 1):
            turned = view.normal.numpy()[..., [0, 2, 1]] * [-1, -1, 1]
            turned[:5] = 0  # not measured
            archive.writestr(f"train/{n:05}.png", convert.png(((turned + 1) * 127.5).round().astype(np.uint8)))


def ade20k(folder, views):
    root = folder / "ADEChallengeData2016"
    root.mkdir(parents=True)
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    for n, (part, short) in enumerate(2 * [("training", "train")] + 2 * [("validation", "val")]):
        save(root / f"images/{part}/ADE_{short}_{n:08}.jpg", pixels(views[n]))
        save(root / f"annotations/{part}/ADE_{short}_{n:08}.png", labels(views[n]))


def voc2012(folder, views):
    root = folder / "VOCdevkit/VOC2012"
    (root / "ImageSets/Segmentation").mkdir(parents=True), (root / "SegmentationClass").mkdir()
    for part, numbers in (("train", (0, 1)), ("val", (2, 3))):
        (root / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"2007_{n:06}\n" for n in numbers))
    for n, view in enumerate(views):  # also pictures that neither list names
        save(root / f"JPEGImages/2007_{n:06}.jpg", pixels(view))
        classes = Image.fromarray(labels(view), "P")
        classes.putpalette([7 * i % 256 for i in range(768)])
        classes.save(root / f"SegmentationClass/2007_{n:06}.png")


def kitti(folder, views):
    for n in range(20):
        drive = f"2011_09_26_drive_0002_sync_{{}}_{n:010}_image_02.png"
        root = folder / "depth_selection/val_selection_cropped"
        save(root / "image" / drive.format("image"), pixels(views[n % 6]))
        depth = (256 * views[n % 6].depth).round().numpy().astype(np.uint16)
        save(root / "groundtruth_depth" / drive.format("groundtruth_depth"), depth)


IMAGES = {  # data set: (its imitation, flags, what is compared, names and which of the views they are, in both parts)
    "nyuv2": (nyuv2, "--max_depth 10 --ignore_label 0", {}, lambda name: int(name) - 1, ([0, 2, 3], [1, 4, 5])),
    "ade20k": (ade20k, "--ignore_label 0", dict(depth=False, near=1), lambda name: int(name[-8:]), ([0, 1], [2, 3])),
    "voc2012": (voc2012, "", dict(depth=False, near=1), lambda name: int(name[-6:]), ([0, 1], [2, 3])),
    "kitti": (kitti, "--depth_scale 0.00390625", dict(label=False, coarse=0.002, near=0.1),
              lambda name: int(name.split("_")[7]), (None, None))}  # drawn at random


@pytest.mark.parametrize("name", IMAGES)
def test_images_to_probe_on(views, tmp_path, name):
    imitate, flags, how, number_of, parts = IMAGES[name]
    imitate(tmp_path / "from", views)
    scenes = opened(converted(name, tmp_path / "from", tmp_path / "to"), *flags.split())
    for scene, wanted, count in zip(scenes.values(), parts, (17, 3)):
        numbers = [number_of(frame.name) for frame in scene.frames]
        assert numbers == wanted or wanted is None and len(numbers) == count
        for i, n in enumerate(numbers):
            same_view(found := scene.view(i), views[n % 6], **how)
            if name == "nyuv2":
                assert (found.normal[:5] == 0).all() and (found.normal[5:] * views[n].normal[5:]).sum(-1).min() > 0.99


def test_nyuv2_as_matlab_has_it(tmp_path):
    with pytest.raises(SystemExit, match="does not exist; download NYUv2's labelled set"):
        convert.main(["nyuv2", str(tmp_path), str(tmp_path / "to")])
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 7.3 MAT-file")
    with pytest.raises(SystemExit, match="nyu_depth_v2_labeled.mat: an HDF5 file; pip install h5py, .*np.save"):
        convert.main(["nyuv2", str(tmp_path), str(tmp_path / "to")])


def test_scannet(views, tmp_path):
    scene = tmp_path / "from/scannet_frames_25k/scene0000_00"
    for n in range(10):
        view = views[n % 6]
        save(scene / f"color/{100 * n:06}.jpg", pixels(view))
        save(scene / f"depth/{100 * n:06}.png", millimetres(view)[::2, ::2])  # half as large, as ScanNet's depth is
        save(scene / f"label/{100 * n:06}.png", labels(view) if n else labels(view)[::2, ::2])  # the first is too small
    scenes = opened(converted("scannet", tmp_path / "from", tmp_path / "to"))
    assert (len(scenes["train"]), len(scenes["val"])) == (8, 2)
    for part in scenes.values():
        for i, frame in enumerate(part.frames):
            n = int(frame.name) // 100
            found, true = part.view(i), views[n % 6]
            same_view(found, true, depth=False, label=n > 0, near=1)
            assert np.allclose(found.depth[::2, ::2], true.depth[::2, ::2], atol=6e-4)
            assert (found.label[::2, ::2] == true.label[::2, ::2]).all()


def test_scannet_pairs(views, tmp_path):
    source = tmp_path / "from"
    for n, view in zip((15, 30), views):
        save(source / f"scans_test/scene0707_00/color/{n}.jpg", pixels(view))
        save(source / f"scans_test/scene0707_00/depth/{n}.png", millimetres(view))
    K = np.diag([1296 / 128, 968 / 96, 1]) @ views[0].K.numpy()  # as if the pictures were ScanNet's 1296x968
    pose = np.linalg.inv(views[1].c2w.numpy()) @ views[0].c2w.numpy()
    numbers = [*K.ravel(), *K.ravel(), *pose.ravel()]
    names = "scene0707_00_frame-000015.jpg scene0707_00_frame-000030.jpg 0 0 "
    (source / "scannet_test_pairs_with_gt.txt").write_text(names + " ".join(map(str, numbers)) + "\n")
    listed = converted("scannet_pairs", source, tmp_path / "to") / "pairs.txt"
    _, (pair,) = probe.open_split(probe.parse(["--scene_dir", str(listed)]))
    for i in range(2):
        same_view(pair.view(i), views[i], label=False, near=1)
        assert np.allclose(pair.view(i).K, views[i].K, rtol=1e-4)
    assert np.allclose(np.linalg.inv(pair.c2w[1].numpy()) @ pair.c2w[0].numpy(), pose, atol=1e-5)
    (source / "scans_test/scene0707_00/color/30.jpg").unlink()
    with pytest.raises(SystemExit, match="30.jpg does not exist; export this scene's .sens"):
        convert.main(["scannet_pairs", str(source), str(tmp_path / "again")])


FISHEYE = dict(k1=-0.05, k2=0.02, k3=-0.01, k4=0.002, w=192, h=144, fl_x=110.0, fl_y=108.0, cx=97.0, cy=70.0)


def plane(x, y):  # z-depth in mm of a slanted plane along the ray (x, y, 1)
    return 2000 / (1 + 0.3 * x - 0.2 * y)


def fisheye_depth():
    """The plane as ScanNet++'s toolkit renders it, through the lens, which Newton's method inverts here."""
    k = [FISHEYE[f"k{n}"] for n in (1, 2, 3, 4)]
    rows, cols = np.mgrid[: FISHEYE["h"], : FISHEYE["w"]] + 0.5
    u, v = (cols - FISHEYE["cx"]) / FISHEYE["fl_x"], (rows - FISHEYE["cy"]) / FISHEYE["fl_y"]
    bent = np.hypot(u, v)
    angle = bent.copy()
    for _ in range(20):
        value = angle + sum(c * angle ** (2 * n + 3) for n, c in enumerate(k))
        angle -= (value - bent) / (1 + sum((2 * n + 3) * c * angle ** (2 * n + 2) for n, c in enumerate(k)))
    return plane(u * np.tan(angle) / bent, v * np.tan(angle) / bent).round().astype(np.uint16)


def test_scannetpp(rooms_dir, rooms, views, tmp_path):
    source, out = tmp_path / "from", tmp_path / "to"
    meta = json.loads((rooms_dir / rooms[0].name / "transforms.json").read_text())
    K = views[0].K.numpy().tolist()
    pinhole = dict(fl_x=K[0][0], fl_y=K[1][1], cx=K[0][2], cy=K[1][2], w=128, h=96, k1=0.0, k2=0.0, k3=0.0, k4=0.0)
    for part, scene in (("train", "0a5c013435"), ("val", "578511c8a9")):
        (source / "splits").mkdir(parents=True, exist_ok=True)
        (source / f"splits/nvs_sem_{part}.txt").write_text(f"{scene}\n")
        dslr, frames = source / f"data/{scene}/dslr", []
        for n, (view, frame) in enumerate(zip(views, meta["frames"])):
            name = f"DSC{n:05}"
            save(dslr / f"undistorted_images/{name}.JPG", pixels(view))
            ids = view.mask.numpy().astype(np.uint16)
            save(source / f"obj_ids/{scene}/{name}.JPG.png", ids.repeat(2, 0).repeat(2, 1))
            save(source / f"semantics/{scene}/{name}.JPG.png", labels(view).repeat(2, 0).repeat(2, 1))
            save(source / f"render/{scene}/dslr/render_depth/{name}.png", fisheye_depth())
            frames.append({"file_path": f"{name}.JPG", "transform_matrix": frame["transform_matrix"],
                           "mask_path": f"{name}.png", "is_bad": n == 5})
        (dslr / "nerfstudio").mkdir()
        for file, camera in (("transforms", FISHEYE), ("transforms_undistorted", pinhole)):
            content = camera | {"frames": frames, "test_frames": frames[:1]}
            (dslr / f"nerfstudio/{file}.json").write_text(json.dumps(content))
    converted("scannetpp", source, out)
    (scene,) = data.load_scenes(out / "scenes/train")
    assert len(scene) == 5  # one frame was bad
    same_view(found := scene.view(2), views[2], depth=False, label=False, near=1)
    assert (found.mask == views[2].mask).all()
    assert np.allclose(found.c2w, views[2].c2w, atol=1e-6) and np.allclose(found.K, K)
    rows, cols = np.mgrid[:96, :128] + 0.5
    true = plane((cols - K[0][2]) / K[0][0], (rows - K[1][2]) / K[1][1]) / 1000
    seen = found.depth.numpy() > 0
    assert seen.mean() > 0.9
    assert np.abs(found.depth.numpy() - true)[seen].max() < 0.02  # metres; half a pixel of the slanted plane
    scenes = opened(out / "probe")
    assert (len(scenes["train"]), len(scenes["val"])) == (5, 5)
    same_view(probed := scenes["val"].view(4), views[4], depth=False, near=1)
    assert (probed.depth == scene.view(4).depth).all()
    original = source / "data/578511c8a9/dslr/undistorted_images/DSC00004.JPG"
    assert (out / "probe/val/images/578511c8a9/DSC00004.jpg").samefile(original)  # a link takes no space


# ------------------------------------------------------------------------------------------------ scenes to reconstruct


def test_seven_scenes(tmp_path):
    source = tmp_path / "from"
    (source / "chess/seq-03").mkdir(parents=True)
    (source / "chess/TestSplit.txt").write_text("sequence3\n")
    for n in range(45):
        stem = source / f"chess/seq-03/frame-{n:06}"
        save(Path(f"{stem}.color.png"), np.full((480, 640, 3), n, np.uint8))
        save(Path(f"{stem}.depth.png"), np.full((480, 640), 2000, np.uint16))
        Path(f"{stem}.pose.txt").write_text(f"1 0 0 {n}\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (scene,) = data.load_scenes(converted("7scenes", source, tmp_path / "to"))
    assert scene.name == "chess_seq-03" and len(scene) == 3
    assert np.allclose(scene.c2w[:, 0, 3].diff(), 20) and (255 * scene.view(2).image).round().eq(40).all()
    depth = scene.view(2).depth
    assert depth[200:280, 280:360].eq(0).float().mean() < 0.1 and abs(depth[depth > 0].median() - 2) < 0.03


def pfm(array):
    return f"Pf\n{array.shape[1]} {array.shape[0]}\n-1.0\n".encode() + array[::-1].astype("<f4").tobytes()


@pytest.mark.parametrize("raw", [False, True])
def test_dtu(raw, views, tmp_path):
    root, out = tmp_path / "from/mvs_training/dtu", tmp_path / "to"
    (root / "Cameras/train").mkdir(parents=True)
    depth = np.linspace(500, 800, 512 * 640).reshape(512, 640)
    w2c = np.linalg.inv(views[0].c2w.numpy().astype(float))
    K = np.array([[361.5, 0, 82.9], [0, 360.4, 66.4], [0, 0, 1]])
    for n in range(49):
        rows = lambda m: "\n".join(" ".join(map(str, row)) for row in m)
        camera = f"extrinsic\n{rows(w2c)}\n\nintrinsic\n{rows(K)}\n\n425.0 2.5\n"
        (root / f"Cameras/train/{n:08}_cam.txt").write_text(camera)
    for n in range(0, 49, 5):
        save(root / f"Rectified/scan9_train/rect_{n + 1:03}_3_r5000.png", np.full((512, 640, 3), n, np.uint8))
        folder = root / "Depths/scan9_train"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"depth_map_{n:04}.pfm").write_bytes(pfm(depth[2::4, 2::4]))
        hidden = np.where(np.arange(160) < 40, 0, 255).astype(np.uint8)
        save(folder / f"depth_visual_{n:04}.png", hidden[None].repeat(128, 0))
        if raw:
            whole = np.zeros((600, 800))
            whole[44:556, 80:720] = depth
            (root / "Depths_raw/scan9").mkdir(parents=True, exist_ok=True)
            (root / f"Depths_raw/scan9/depth_map_{n:04}.pfm").write_bytes(pfm(whole.repeat(2, 0).repeat(2, 1)))
    (scene,) = data.load_scenes(converted("dtu", tmp_path / "from", out))
    assert scene.name == "scan9" and len(scene) == 10
    view = scene.view(3)
    assert (255 * view.image).round().eq(15).all() and np.allclose(view.c2w, views[0].c2w, atol=1e-5)
    assert np.allclose(view.K[:2], 4 * K[:2], rtol=1e-6)
    if raw:
        assert np.allclose(view.depth, depth, atol=0.051)
    else:
        assert (view.depth[:, :160] == 0).all()
        assert np.allclose(view.depth[2::4, 162::4], depth[2::4, 162::4], atol=0.051)


# ------------------------------------------------------------------------------------------------ the command


def test_goes_on_and_leaves_no_half_file(views, tmp_path, capsys, monkeypatch):
    nyuv2(tmp_path / "from", views)
    with monkeypatch.context() as patch:  # the disk is full after seven files
        written, whole = [], data.write_whole
        patch.setattr(data, "write_whole", lambda path, content: written.append(path) or whole(path, content)
                      if len(written) < 7 else (_ for _ in ()).throw(OSError(28, "No space left on device", str(path))))
        with pytest.raises(SystemExit, match="No space left on device: .*; the same command goes on"):
            converted("nyuv2", tmp_path / "from", tmp_path / "to")
    files = [f for f in (tmp_path / "to").rglob("*") if f.is_file()]
    assert sorted(files) == sorted(written) and all(Image.open(f).load() for f in files)
    capsys.readouterr()
    converted("nyuv2", tmp_path / "from", tmp_path / "to")
    assert "17 files written, 7 were there" in capsys.readouterr().out


@pytest.mark.parametrize("name", convert.CONVERTERS)
def test_an_empty_folder_is_one_line_with_a_remedy(name, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        convert.main([name, str(tmp_path), str(tmp_path / "to")])
    remedy = "(download|unzip|untar|unpack|take) .+"
    assert re.fullmatch(rf"{name}: {re.escape(str(tmp_path))}\S* .+; {remedy}", stopped.value.code)


def code_blocks():
    return re.findall(r"^```\n(.*?)^```", (ROOT / "docs/reproduce.md").read_text(), re.M | re.S)


def commands():
    """The commands in docs/reproduce.md that start a script of ours, as (script, arguments)."""
    lines = "".join(code_blocks()).replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:python|torchrun \S+) ((?:docs/|tests/)?\w+\.py) (.*)", line) for line in lines]
    return [(m[1], shlex.split(m[2])) for m in found if m]


def test_the_stages_accept_the_commands_of_the_recipes():
    for script, arguments in commands():
        if script == "docs/convert.py":
            convert.parse(arguments)
        else:
            STAGES[script.removesuffix(".py")].parse(arguments)
    assert {script for script, _ in commands()} == {"docs/convert.py", *(f"{name}.py" for name in STAGES)}
    assert {arguments[0] for script, arguments in commands() if script == "docs/convert.py"} == set(convert.CONVERTERS)


def test_what_the_recipes_convert_is_what_they_use():
    """Each folder that a command reads was written by a converter before."""
    made = {arguments[2] for script, arguments in commands() if script == "docs/convert.py"}
    for script, arguments in commands():
        if "--scene_dir" in arguments:
            folder = arguments[arguments.index("--scene_dir") + 1].split("/")
            assert folder[0] in made and "/".join(folder[1:]) in ("", "probe", "pairs.txt", "scenes/train"), arguments


def test_the_papers_numbers_are_the_papers():
    """Each number in a table of scores stands in a table of the paper, and in one row with those beside it."""
    papers = ROOT.parent / "shared/papers"
    if not papers.is_dir():
        pytest.skip(f"{papers}, the papers, are not here")
    rows = [re.findall(r"\d+\.\d+", line) for name in ("splat_and_distill", "distill3r")
            for line in (papers / f"{name}.txt").read_text().splitlines() if "\t" in line]
    lines = [line for line in (ROOT / "docs/reproduce.md").read_text().splitlines() if line.startswith("|")]
    scores = [numbers for line in lines if len(numbers := re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", line)) > 1]
    assert len(scores) > 40
    for numbers in scores:
        missing = set(numbers)
        for _ in range(3):  # a row of ours may join rows of three tables
            missing -= max((missing & set(row) for row in rows), key=len)
        assert not missing, numbers


def test_merging_mef(tmp_path):
    """The snippet that merges MEF's LoRA factors, on the built-in ViT and factors in MEF's layout."""
    lift, state = importlib.import_module("02_lift"), {"state_dict": {"refine_conv": {"weight": torch.zeros(1)}}}
    vit, g = lift.load_vit("tiny"), torch.Generator().manual_seed(0)
    C = vit.cls_token.shape[-1]
    for n in range(8):  # query and value of the last four blocks
        state |= {f"w_a_{n:03}": torch.randn(4, C, generator=g), f"w_b_{n:03}": torch.randn(C, 4, generator=g)}
    torch.save(state, tmp_path / "dinov2_small.ckpt")
    (code,) = [re.search(r"python -c '(.*)'", block, re.S)[1] for block in code_blocks() if "w_b_" in block]
    here = {"dinov2_vits14": "tiny", "dinov2_small.ckpt": tmp_path / "dinov2_small.ckpt", "mef_small": tmp_path / "mef"}
    for name, path in here.items():
        code = code.replace(f'"{name}"', f'"{path}"')
    exec(code, {})
    merged, x = lift.load_vit(tmp_path / "mef"), torch.randn(2, C, generator=g)
    for n, (block, start) in enumerate(zip(merged.blocks, vit.blocks)):
        added = (block.attn.qkv(x) - start.attn.qkv(x)).chunk(3, 1)
        m = 2 * (n - len(vit.blocks) + 4)
        none = torch.zeros_like(x)
        query, value = (x @ state[f"w_a_{k:03}"].T @ state[f"w_b_{k:03}"].T if m >= 0 else none for k in (m, m + 1))
        for found, wanted in zip(added, (query, none, value)):
            assert torch.allclose(found, wanted, atol=0.01)


def test_the_first_recipe_runs_on_the_imitation(views, tmp_path):
    """NYUv2 as docs/reproduce.md has it, with the built-in model, smaller images and two steps."""
    nyuv2(tmp_path / "downloads", views)
    folder = converted("nyuv2", tmp_path / "downloads", tmp_path / "nyuv2")
    arguments = next(arguments for script, arguments in commands() if script == "05_probe.py")
    at = arguments.index("--models")
    assert len(arguments[at:]) == 4  # the last flag, with three models
    arguments[arguments.index("--scene_dir") + 1] = str(folder)
    here = ["--max_steps", "2", "--pixels", "3072", "--device", "cpu", "--out", str(tmp_path / "out")]
    probe.main([*arguments[:at], "--models", "start=tiny", "fit3d=tiny+tiny", *here])
    scores = json.loads((tmp_path / "out/results.json").read_text())["scores"]
    for model in ("start", "fit3d"):
        assert {"depth", "normals", "segmentation"} <= set(scores[model])
