"""06_distill3r.py, the cache and what comes after the networks: every piece against a slow definition, files against damage."""
import importlib
import json
import math
import os
import random
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import killed

data, lift, d3r = (importlib.import_module(name) for name in ("01_data", "02_lift", "06_distill3r"))
Pointmap, DataError = d3r.Pointmap, data.DataError
FIXTURE = Path(__file__).parent / "fixtures/distill3r_cache.safetensors"
SMALL = (28, 42)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(folder, names, size=(48, 64), orientation=None):
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    for n, name in enumerate(names):
        y, x = np.mgrid[0:size[0], 0:size[1]]
        ramp = np.stack([255 * (x + 0.5) / size[1], 255 * (y + 0.5) / size[0], np.full(size, 10 * n % 255)], -1)
        Image.fromarray(ramp.round().astype(np.uint8)).save(folder / name, exif=exif)
    return folder


@pytest.fixture(scope="module")
def few_rooms(rooms_dir, tmp_path_factory):  # two rooms
    root = tmp_path_factory.mktemp("few") / "rooms"
    for name in ("room_000", "room_001"):
        shutil.copytree(rooms_dir / name, root / name)
    return root


@pytest.fixture(scope="module")
def cache(few_rooms, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, out, SMALL, views=5, stride=1)
    return out


# ------------------------------------------------------------------------------------------------ manifest


def test_the_manifest_is_in_natural_order_and_keeps_tails_and_short_scenes(tmp_path):
    root = tmp_path / "holiday"
    pictures(root / "video", [f"frame{n}.png" for n in random.Random(0).sample(range(1, 46), 45)], (12, 16))
    pictures(root / "few10", ["b.jpg", "a.jpg"])
    pictures(root / "few9", ["one.PNG"], (64, 48))
    lines = d3r.make_manifest(root, stride=1)
    samples = d3r.samples_of(lines)
    assert {name: len(part) for name, part in samples.items()} == {
        "few9/000": 1, "few10/000": 2, "video/000": 20, "video/001": 20, "video/002": 5}
    assert list(samples)[:2] == ["few9/000", "few10/000"]
    video = [line for line in lines if line["scene"] == "video"]
    assert [line["path"] for line in video] == [f"video/frame{n}.png" for n in range(1, 46)]
    assert [line["view"] for line in video] == [*range(20), *range(20), *range(5)]
    assert lines[0] == dict(dataset="holiday", scene="few9", sample="few9/000", view=0, size=[64, 48], path="few9/one.PNG",
                            bytes=(root / "few9/one.PNG").stat().st_size)


def test_the_manifest_of_a_posed_folder_lists_images_alone(few_rooms):
    lines = d3r.make_manifest(few_rooms, 5, stride=1)
    assert [len(part) for part in d3r.samples_of(lines).values()] == [5, 5, 2] * 2
    assert lines[3]["path"] == "room_000/images/003.png" and lines[3]["size"] == [96, 128]
    assert d3r.make_manifest(few_rooms / "room_001")[-1]["sample"] == "room_001/000"


def test_a_bad_folder_or_picture_is_one_line(tmp_path, capsys):
    with pytest.raises(DataError, match="no such folder"):
        d3r.make_manifest(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in here"):
        d3r.make_manifest(tmp_path / "empty")
    (pictures(tmp_path / "p", ["a.png"]) / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png: not a picture; restore it or pass --skip_bad_frames"):
        d3r.make_manifest(tmp_path / "p")
    (pictures(tmp_path / "p", ["c.jpg"]) / "c.jpg").write_bytes((tmp_path / "p/c.jpg").read_bytes()[:-200])  # cut off
    pictures(tmp_path / "p/.thumbnails", ["a.png"])
    assert [line["path"] for line in d3r.make_manifest(tmp_path / "p", skip_bad_frames=True)] == ["a.png"]
    assert "c.jpg: cannot be decoded" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", [*range(1, 9), b"junk", b"II*\0\x08"])
def test_photos_are_the_right_way_up_whatever_their_exif_says(tmp_path, orientation):
    """Pillow's own transposition is the truth where the note can be read; where it is damaged the picture is as stored."""
    picture, exif = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 4), np.uint8)), Image.Exif()
    picture.putalpha(255)  # RGBA: putting it on white loses the note
    if isinstance(orientation, bytes):
        exif = b"Exif\0\0" + orientation
    else:
        exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    found = d3r.Photos("one", [tmp_path / "a.png"])
    truth = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")) if isinstance(orientation, int) else picture)[..., :3]
    assert found.frames[0].size == truth.shape[:2]
    assert np.array_equal((255 * found.view(0).image).round().permute(1, 2, 0).numpy(), truth)


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)).save(tmp_path / "a.png")
    grey = d3r.Photos("one", [tmp_path / "a.png"]).view(0).image
    assert abs(grey.mean() - 0.5) < 0.01 and torch.equal(grey[0], grey[1])


def test_no_photo_is_lost_or_taken_for_a_map(tmp_path):
    root = tmp_path / "same"
    pictures(root, ["a.jpg"]), pictures(root / "same", ["b.jpg"]), pictures(root / "x" / "images", ["c.jpg"]), pictures(root / "x" / "masks", ["c.png"])
    assert sorted(line["path"] for line in d3r.make_manifest(root)) == ["a.jpg", "same/b.jpg", "x/images/c.jpg"]
    d3r.scene_folders.cache_clear()


def test_the_stride_leaves_half_an_overlap_and_fills_a_sample(tmp_path):
    wide = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 100, generator=generator()), (96, 800), mode="bicubic")[0]
    wide = (wide.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    for step, views, expected in ((16, 4, 4), (16, 10, 4), (16, 20, 2), (16, 30, 1), (128, 4, 1)):  # 128 wide: half at 64
        folder = tmp_path / f"{step}_{views}/video"
        folder.mkdir(parents=True)
        for n in range(41):
            left = step * n % 672
            Image.fromarray(wide[:, left:left + 128]).save(folder / f"{n}.png")
        lines = d3r.make_manifest(folder, views)
        assert [line["path"] for line in lines] == [f"{n}.png" for n in range(0, 41, expected)], (step, views)
    a, b = torch.rand(2, 24, 32, generator=generator()).numpy()
    assert d3r.picture_overlap(a, a) == 1 and d3r.picture_overlap(a, b) == 0 == d3r.picture_overlap(a, 0 * a)
    assert d3r.picture_overlap(a[:, :24], a[:, 8:]) == pytest.approx(16 / 24)
    assert d3r.picture_overlap(a[6:], a[:-6]) == pytest.approx(12 / 18)


def test_the_stride_of_posed_scenes_follows_their_frusta(rooms):
    scene = rooms[0]
    stride = d3r.choose_stride(scene, list(range(12)), 2)
    shared = lambda step: np.median([data.overlap(scene, i, i + step) for i in np.linspace(0, 11 - step, 8).astype(int)])
    assert 1 < stride <= 6 and shared(stride) >= 0.5 and (stride == 6 or shared(stride + 1) < 0.5)
    assert d3r.choose_stride(scene, list(range(12)), 20) == 1


# ------------------------------------------------------------------------------------------------ the same transform for both


class Painter:
    """Its points are the colours that it sees, so that targets can be compared with images."""
    identity = "painter"

    def __init__(self, view_size):
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
    cached = d3r.CachedViews(root, tmp_path / "cache")
    for sample, shape in zip((cached[i] for i in range(4)), (SMALL, SMALL[::-1], SMALL, SMALL)):
        (image,), (target,), (mask,) = sample.images, sample.targets, sample.masks
        assert image.shape[1:] == mask.shape == shape
        # A crop to whole patches may leave out the border; inside, a ramp is the same by any resampling.
        assert mask[2:-2, 2:-2].all()
        inner = torch.zeros_like(mask)
        inner[2:-2, 2:-2] = True
        assert (image.permute(1, 2, 0) - target.points_global)[inner].abs().max() < 0.012, sample.name
        assert (image.permute(1, 2, 0) - target.points_local / 2)[inner].abs().max() < 0.012
    square = cached[3].images[0]
    rows, cols = (float(square[c].max() - square[c].min()) for c in (1, 0))
    assert cols > 0.95 and rows == pytest.approx(SMALL[0] / SMALL[1] * cols, abs=0.04)  # cropped, not stretched


def test_resampling_is_bilinear_between_the_crops():
    """Against a float64 loop over target pixels."""
    picture, have, want = (60, 100), (32, 40), (20, 31)
    m = Pointmap(*torch.rand(2, *have, 3, generator=generator()), *(1 + torch.rand(2, *have, generator=generator())))
    got = d3r.resampled(m, picture, want)
    scales = [max(h / picture[0], w / picture[1]) for h, w in (have, want)]
    seen = 0
    for i, j in ((i, j) for i in range(want[0]) for j in range(want[1])):
        y, x = ((p + 0.5 - n / 2) * scales[0] / scales[1] + h / 2 - 0.5 for p, n, h in zip((i, j), want, have))
        if not (-0.5 <= y <= have[0] - 0.5 and -0.5 <= x <= have[1] - 0.5):
            assert got.points_local[i, j].isnan().all() and got.points_global[i, j].isnan().all()
            continue
        seen += 1
        total = np.zeros(3)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            r, c = int(np.floor(y)) + dy, int(np.floor(x)) + dx
            w = (1 - abs(y - r)) * (1 - abs(x - c))
            total += w * m.points_global[min(max(r, 0), have[0] - 1), min(max(c, 0), have[1] - 1)].double().numpy()
        assert np.abs(total - got.points_global[i, j].numpy()).max() < 1e-5
    assert 0.7 * want[0] * want[1] < seen < 0.9 * want[0] * want[1]
    assert d3r.resampled(m, picture, have) is m


# ------------------------------------------------------------------------------------------------ coding


def nasty_maps(kind, shape=(17, 23)):
    g = np.random.default_rng(0)
    if kind == "room":
        depth = torch.full(shape, 3.0)
        depth[5:12, 6:14] = 1.2
        K = torch.tensor([[20.0, 0, shape[1] / 2], [0, 20.0, shape[0] / 2], [0, 0, 1]])
        view = data.View("v", None, K, torch.eye(4), None, depth, None, None)
        m = d3r.GeometricTeacher(shape)([view, view], generator())[1]
        maps = torch.cat([m.points_local, m.points_global, m.conf_local[..., None], m.conf_global[..., None]], -1)
        return maps.permute(2, 0, 1).half().numpy()
    if kind == "bits":  # any finite float16, -0.0, subnormals and the largest among them
        bits = g.integers(0, 2**16, (8, *shape), dtype=np.uint16)
        return np.where((bits & 0x7C00) == 0x7C00, 0x8000, bits).astype(np.uint16).view(np.float16)
    return np.zeros((8, *shape), np.float16) if kind == "zero" else np.full((8, *shape), -65504, np.float16)


@pytest.mark.parametrize("kind", ["room", "bits", "zero", "huge"])
@pytest.mark.parametrize("valid", [0.0, 0.03, 0.6, 1.0])
def test_the_coding_of_a_view_is_exact_to_the_bit(kind, valid):
    maps = nasty_maps(kind)
    mask = np.random.default_rng(1).random(maps.shape[1:]) < valid
    maps[:, ~mask] = np.array([np.nan, np.inf, 7.0, -0.0])[np.arange((~mask).sum()) % 4]  # masked pixels hold anything
    fit, smooth, steps = d3r.encode_view(maps, mask)
    assert steps.shape == (8, mask.sum()) and steps.dtype == np.int16
    steps = d3r.from_byte_planes(d3r.byte_planes(steps))
    back = d3r.decode_view(fit, smooth, steps, mask)
    assert (back.view(np.uint16)[:, mask] == maps.view(np.uint16)[:, mask]).all()


def test_the_coding_takes_less_than_half_of_zlib_on_float16(few_rooms):
    teacher, lines = d3r.GeometricTeacher((96, 128)), [line for line in d3r.make_manifest(few_rooms, 4, 1) if line["sample"] == "room_000/000"]
    maps = d3r.ask(teacher, few_rooms, lines, (96, 128), 0)
    packed = d3r.pack_sample(maps, lines, dict(tau=0.3))
    plain = b"".join(x.half().numpy().tobytes() for m in maps for x in m)  # the official code's way
    assert len(packed) < 0.5 * len(zlib.compress(plain)) < 0.4 * len(plain)


def test_the_steps_between_floats_are_in_order():
    code = np.arange(-32768, 32768).astype(np.int16)
    value = code.view(np.float16)
    keep = np.isfinite(value)
    steps = d3r.ordered(code)
    assert (d3r.ordered(steps) == code).all()
    by_step = np.argsort(steps[keep], kind="stable")
    assert (np.diff(value[keep][by_step].astype(np.float64)) >= 0).all()


def test_runs_are_those_of_a_loop_and_of_the_official_code():
    fixture = load_file(FIXTURE)
    official = [0, 3, 4, 1, 6, 1, 8, 2, 16, 1, 19, 2, 22, 3, 27, 1, 32, 1, 34, 3, 40, 2, 43, 1]
    assert d3r.run_lengths(fixture["rle/mask"].bool().numpy()).ravel().tolist() == official
    assert d3r.run_lengths(np.ones((224, 518), bool)).tolist() == [[0, 116032]]
    assert d3r.run_lengths(np.zeros((3, 4), bool)).shape == (0, 2)
    for p in (0.0, 0.2, 0.9, 1.0):
        mask = np.random.default_rng(0).random((13, 11)) < p
        runs, start = [], None
        for n, on in enumerate([*mask.ravel(), False]):
            start = n if on and start is None else start
            if not on and start is not None:
                runs, start = runs + [[start, n - start]], None
        assert d3r.run_lengths(mask).tolist() == runs
        assert (d3r.from_run_lengths(d3r.run_lengths(mask), mask.shape) == mask).all()


# ------------------------------------------------------------------------------------------------ the cache


def test_a_sample_comes_back_exact_to_float16_and_filtered(few_rooms, cache):
    cached, teacher = d3r.CachedViews(few_rooms, cache), d3r.GeometricTeacher(SMALL)
    assert len(cached) == 6 and len(cached[0].targets) == 5 and len(cached[2].targets) == 2
    samples = d3r.samples_of(d3r.make_manifest(few_rooms, 5, stride=1))
    masked = 0
    for item in (cached[i] for i in range(len(cached))):
        wanted = d3r.ask(teacher, few_rooms, samples[item.name], SMALL, 0)
        for image, got, mask, want, line in zip(item.images, item.targets, item.masks, wanted, samples[item.name]):
            for a, b in zip(got, want):
                assert a.dtype == torch.float32 and torch.equal(a[mask], b.half().float()[mask])
            assert torch.equal(mask, torch.sigmoid((want.conf_local - 1).log()) >= 0.3)  # all points are finite here
            assert (got.conf_local[~mask] == 1).all() and (got.points_global[~mask] == 0).all()
            stored = Image.open(few_rooms / line["path"]).convert("RGB")
            assert (image.mean((1, 2)) - torch.tensor(np.array(stored) / 255.0).float().mean((0, 1))).abs().max() < 0.03
            masked += (~mask).sum().item()
    assert masked > 0  # the filter does fire
    kept = d3r.CachedViews(few_rooms, cache, scenes={"room_001"}).samples
    assert [name for name, _ in kept] == [f"room_001/00{n}" for n in range(3)]


class Difficult(Painter):
    """Infinite, missing and overflowing values, and confidence out of the range of float16."""

    def __call__(self, views, generator):
        maps = super().__call__(views, generator)
        for m in maps:
            m.points_local[0, 0] = torch.inf
            m.points_global[0, 1] = torch.nan
            m.points_global[0, 2] = 1e6
            m.conf_local[0, 3] = 1e9
            m.conf_global[0, 4] = torch.nan
            m.conf_local[0, 5:7] = torch.tensor([1.42, 1.44])
        return maps


def test_only_what_is_known_trusted_and_in_range_is_valid(tmp_path):
    pictures(tmp_path / "p", ["a.png"], SMALL)
    d3r.write_cache(Difficult(lambda h, w: (h, w)), tmp_path / "p", tmp_path / "cache", SMALL)
    sample = d3r.CachedViews(tmp_path / "p", tmp_path / "cache")[0]
    assert sample.masks[0][0, :8].tolist() == [False, False, False, True, False, False, True, True]
    assert sample.masks[0][1:].all() and sample.targets[0].conf_local[0, 3] == 65504
    nothing = Painter(lambda h, w: (h, w))
    nothing.__class__ = type("Nothing", (Painter,), {"__call__": lambda self, v, g: [
        Pointmap(*torch.full((2, *SMALL, 3), torch.nan), *torch.ones(2, *SMALL))]})
    d3r.write_cache(nothing, tmp_path / "p", tmp_path / "none", SMALL)
    assert not d3r.CachedViews(tmp_path / "p", tmp_path / "none")[0].masks[0].any()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_call_gives_the_same_bytes_and_shards_give_the_whole(few_rooms, cache, tmp_path):
    teacher = d3r.GeometricTeacher(SMALL)
    for i in (2, 0, 1):
        written = d3r.write_cache(teacher, few_rooms, tmp_path / "c", SMALL, views=5, stride=1, shard=(i, 3))
        assert len(written) == 2
    assert contents(tmp_path / "c") == contents(cache)
    assert d3r.write_cache(teacher, few_rooms, tmp_path / "c", SMALL, views=5, stride=1) == []


def test_every_flipped_bit_and_every_cut_is_noticed(cache, tmp_path):
    whole = (cache / "room_000/002.safetensors").read_bytes()
    path, rng = tmp_path / "s.safetensors", random.Random(0)
    path.write_bytes(whole)
    about, _, _ = d3r.unpack_sample(path)
    assert about["settings"]["teacher"] == "geometry, errors x 1" and about["settings"]["tau"] == 0.3
    flips = [*range(0, 64), *(rng.randrange(8 * len(whole)) for _ in range(1000))]
    header = int.from_bytes(whole[:8], "little")
    flips += [8 * rng.randrange(8, 8 + header) + rng.randrange(8) for _ in range(200)]  # few bytes, many ways to misread them
    for at in flips:
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"s\.safetensors: damaged or cut off; run the cache command again"):
            d3r.unpack_sample(path)
    for length in [0, 1, 7, 8, 9, header, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(200))]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged or cut off"):
            d3r.unpack_sample(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="damaged or cut off"):
        d3r.unpack_sample(path)


def test_damaged_samples_are_named_and_made_again(few_rooms, cache, tmp_path, capsys):
    out = tmp_path / "c"
    shutil.copytree(cache, out)
    bad = out / "room_001/001.safetensors"
    good = bad.read_bytes()
    bad.write_bytes(good[:-5])
    (out / "room_000/000.safetensors").unlink()
    (out / "room_000/.000.safetensors.4711").write_bytes(b"left by a killed run")
    with pytest.raises(DataError, match=r"1 of 6 samples are not there yet \(room_000/000\)"):
        d3r.CachedViews(few_rooms, out)
    written = d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, out, SMALL, views=5, stride=1)
    assert f"{bad}: damaged or cut off" in capsys.readouterr().out
    assert [str(p.relative_to(out)) for p in written] == ["room_000/000.safetensors", "room_001/001.safetensors"]
    assert bad.read_bytes() == good and not list(out.rglob(".*"))


def test_other_settings_pictures_or_files_are_refused(few_rooms, cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "c")
    with monkeypatch.context() as later:
        later.setattr(d3r, "CACHE_FORMAT", "pointmaps 2")
        with pytest.raises(DataError, match="its format is pointmaps 1, not pointmaps 2"):
            d3r.CachedViews(few_rooms, cache)[0]
    write = lambda strength=1, **changed: d3r.write_cache(d3r.GeometricTeacher(SMALL, strength), few_rooms, tmp_path / "c",
                                                          **{"size": SMALL, "views": 5, "stride": 1, **changed})
    with pytest.raises(DataError, match="teacher geometry, errors x 1 -> geometry, errors x 2"):
        write(strength=2)
    with pytest.raises(DataError, match="tau 0.3 -> 0.5"):
        write(tau=0.5)
    with pytest.raises(DataError, match="lists other pictures or samples"):
        write(views=4)
    a, b = tmp_path / "c/room_000/000.safetensors", tmp_path / "c/room_000/001.safetensors"
    shutil.copy(a, b)
    with pytest.raises(DataError, match="made of other pictures"):
        d3r.CachedViews(few_rooms, tmp_path / "c")[1]
    (tmp_path / "c/manifest.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="not a manifest"):
        d3r.CachedViews(few_rooms, tmp_path / "c")
    with pytest.raises(DataError, match="run the cache command first"):
        d3r.CachedViews(few_rooms, tmp_path / "nowhere")


def test_pictures_of_another_place_under_the_same_names_are_refused(few_rooms, cache, tmp_path):
    root, out = tmp_path / few_rooms.name, tmp_path / "c"
    shutil.copytree(few_rooms, root)
    shutil.copytree(cache, out)
    again = lambda: d3r.write_cache(d3r.GeometricTeacher(SMALL), root, out, SMALL, views=5, stride=1)
    assert again() == []
    shutil.copy(root / "room_001/images/003.png", root / "room_000/images/003.png")
    with pytest.raises(DataError, match="lists other pictures"):
        again()
    with pytest.raises(DataError, match=r"room_000/images/003\.png: not the picture that the manifest lists"):
        d3r.CachedViews(root, out)[0]


def test_a_manifest_without_samples_is_no_obstacle(few_rooms, tmp_path):
    pictures(tmp_path / "photos", ["a.png", "b.png"])
    with pytest.raises(DataError, match="a.png: no measured depth for the geometric teacher; give --teacher"):
        d3r.write_cache(d3r.GeometricTeacher(SMALL), tmp_path / "photos", tmp_path / "c", SMALL)
    assert (tmp_path / "c/manifest.jsonl").exists()
    assert d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, tmp_path / "c", SMALL, views=5, stride=1)


def test_a_sample_that_nothing_can_be_learned_from_is_named(few_rooms, tmp_path, capsys):
    d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, tmp_path, SMALL, views=12, stride=1, tau=0.99999)
    assert "room_000/000.safetensors: not one pixel is trusted at --tau 0.99999" in capsys.readouterr().out


def test_a_lost_picture_is_named(few_rooms, cache, tmp_path):
    root = tmp_path / "rooms"
    shutil.copytree(few_rooms, root)
    file = root / "room_000/transforms.json"
    meta = json.loads(file.read_text())
    meta["frames"].pop(3)
    file.write_text(json.dumps(meta))
    shutil.rmtree(root / "room_001")
    cached = d3r.CachedViews(root, cache)
    with pytest.raises(DataError, match=r"room_000/images/003\.png: in the manifest, but no longer in its scene"):
        cached[0]
    with pytest.raises(DataError, match="scene room_001 is no longer in here"):
        cached[3]


def die_at(event, arguments):
    """In a child: `write_cache`, killed (SIGKILL) at the n-th of: file half written, file whole, file renamed."""
    count, fsync, replace = [0], os.fsync, os.replace

    def passes(then=lambda: None):
        count[0] += 1
        if count[0] == event:
            then()
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_fsync(fd):
        passes(lambda: os.ftruncate(fd, os.fstat(fd).st_size // 2))
        fsync(fd)
        passes()

    def dying_replace(a, b):
        replace(a, b)
        passes()
    torch.set_num_threads(1)
    os.fsync, os.replace = dying_fsync, dying_replace
    d3r.write_cache(d3r.GeometricTeacher(SMALL), *arguments, SMALL, views=1, stride=1)


def test_runs_killed_at_20_points_and_continued_leave_the_same_files(few_rooms, tmp_path):
    d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, tmp_path / "whole", SMALL, views=1, stride=1)
    leftovers, dead = 0, 0
    for event in [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 2, 3]:
        child = killed.SERVER.Process(target=die_at, args=(event, (few_rooms, tmp_path / "killed")))
        child.start()
        child.join(60)
        dead += child.exitcode == -signal.SIGKILL
        leftovers += len(list((tmp_path / "killed").rglob(".*")))
    assert dead == 20 and leftovers >= 10
    d3r.write_cache(d3r.GeometricTeacher(SMALL), few_rooms, tmp_path / "killed", SMALL, views=1, stride=1)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed") and len(contents(tmp_path / "whole")) == 25


# ------------------------------------------------------------------------------------------------ teachers


def views_of(scene, indices, size=SMALL):
    return [scene.view(i, size) for i in indices]


def test_without_errors_the_geometric_teacher_is_the_depth_in_the_first_view(rooms):
    views = views_of(rooms[0], (2, 5, 8))
    maps = d3r.GeometricTeacher(SMALL, strength=0.0)(views, generator())
    for view, m in zip(views, maps):
        K, to_first = view.K.double(), torch.linalg.inv(views[0].c2w.double()) @ view.c2w.double()
        for i, j in ((0, 0), (3, 40), (14, 21), (27, 41)):
            z = view.depth[i, j].double()
            point = torch.stack([(j + 0.5 - K[0, 2]) / K[0, 0] * z, (i + 0.5 - K[1, 2]) / K[1, 1] * z, z])
            assert (m.points_local[i, j].double() - point).abs().max() < 1e-5
            assert (m.points_global[i, j].double() - (to_first[:3, :3] @ point + to_first[:3, 3])).abs().max() < 1e-5


def test_the_pose_of_the_first_view_is_not_off(rooms):
    maps = d3r.GeometricTeacher(SMALL)(views_of(rooms[0], (2, 2)), generator())
    ray = [m.points_global[..., :2] / m.points_global[..., 2:] for m in maps]
    true = maps[0].points_local[..., :2] / maps[0].points_local[..., 2:]
    assert (ray[0] - true).abs().max() < 1e-5 < 1e-3 < (ray[1] - true).abs().max()


def test_its_errors_grow_with_depth_and_at_edges_and_its_confidence_says_so(rooms):
    teacher, near, far, edge, flat, conf, error, poses = d3r.GeometricTeacher((96, 128)), [], [], [], [], [], [], []
    for seed, scene in enumerate(rooms):
        views = views_of(scene, (0, 4, 8, 11), (96, 128))
        exact = d3r.GeometricTeacher((96, 128), strength=0.0)(views, generator())
        for k, (view, m, truth) in enumerate(zip(views, teacher(views, generator(seed)), exact)):
            off = (m.points_local - truth.points_local).norm(dim=-1) / view.depth
            farthest, nearest = (s * torch.nn.functional.max_pool2d(s * view.depth[None], 5, 1, 2)[0] for s in (1, -1))
            step = (farthest - nearest) / view.depth
            smooth, typical = step < 0.05, view.depth.median()
            near.append(off[smooth & (view.depth < typical)])
            far.append(off[smooth & (view.depth > 1.3 * typical)])
            edge.append(off[step > 0.3])
            flat.append(off[smooth])
            conf.append(m.conf_local.flatten())
            error.append((off * view.depth).flatten())
            poses.append(((m.points_global - truth.points_global).norm(dim=-1) / view.depth).mean().item() if k else 0)
            assert (m.conf_local > 1).all() and (m.conf_global > 1).all() and m.points_global.isfinite().all()
    mean, median = (lambda parts: torch.cat(parts).mean().item()), (lambda parts: torch.cat(parts).median().item())
    assert 0.003 < median(near) and 1.25 * median(near) < median(far) < 0.05  # relative: the absolute error grows even faster
    assert mean(edge) > 4 * mean(flat)
    assert d3r.calibration(torch.cat(conf), torch.cat(error))["rank"] < -0.4
    assert max(poses) > 2 * mean(flat)  # poses are off, too


def test_its_confidence_is_that_of_the_error_to_expect(rooms):
    """Walls that face the camera, at the typical depth and at twice that: no edges, so noise, pull and pose are all."""
    view = rooms[0].view(0, (48, 64))
    depth = torch.full((48, 64), 2.0)
    depth[:, 50:] = 4.0
    first, second = d3r.GeometricTeacher((48, 64))([view._replace(depth=depth)] * 2, generator())
    for column, far in ((20, 1.0), (58, 2.0)):
        error = far * math.hypot(0.006 + 0.006 * far, 0.01 * far)
        assert first.conf_local[20, column].item() == pytest.approx(0.2 / error, rel=1e-4)
        assert first.conf_global[20, column].item() == pytest.approx(0.2 / error, rel=1e-4)
        pose = math.hypot(0.008, 0.004 * second.points_global[20, column].norm().item() / 2)
        assert second.conf_global[20, column].item() == pytest.approx(0.2 / math.hypot(error, pose), rel=0.03)


def test_its_poses_are_off_as_it_says(rooms):
    views, turns = views_of(rooms[0], (0, *range(1, 12), *range(1, 12))), []
    teacher = d3r.GeometricTeacher(SMALL)
    teacher.disturbed = lambda depth, *_: (depth, torch.zeros_like(depth))
    for view, one in list(zip(views, teacher(views, generator())))[1:]:
        true = torch.linalg.inv(views[0].c2w) @ view.c2w
        rays = (view.depth[..., None] * lift.pixel_rays(view.K, *SMALL)).flatten(0, 1)  # the true local points
        R = d3r.similarity(rays, one.points_global.flatten(0, 1))[1]
        turns.append(math.acos(min(1.0, ((R.T @ true[:3, :3].double()).trace().item() - 1) / 2)))
    assert np.sqrt(np.mean(np.square(turns))) == pytest.approx(0.004 * math.sqrt(3), rel=0.3)  # radians, 0.004 about each axis


def test_pixels_without_depth_are_nan_and_not_trusted(rooms):
    views = views_of(rooms[0], (0, 1))
    hole, none = views[0].depth.clone(), torch.zeros(SMALL)
    hole[5:9, 5:9] = 0
    for depth, known in ((hole, 28 * 42 - 16), (none, 0)):
        m = d3r.GeometricTeacher(SMALL)([views[0]._replace(depth=depth), views[1]], generator())[0]
        assert m.points_local.isfinite().all(-1).sum() == known == m.points_global.isfinite().all(-1).sum()
        assert (d3r.certainty(m.conf_local)[depth == 0] < 0.01).all() and m.conf_local.isfinite().all()
    with pytest.raises(DataError, match="no measured depth"):
        d3r.GeometricTeacher(SMALL)([views[0]._replace(depth=None)], generator())


def test_a_network_is_asked_at_its_own_size(few_rooms, tmp_path):
    seen = []

    class Net(torch.nn.Module):
        def forward(self, images, generator):
            seen.append([tuple(i.shape) for i in images])
            sizes = [i.shape[1:] for i in images]
            return [Pointmap(*torch.rand(2, *size, 3, generator=generator), *torch.full((2, *size), 3.0)) for size in sizes]
    teacher = d3r.NetworkTeacher(Net(), "net", lambda h, w: d3r.fast3r_size(h, w, 64))
    d3r.write_cache(teacher, few_rooms, tmp_path / "c", SMALL)
    assert seen == [[(3, 48, 64)] * 12] * 2
    sizes = {(480, 640): (384, 512), (640, 480): (512, 384), (1080, 1920): (288, 512), (968, 1296): (368, 512),
             (100, 300): (160, 512)}
    assert {stored: d3r.fast3r_size(*stored) for stored in sizes} == sizes  # what the official loader gives


# ------------------------------------------------------------------------------------------------ cameras


def random_similarity(g):
    Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=g).double())
    return 0.3 + 2 * torch.rand((), generator=g).double(), Q * torch.linalg.det(Q), torch.randn(3, generator=g).double()


def test_a_similarity_is_recovered_and_never_a_reflection():
    g = generator()
    for _ in range(20):
        s, R, t = random_similarity(g)
        x, w = torch.randn(50, 3, generator=g), torch.rand(50, generator=g)
        y = s * x.double() @ R.T + t
        y[w < 0.3] = 100  # has no weight
        for got, want in zip(d3r.similarity(x, y, torch.where(w < 0.3, 0.0, w)), (s, R, t)):
            assert (got - want).abs().max() < 1e-6
        y = s * x.double() @ R.T + t
        y[:15] += 5 * torch.randn(15, 3, generator=g)
        for got, want in zip(d3r.robust_similarity(x, y, w + 0.1, rounds=30), (s, R, t)):
            assert (got - want).abs().max() < 1e-3
        plain, robust = ((function(x, y, w + 0.1)[2] - t).norm() for function in (d3r.similarity, d3r.robust_similarity))
        assert robust < 0.2 * plain
    x = torch.randn(50, 3, generator=g)
    assert torch.linalg.det(d3r.similarity(x, x * torch.tensor([1.0, 1, -1]), torch.ones(50))[1]) == pytest.approx(1)


def test_the_similarity_is_that_of_the_official_alignment():
    fixture = load_file(FIXTURE)
    for view in ("v0", "v1", "v2"):
        part = {key: fixture[f"align/{view}/{key}"][0] for key in ("conf", "global", "local", "out_p0", "out_p85")}
        for share, key in ((0.0, "out_p0"), (0.85, "out_p85")):
            use = part["conf"] >= part["conf"].flatten().quantile(share)
            s, R, t = d3r.similarity(part["local"][use], part["global"][use], torch.ones(int(use.sum())))
            aligned = s * part["local"].double() @ R.T + t
            assert (aligned - part[key]).abs().max() / part[key].abs().mean() < 2e-5


def test_cameras_are_recovered_from_exact_pointmaps_in_any_unit(rooms):
    views = views_of(rooms[1], (0, 3, 6, 9), (48, 64))
    maps = d3r.GeometricTeacher((48, 64), strength=0.0)(views, generator())
    units = torch.tensor([1.0, 0.5, 3.0, 1.0])
    maps = [m._replace(points_local=m.points_local * u) for m, u in zip(maps, units)]
    maps[2].points_local[:4] = torch.nan  # and some pixels are not known, or wrong and not trusted
    maps[3].points_global[10:44] = 50.0
    maps[3].conf_global[:], maps[3].conf_global[10:44] = 3.0, 1.4
    cameras = d3r.estimate_cameras(maps)
    true = torch.linalg.inv(views[0].c2w) @ torch.stack([v.c2w for v in views])
    assert (cameras.c2w - true).abs().max() < 1e-4 and (cameras.scale * units - 1).abs().max() < 1e-4
    assert (cameras.focal / views[0].K[0, 0] - 1).abs().max() < 1e-4
    blind = maps[1]._replace(points_local=torch.full((48, 64, 3), torch.nan))
    with pytest.raises(ValueError, match="view 1: fewer than three of its points are known"):
        d3r.estimate_cameras([maps[0], blind])


@pytest.fixture(scope="module")
def exported(rooms, tmp_path_factory):
    views = views_of(rooms[2], range(0, 12, 2), (48, 64))
    maps = d3r.GeometricTeacher((48, 64), strength=0.0)(views, generator())
    maps = [Pointmap(2.5 * m.points_global, m.points_local, m.conf_global, m.conf_local) for m in maps]  # unit: 0.4 m
    maps[1].conf_local[:7] = 1.2
    pictures = views_of(rooms[2], range(0, 12, 2), (96, 128))
    return pictures, views, d3r.write_scene(tmp_path_factory.mktemp("export") / "scene", pictures, maps)


def test_photos_agree_where_geometry_and_cameras_are_theirs(rooms):
    views = views_of(rooms[1], range(4))
    points = [(lift.pixel_rays(v.K, *SMALL) * v.depth[..., None]).flatten(0, 1) for v in views]
    colours = [v.image.permute(1, 2, 0).flatten(0, 1) for v in views]
    focal, c2w = [v.K[0, 0] for v in views], torch.stack([v.c2w for v in views])
    agree = lambda points, colours, c2w: d3r.agreement(points, colours, [v.image for v in views], focal, c2w)
    true, nearer = agree(points, colours, c2w), agree([p / 2 for p in points], colours, c2w)
    strangers = agree(points, [c[torch.randperm(len(c), generator=generator())] for c in colours], c2w)
    assert true > nearer + 0.1 and true > agree(points, colours, torch.eye(4).expand_as(c2w)) + 0.1 and abs(strangers) < 0.05
    assert agree(points, colours, c2w[:1].expand_as(c2w)) == pytest.approx(agree(points, colours, torch.eye(4).expand_as(c2w)), abs=1e-4)
    assert d3r.agreement(points[:1], colours[:1], [views[0].image], focal, c2w[:1]) == 0.0
    turned = torch.stack([torch.eye(4), torch.diag(torch.tensor([-1.0, 1, -1, 1]))])  # back to back: none sees the other's points
    assert d3r.agreement(points[:2], colours[:2], [v.image for v in views[:2]], focal, turned) == 0.0
    same = [v.image for v in views[:1]] * 2  # one photo twice, from one camera: in every colour
    assert d3r.agreement(points[:1] * 2, colours[:1] * 2, same, focal[:1] * 2, torch.eye(4).expand(2, 4, 4)) > 0.95


def test_cameras_that_explain_no_more_than_none_are_doubted():
    assert d3r.doubt((0.42, 0.42)) == d3r.doubt((0.43, 0.42)) == ": do not trust the cameras" and d3r.doubt((0.79, 0.43)) == ""


def test_one_point_at_the_horizon_does_not_cost_the_others_their_depth(rooms, tmp_path):
    views = views_of(rooms[0], (0, 4, 8))
    maps = d3r.GeometricTeacher(SMALL, strength=0.0)(views, generator())
    maps[1].points_local[3, 5] = maps[0].points_local[0, 0] * 1e4
    maps[0].points_local[7, 7] = torch.inf
    (scene,) = data.load_scenes(d3r.write_scene(tmp_path, views, maps))
    for i, view in enumerate(views):
        got = scene.view(i, SMALL).depth
        assert (got == 0).sum() == (i < 2) and (got - view.depth)[got > 0].abs().max() < 1e-3


def test_a_scene_that_no_pixel_vouches_for_is_refused(rooms, tmp_path):
    views = views_of(rooms[0], (0, 4))
    maps = [m._replace(conf_local=torch.full(SMALL, 1.2)) for m in d3r.GeometricTeacher(SMALL)(views, generator())]
    with pytest.raises(ValueError, match="not one pixel is trusted at --tau 0.3"):
        d3r.write_scene(tmp_path / "scene", views, maps)
    assert len(list(d3r.write_scene(tmp_path / "scene", views, maps, tau=0.1).glob("depth/*.png"))) == 2


def check_scene(scene, truth, depth_unit=1.0):
    """Poses, K and depth are the truth's up to the similarity that makes view 0 the world and multiplies by 2.5."""
    pictures, views = truth
    true = torch.linalg.inv(views[0].c2w) @ torch.stack([v.c2w for v in views])
    assert len(scene) == len(views)
    assert (scene.c2w[:, :3, :3] - true[:, :3, :3]).abs().max() < 1e-4
    assert (scene.c2w[:, :3, 3] - 2.5 * true[:, :3, 3]).abs().max() < 1e-3
    for i, (picture, view) in enumerate(zip(pictures, views)):
        got = scene.view(i, (48, 64))
        assert (got.K / view.K - 1)[view.K > 0].abs().max() < 1e-3
        known = got.depth > 0
        assert (got.depth * depth_unit - 2.5 * view.depth)[known].abs().max() < 1e-3
        assert known.float().mean() == pytest.approx(41 / 48 if i == 1 else 1, abs=0.001)
        assert (scene.view(i).image - picture.image).abs().mean() < 0.03  # JPEG


def test_the_exported_scene_is_read_back_with_true_poses_and_depth(exported):
    *truth, out = exported
    (scene,) = data.load_scenes(out)
    check_scene(scene, truth)
    assert not scene.notes and (truth[0][0].depth * 2.5).quantile(0.9) < scene.depth_range[1]
    a, b, target = data.sample_triplet(scene, generator())
    assert len({a, b, target}) == 3


def test_the_colmap_model_says_the_same(exported, tmp_path):
    *truth, out = exported
    shutil.copytree(out, tmp_path / "scene")
    unit = json.loads((out / "transforms.json").read_text())["depth_unit_scale_factor"]
    (tmp_path / "scene/transforms.json").unlink()
    (scene,) = data.load_scenes(tmp_path / "scene")
    check_scene(scene, truth, depth_unit=unit / 1e-3)
    cloud = scene.points
    assert len(cloud) == 6 * 48 * 64 - 7 * 64
    to_world = truth[1][0].c2w.double().numpy()
    world = (cloud / 2.5) @ to_world[:3, :3].T + to_world[:3, 3]
    depth, K, c2w = truth[1][0].depth.double().numpy(), truth[1][0].K.double().numpy(), to_world
    seen = (world[:48 * 64] - c2w[:3, 3]) @ c2w[:3, :3]  # the points of view 0 come first
    assert np.abs(seen[:, 2].reshape(48, 64) - depth).max() < 1e-3


def test_the_other_files_of_the_export(exported):
    pictures, views, out = exported
    head, _, body = (out / "cloud.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 17984\n" in head and head.startswith(b"ply\nformat binary_little_endian 1.0\n")
    points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    first = points[:48 * 64].reshape(48, 64)
    assert len(points) == 17984 and np.abs(first["xyz"][..., 2] - 2.5 * views[0].depth.numpy()).max() < 1e-3
    small = torch.nn.functional.interpolate(pictures[0].image[None], (48, 64), mode="area")[0].permute(1, 2, 0)
    assert np.abs(first["rgb"] / 255 - small.numpy()).mean() < 0.02
    confidence = np.array(Image.open(out / "confidence/001.png"))
    assert confidence.shape == (48, 64) and (confidence[:7] == 43).all() and (confidence[7:] > 250).all()
    for name in ("cloud.png", "maps.png"):
        assert np.array(Image.open(out / name)).std() > 20
    found, still = json.loads((out / "transforms.json").read_text())["agreement"]
    assert found > max(0.6, still + 0.1)
    assert sorted(p.name for p in out.iterdir()) == [
        "cloud.ply", "cloud.png", "confidence", "depth", "images", "maps.png", "sparse", "transforms.json"]


# ------------------------------------------------------------------------------------------------ evaluation


def loop_nearest(queries, points):
    return np.array([np.sqrt(((points - q) ** 2).sum(1)).min() for q in queries])


@pytest.mark.parametrize("kind", ["random", "line", "one point", "clusters"])
def test_the_nearest_distance_is_that_of_a_float64_loop(kind):
    g = generator(3)
    queries, points = torch.randn(300, 3, generator=g), torch.randn(1111, 3, generator=g)
    if kind == "line":
        queries, points = queries * torch.tensor([1.0, 0, 0]), points * torch.tensor([1.0, 0, 0]) + torch.tensor([0.0, 1e-3, 0])
    if kind == "one point":
        points = points[:1]
    if kind == "clusters":
        points = 0.01 * points + 100 * torch.randint(0, 3, (1111, 3), generator=g)
    got = d3r.nearest_distance(queries, points, block=32)
    want = loop_nearest(queries.double().numpy(), points.double().numpy())
    assert np.abs(got.numpy() - want).max() < 1e-5 * max(1, want.max())


def test_accuracy_and_completeness_are_those_of_a_float64_loop_and_of_the_official_code():
    fixture = load_file(FIXTURE)
    rec, gt = fixture["metric/rec"], fixture["metric/gt"]
    there, back = d3r.nearest_distance(rec, gt), d3r.nearest_distance(gt, rec)
    official = [0.3818563052374681, 0.32600204195973903, 0.3871100424652649, 0.35734355080179505]
    got = [there.mean(), there.double().quantile(0.5), back.mean(), back.double().quantile(0.5)]
    assert [float(x) for x in got] == pytest.approx(official, rel=1e-5)
    g = generator()
    truth, (s, R, t) = torch.randn(401, 3, generator=g), random_similarity(g)
    conf = torch.rand(401, generator=g) + 1
    noisy = truth + 0.05 * torch.randn(401, 3, generator=g) * (2 - conf)[:, None]
    points = ((noisy.double() - t) @ R / s).float()
    score, off = d3r.score_view(points, truth)
    a, b = points.double().numpy(), truth.double().numpy()
    ma, mb = a.mean(0), b.mean(0)
    U, D, Vt = np.linalg.svd((b - mb).T @ (a - ma))
    rotation, scale = U @ Vt, D.sum() / ((a - ma) ** 2).sum()
    assert np.linalg.det(rotation) > 0
    aligned = scale * (a - ma) @ rotation.T + mb
    there, back = loop_nearest(aligned, b), loop_nearest(b, aligned)
    assert score == pytest.approx([there.mean(), np.median(there), back.mean(), np.median(back), scale], rel=1e-4)
    assert np.abs(off.numpy() - np.linalg.norm(aligned - b, axis=1)).max() < 1e-4


class Scaled(d3r.GeometricTeacher):
    def __call__(self, views, generator):
        maps = super().__call__(views, generator)
        return [Pointmap(m.points_global / 4, m.points_local / 4, m.conf_global, m.conf_local) for m in maps]


def test_evaluation_of_the_truth_the_noisy_and_the_mean(rooms, few_rooms, cache):
    scenes = rooms[:2]
    exact = d3r.evaluate(Scaled(SMALL, strength=0.0), scenes, SMALL, views=3)
    assert max(exact["mean"][:4]) < 1e-5 and exact["mean"].scale == pytest.approx(4, rel=1e-5)
    noisy = d3r.evaluate(d3r.GeometricTeacher(SMALL), scenes, SMALL, views=3)
    mean = d3r.evaluate(d3r.MeanTeacher(d3r.CachedViews(few_rooms, cache)), scenes, SMALL, views=3)
    assert 1e-3 < noisy["mean"].accuracy_median < 0.3 * mean["mean"].accuracy_median
    assert 1e-3 < noisy["mean"].completeness_median < 0.5 * mean["mean"].completeness_median
    assert list(noisy["scenes"]) == [s.name for s in scenes] and noisy["mean"].scale == pytest.approx(1, abs=0.05)
    tenths = noisy["calibration"]["tenths"]
    assert tenths[0] > 3 * tenths[-1] and noisy["calibration"]["rank"] < -0.3
    assert mean["mean"].accuracy_mean == pytest.approx(np.mean([s.accuracy_mean for s in mean["scenes"].values()]))
    bare = data.Scene("bare", [data.Frame(**{**vars(f), "depth": None}) for f in rooms[0].frames])
    with pytest.raises(DataError, match="no scene has a view with measured depth"):
        d3r.evaluate(d3r.GeometricTeacher(SMALL), [bare], SMALL)


def test_calibration_is_rank_correlation_and_means_of_tenths():
    g = generator()
    conf, noise = torch.rand(1000, generator=g), torch.rand(1000, generator=g)
    perfect = d3r.calibration(conf, 1 / (conf + 0.1))
    assert perfect["rank"] == pytest.approx(-1) and perfect["tenths"] == sorted(perfect["tenths"], reverse=True)
    assert abs(d3r.calibration(conf, noise)["rank"]) < 0.1
    assert d3r.calibration(torch.full((1000,), 2.0), noise)["rank"] == 0 == d3r.calibration(conf, 0 * noise)["rank"]
    rounded = (conf * 5).round()
    places = [(rounded < c).sum() + ((rounded == c).sum() + 1) / 2 for c in rounded]
    assert d3r.ranks(rounded).tolist() == pytest.approx([float(place) for place in places])
    order = np.argsort(conf.numpy(), kind="stable")
    tenths = [noise.numpy()[part].mean() for part in np.split(order, 10)]
    assert d3r.calibration(conf, noise)["tenths"] == pytest.approx(tenths, rel=1e-5)


def test_the_mean_pointmap_is_the_mean_of_valid_pixels(few_rooms, cache):
    cached = d3r.CachedViews(few_rooms, cache)
    mean = d3r.MeanTeacher(cached)([None], None)[0]
    for i, j in ((0, 0), (10, 20), (27, 41)):
        values = [m.points_local[i, j].double() for s in cached for m, mask in zip(s.targets, s.masks) if mask[i, j]]
        assert values and (mean.points_local[i, j] - torch.stack(values).mean(0)).abs().max() < 1e-4
