"""The study: what each part brings on the built-in rooms, Splat and Distill's and Distill3R's. Hours; a killed one goes on.

Run     OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/study.py          all runs, three seeds: 4 to 6 minutes each
        ... python tests/study.py --only SnD "2D control" --seeds 1               some of them, beside another process too
Out     docs/study.md; docs/scores/: the scores of each run and seed, with date and machine; out/study/: the runs, the operators that they share.
"""
import argparse
import contextlib
import datetime
import functools
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

data, lift, distill, probes, distill3r, train = (
    importlib.import_module(n) for n in ("01_data", "02_lift", "04_distill", "05_probe", "06_distill3r", "tiny.train"))

SHARED = Path(__file__).parents[2] / "shared/data"
PLAIN = ["--no_blend", "--upscale", "bilinear"]
MAIN = {  # name -> what 04_distill is told; "start" is the backbone as it is
    "start": None,
    "2D control": ["--target", "image", *PLAIN],
    "masks without 3D": ["--target", "image"],
    "3D without masks": PLAIN,
    "correspondence loss": ["--loss", "correspondence", *PLAIN],
    "feature rendering (G)": ["--loss", "feature", "--frozen_teacher"],
    "the same beside the start's": ["--loss", "feature", "--frozen_teacher"],
    "SnD": []}
BESIDE = {"the same beside the start's": "feature rendering (G)"}  # whose channels stand beside the start's, as FiT3D is scored
BESIDE |= {"SnD beside the start's artifacts4": "SnD artifacts4", "start beside itself artifacts4": None}  # the latter sees mirrored images
TABLE5 = {
    "without blending (A)": ["--no_blend"],
    "bilinear upscaling (B)": ["--upscale", "bilinear"],
    "cosine loss (C)": ["--loss", "cosine"],
    "frozen teacher (D)": ["--frozen_teacher"],
    "context views (E)": ["--target", "context"],
    "superpixels (F)": ["--masks", "superpixels"],
    "basic variant (H)": ["--frozen_teacher", *PLAIN]}
BUDGET = {
    "three times the steps and triplets": ["--max_steps", "600", "--triplets", "900"],
    "ten times, a third of the rate": ["--max_steps", "2000", "--triplets", "3000", "--lr", "1e-4"],
    "twenty times, a third of the rate": ["--max_steps", "4000", "--triplets", "3000", "--lr", "1e-4"],
    "2D control, three times": ["--max_steps", "600", "--triplets", "900", "--target", "image", *PLAIN],
    "2D control, ten times": ["--max_steps", "2000", "--triplets", "3000", "--lr", "1e-4", "--target", "image", *PLAIN]}
CURVES = {  # {name: {steps: run}}, drawn over the steps
    "SnD": {0: "start", 200: "SnD", 600: "three times the steps and triplets", 2000: "ten times, a third of the rate",
            4000: "twenty times, a third of the rate"},
    "2D control": {0: "start", 200: "2D control", 600: "2D control, three times", 2000: "2D control, ten times"}}
AIMS = {  # (probe, score) -> the aim, from what the start has
    ("depth", "RMSE"): lambda start: 0.88 * start, ("normals", "RMSE"): lambda start: 0.94 * start,
    ("segmentation", "mIoU"): lambda start: start + 2, ("correspondence", "1.5 patches"): lambda start: start}
OTHERS = {
    "adapters": ["--no-full_finetune", "--lr", "3e-3"],
    "temperatures 1 and 1": ["--tau_student", "1", "--tau_teacher", "1"],
    "temperatures 0.05 and 0.02": ["--tau_student", "0.05", "--tau_teacher", "0.02"],
    "measured depth": ["--geometry", "depth"],
    "shared head": ["--shared_head"]}
RUNS = MAIN | TABLE5 | BUDGET | OTHERS
EQ2 = "student, teacher's confidence weighs (Eq. 2)"
TABLE3 = {  # of Distill3R: name -> what 06_distill3r is told
    EQ2: [],
    "student, no weighting": ["--weight", "none"],
    "student, labels only": ["--weight", "none", "--gamma", "0"],
    "student, student's confidence weighs": ["--weight", "student", "--gamma", "0"]}
TOKENS = {"student of the built-in student": 0.0, "and of its fused tokens": 1.0, "and of its fused tokens, more": 10.0}  # name -> weight of the loss on them
CIRCLE_ROOMS = dict(scenes=48, seed=1)  # rooms that Distill3R's student has not seen
CIRCLE = {"48 rooms, true poses and depth": "true", "48 rooms, poses and depth from pictures": "inferred",
          "48 rooms, the same by the built-in student": "built_in"}
THREE = "start", "2D control", "SnD"
PARTS = [kind for kind in MAIN if kind not in BESIDE]
LONG = ["--max_steps", "600", "--triplets", "600"]  # four triplets a step, on 200 of the rooms
STARTS = {  # name -> run, kind of start, standard deviations of the noise on its position embedding
    f"{kind.partition(' (')[0]} {start}{strength}": (kind, start, strength)
    for start, strength, kinds in (
        ("foreign", "", THREE), ("semantic", "", THREE),
        ("artifacts", 0, THREE), ("artifacts", 1, PARTS), ("artifacts", 2, PARTS),
        ("artifacts", 4, [kind for kind in MAIN | TABLE5 if kind not in BESIDE]), ("fresh", 4, THREE),
        ("artifacts", 4, ["SnD beside the start's", "start beside itself"])) for kind in kinds}
REAL = {  # name -> run, folder of shared/data: RGB-D scenes, of which every eighth view is held out
    f"{kind}, {words}": (kind, folder)
    for words, folder in (("kitchen", "rgbd_7scenes_redkitchen"), ("shelf", "rgbd_instances_apc_shelf")) for kind in (*THREE, "measured depth")}
TARGETS = "targets"
KEPT, NOT_YET = "<!-- what follows is written by hand -->", "Not run yet."
NO_CLS = "depth of patches"  # a probe beside those of 05_probe.py: its depth, without the CLS token, which no loss of 04_distill.py holds
COLUMNS = [("depth", "AbsRel", "depth AbsRel ↓", 4), ("depth", "RMSE", "RMSE ↓", 4), (NO_CLS, "RMSE", "RMSE, no CLS ↓", 4), ("normals", "RMSE", "normals RMSE ° ↓", 2),
           ("segmentation", "mIoU", "mIoU % ↑", 2),
           *(("correspondence", f"1.5 patches{bin}", f"recall{bin or ', all'} % ↑", 1) for bin in ("", *(f" {b}" for b in probes.VIEWPOINTS)))]
REAL_COLUMNS = [column for column in COLUMNS if column[0] != "segmentation" and "-" not in column[1]]  # nothing is labelled there


def folder_of(name, seed, args):
    return Path(args.out) / f"{name.partition(' (')[0].replace(' ', '_')}_{seed}"


def scores_file(name, seed, args):
    return Path(args.scores) / f"{folder_of(name, seed, args).name}.json"


def remember(name, seed, args, scores):
    on = f"{platform.machine()} with {os.cpu_count()} cores, shared, {torch.get_num_threads()} thread(s), on {args.device}"
    record = {"date": datetime.date.today().isoformat(), "on": on, "scores": scores}
    data.write_whole(scores_file(name, seed, args), json.dumps(record).encode())


def remembered(name, args, seed="[0-9]") -> list:
    """The records of this name's seeds, whichever process has made them."""
    return [json.loads(path.read_text()) for path in sorted(Path(args.scores).glob(scores_file(name, seed, args).name))]


def score_run(name, seed, args, flags, start="tiny"):
    """Train, probe, remember {probe: {score: value}}. `flags` None: the backbone `start` as it is."""
    folder = folder_of(name, seed, args)
    student, trained = start, folder_of(BESIDE.get(name) or name, seed, args)
    if name in BESIDE and flags is None:
        student = f"{start}+{start}"
    elif flags is not None:
        student = f"{start}+{trained / 'student'}" if name in BESIDE else str(trained / "student")
        if not (trained / "result.json").exists():
            distill.main(["--preset", "tiny", "--model", start, "--scene_dir", args.scene_dir, "--out", str(trained), "--operators",
                          str(Path(args.out) / "operators"), "--seed", str(seed), "--device", args.device, "--resume", *flags])
    asked = asked_of_probes(args, student, folder / "probe")
    train, val, pairs = views_of(args.scene_dir, args.views, args.device)
    scores = probes.probe({"model": student}, train, val, pairs, asked)["model"].scores
    tokens = [probes.extract(student, v.images, asked.layer, folder / "probe" / "features", args.device) for v in (train, val)]
    scores[NO_CLS] = depth_of_patches(asked, tokens[0], train.depth, tokens[1], val.depth)
    shutil.rmtree(folder / "probe")
    remember(name, seed, args, scores)
    for checkpoint in folder.glob("checkpoint*"):
        checkpoint.unlink()


def start_with_artifacts(strength, args) -> str:
    """The folder of the built-in ViT with noise on its position embedding: features that depend on their place in the picture, whatever
    is seen there, as those of DINOv2 are known to do."""
    folder = Path(args.out) / f"start_artifacts{strength}"
    vit, generator = lift.load_vit("tiny"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        places = vit.pos_embed[:, 1:]  # all but the class token's
        places += strength * places.std() * torch.randn(places.shape, generator=generator)
    lift.save_vit(vit, folder)
    return str(folder)


def fresh_noise(strength):
    """The same noise, but another one for every picture at every look: it does not depend on the place, so that splatting
    is not needed to average it out. If the gain on artifacts comes from their place, the 2D control must gain here as well."""
    def noisy(self, images):
        x = embed(self, images)
        noise = torch.randn_like(x) * strength * self.pos_embed[:, 1:].std().detach()
        return x + torch.cat([torch.zeros_like(noise[:, :1]), noise[:, 1:]], 1)
    embed = lift.VisionTransformer.embed
    return mock.patch.object(lift.VisionTransformer, "embed", noisy)


def score_start(name, seed, args):
    kind, start, strength = STARTS[name]
    args = argparse.Namespace(**vars(args) | dict(scene_dir=f"{args.scene_dir}_200"))
    data.make_rooms(args.scene_dir, scenes=200)
    flags = None if kind.startswith("start") else [*LONG, *RUNS.get(kind, [])]
    torch.manual_seed(seed)
    if start == "fresh":
        with fresh_noise(strength):
            score_run(name, seed, args, flags)
    else:
        make = {"foreign": foreign_start, "semantic": semantic_start}.get(start, functools.partial(start_with_artifacts, strength))
        score_run(name, seed, args, flags, make(args))


def foreign_start(args) -> str:
    """The folder of a ViT that has never seen a room: the recipe of the built-in one, on 3,000 pictures of overlapping shapes."""
    folder = Path(args.out) / "start_foreign"
    if not folder.exists():
        images = torch.stack([shapes(np.random.default_rng(n)) for n in range(3000)])
        recipe = argparse.Namespace(out=str(folder.with_name("foreign")), max_steps=3500, seed=0, device="cpu", save_minutes=2.0, resume=True)
        vit = train.standardise(train.train_vit(recipe, images), images)
        lift.save_vit(vit, folder.with_name(".start_foreign"))
        folder.with_name(".start_foreign").rename(folder)
    return str(folder)


def semantic_start(args) -> str:
    """The folder of the built-in ViT after self-distillation (tiny/train.py)."""
    folder = Path(args.out) / "start_semantic"
    if not folder.exists():
        train.main(["semantic", "--out", str(folder.with_name("semantic")), "--scene_dir", args.scene_dir.removesuffix("_200"), "--resume"])
        folder.with_name("semantic").joinpath("vit").rename(folder)
    return str(folder)


def shapes(random, height=96, width=128, count=14):
    """(3, H, W) uint8: ellipses, boxes and triangles of two colours each, striped, chequered, dotted or plain, over one another."""
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 3))
    for n in range(count):
        cx, cy, a, b, angle = random.uniform(0, width), random.uniform(0, height), *random.uniform(8, 40, 2), random.uniform(0, np.pi)
        u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / a
        v = ((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) / b
        inside = [u**2 + v**2 < 1, np.maximum(abs(u), abs(v)) < 1, (v < 1) & (v > 2 * abs(u) - 1)][random.integers(3)]
        waves = [np.sin(k * w + p) for w, k, p in zip((u, v), random.uniform(2, 16, 2), random.uniform(0, 6, 2))]
        pattern = [waves[0], waves[0] * waves[1], np.minimum(*waves) - 0.4, np.zeros_like(u)][random.integers(4)] > 0
        colours = random.uniform(0, 255, (2, 3))
        shade = 1 + 0.25 * (u * random.uniform(-1, 1) + v * random.uniform(-1, 1))
        paint = np.where(pattern[..., None], *colours) * shade[..., None]
        where = np.ones_like(inside) if n == 0 else inside
        picture[where] = paint[where]
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def score_real(name, seed, args):
    """On a scene of measured depth: the heads see its training views, and are scored on its held-out ones. Its normals are those of
    depth that is averaged over 8x8 pixels."""
    kind, source = REAL[name]
    folder = Path(args.out) / "real" / source
    if not folder.exists():
        aside = folder.with_name(f".{source}")
        shutil.copytree(SHARED / source, aside, dirs_exist_ok=True)
        (aside / "normals").mkdir(exist_ok=True)
        scene, = data.load_scenes(aside)
        for i, frame in enumerate(scene.frames):
            view = scene.view(i)
            known = torch.nn.functional.avg_pool2d((view.depth > 0)[None].float(), 8)[0]
            depth = torch.nn.functional.avg_pool2d(view.depth[None], 8)[0] / known.clamp_min(1e-9) * (known > 0.9)
            normals = lift.surface_normals(depth, view.K / view.K.new_tensor([[8], [8], [1]])) * (depth > 0)[..., None]
            np.save(aside / "normals" / f"{frame.image.name}.npy", normals.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy())
        aside.rename(folder)
    args = argparse.Namespace(**vars(args) | dict(scene_dir=str(folder), views=100))
    score_run(name, seed, args, RUNS[kind])


def asked_of_probes(args, model, out):
    return probes.parse(["--scene_dir", args.scene_dir, "--models", f"model={model}", "--views", str(args.views), "--out", str(out), "--device", args.device])


def depth_of_patches(asked, *tokens_and_truth) -> dict:
    return probes.depth_probe(*tokens_and_truth, asked.depth._replace(device=asked.device), with_cls=False)[0]


@functools.cache
def views_of(scene_dir, views, device):  # -> training views, held-out views, pairs: the same for all models
    args = argparse.Namespace(scene_dir=scene_dir, views=views, device=device)
    return probes.open_data(asked_of_probes(args, "tiny", "out/study"))[1:]


@torch.no_grad()
def taught(source, vit, scene, triplet) -> dict:
    """{name: (CLS, tokens of the target view)}: its own, and what a student of the starting backbone is taught in their place.
    Tokens that nothing is splatted to stay the view's own."""
    t = source.load(scene, triplet)
    grid, (cls, _, tokens) = source.grid(t), vit(t.images)
    contexts, own = tokens[:2].flatten(0, 1), tokens[2]

    def splatted(gaussians, blend, upscale):
        operator = distill.triplet_operator(gaussians, t, grid, blend, upscale)
        return torch.where(operator.valid[:, None], operator(contexts), own)

    learned, measured = source.reconstruct(t), source.reconstruct(t, "depth")
    found = {"the view itself": own, "masks without 3D": distill.image_features(own, t, grid)[0], "3D without masks": splatted(learned, 1.0, "bilinear"),
             "SnD": splatted(learned, 0.5, "masks"), "SnD, measured depth": splatted(measured, 0.5, "masks")}
    return {name: (cls[2].half().cpu(), x.half().unflatten(0, grid).cpu()) for name, x in found.items()}


def score_targets(name, seed, args):
    """What heads read of the features that a student is taught, before anything is trained: {name: scores}. A student
    that learned its lesson exactly would score so; some score better, so they are no bound."""
    asked, vit, views, features = asked_of_probes(args, "tiny", Path(args.out) / "probe"), lift.load_vit("tiny").to(args.device), [], []
    vit.norm = torch.nn.Identity()  # tokens are taken where the probes read them, after the last block
    for scenes in probes.open_split(asked):
        source = distill.Source(scenes, distill.parse(["--preset", "tiny", "--device", args.device]), vit.patch)
        generator = torch.Generator().manual_seed(0)
        places = [(scene, data.sample_triplet(scene, generator)) for scene in scenes for _ in range(2)]
        size = data.fit_size(scenes[0], asked.pixels, vit.patch)
        views.append(probes.store_views([scene.subset(triplet[2:]) for scene, triplet in places], size, asked))
        rows = [taught(source, vit, *place) for place in places]
        features.append({name: probes.Features(*map(torch.stack, zip(*(row[name] for row in rows)))) for name in rows[0]})
    found = {name: {} for name in features[0]}
    for kind, (truth, val_truth) in probes.truths(*views).items():
        for scores, (tokens, val_tokens) in zip(found.values(), zip(*(part.values() for part in features))):
            recipe = getattr(asked, kind)._replace(device=args.device)
            scores[kind] = probes.PROBES[kind](tokens, truth, val_tokens, val_truth, recipe)[0]
            if kind == "depth":
                scores[NO_CLS] = depth_of_patches(asked, tokens, truth, val_tokens, val_truth)
    remember(name, seed, args, found)


def table(names, found, beside=(), columns=COLUMNS) -> str:
    """Mean and, of several seeds, the standard deviation of each score; first the rows that these are to be seen `beside`."""
    lines = ["| | seeds | " + " | ".join(heading for *_, heading, _ in columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name in (*beside, *names):
        if name in found:  # the others have not been run yet
            cells = []
            for probe, score, _, digits in columns:
                values = [s[probe][score] for s in found[name] if s.get(probe, {}).get(score) is not None]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and not name.startswith("start") else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
            lines.append(f"| {name} | {len(found[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if any(name in found for name in names) else NOT_YET


def budget_picture(found, path):
    """Each score over the steps of training, and the aim."""
    charts, steps = [], max(max(runs) for runs in CURVES.values())
    mean = lambda run, probe, score: statistics.mean(scores[probe][score] for scores in found[run])
    for (probe, score), aim in AIMS.items():
        curves = {name: [(x, mean(run, probe, score)) for x, run in runs.items() if run in found] for name, runs in CURVES.items()}
        curves["aim"] = [(x, aim(mean("start", probe, score))) for x in (0, steps)]
        charts.append(data.line_chart(f"{probe}, {score} (over steps of four triplets)", curves))
    return data.picture_grid(path, ["", ""], [charts[:2], charts[2:]], scale=1)


def place_picture(found, path):
    """What Splat and Distill and its 2D control change, in percent of the start, over the start's rough place share."""
    charts = []
    for (probe, score), _ in AIMS.items():
        curves = {}
        for kind in ("SnD", "2D control"):
            points = []
            for strength in (0, 1, 2, 4):
                runs = [found.get(f"{name} artifacts{strength}") for name in ("start", kind)]
                if all(runs):
                    start, end = (statistics.mean(scores[probe][score] for scores in run) for run in runs)
                    points.append((runs[0][0]["place share"]["rough"], 100 * (end / start - 1)))
            curves[kind] = points
        charts.append(data.line_chart(f"{probe}, {score}: change in % (over the start's rough place share, %)", curves))
    return data.picture_grid(path, ["", ""], [charts[:2], charts[2:]], scale=1)


def score_pointmaps(name, seed, args):
    """Distill3R's miniature with one loss of Table III: trained on the cache that all share, measured on held-out rooms."""
    folder, out = Path(args.out) / "cache", folder_of(name, seed, args)
    common = ["--preset", "tiny", "--scene_dir", args.scene_dir, "--cache", str(folder), "--out", str(out), "--device", args.device]
    distill3r.main(["cache", *common])
    distill3r.main(["train", *common, "--seed", str(seed), "--resume", *TABLE3[name]])
    distill3r.main(["eval", *common, "--models", *(["mean", "student", "teacher"] if name == EQ2 else ["student"])])
    remember(name, seed, args, json.loads((out / "result.json").read_text()))


def score_tokens(name, seed, args):
    """Distill3R with a network for a teacher, the built-in student: from its pointmaps alone, as in the paper, or from its fused tokens as well."""
    folder, out, teacher, model_of = Path(args.out) / "cache_tokens", folder_of(name, seed, args), distill3r.load_student("tiny"), distill3r.model_of
    common = ["--preset", "tiny", "--size", *map(str, train.SIZE), "--scene_dir", args.scene_dir, "--cache", str(folder), "--out", str(out), "--device", args.device]
    asked = lambda given, wanted: model_of(given, {"teacher": "tiny"}.get(wanted, wanted))
    with mock.patch.object(distill3r, "model_of", asked), tokens_compared(teacher.to(args.device), TOKENS[name]):
        distill3r.main(["cache", *common])
        distill3r.main(["train", *common, "--seed", str(seed), "--resume"])
        distill3r.main(["eval", *common, "--models", "student", "teacher"])
    rooms = train.rooms_in_memory(data.open_scenes("data_small")[:100])
    off, still, *_ = train.compare_poses(distill3r.load_student(out / "student"), rooms, 1)
    remember(name, seed, args, json.loads((out / "result.json").read_text()) | {"rotation": {"off": off, "still": still}})


@contextlib.contextmanager
def tokens_compared(teacher, weight):
    """Meanwhile the loss of 06 has a second part: 1 minus the cosine between the teacher's fused tokens and a linear map of the student's."""
    fused, (new, save, loss_of) = {}, (distill3r.new_student, distill3r.save_student, distill3r.loss_of)
    keep = lambda decoder, _, levels: fused.update({decoder: torch.cat(levels[-1])})
    teacher.decoder.register_forward_hook(keep)

    def new_student(args):
        student = new(args)
        student.decoder.register_forward_hook(keep)
        student.to_teacher = torch.nn.Linear(student.config.dec_dim, teacher.config.dec_dim)
        return student

    def both(student, sample, args, seed):
        loss = loss_of(student, sample, args, seed)
        with torch.no_grad():
            teacher([image.to(args.device) for image in sample.images], generator=torch.Generator().manual_seed(seed))
        likeness = torch.nn.functional.cosine_similarity(student.to_teacher(fused[student.decoder].float()), fused[teacher.decoder].float(), -1)
        return loss._replace(total=loss.total + weight * (1 - likeness.mean()))

    def save_student(student, folder):
        del student.to_teacher
        save(student, folder)
    with mock.patch.multiple(distill3r, new_student=new_student, save_student=save_student, loss_of=both):
        yield


def score_circle(name, seed, args):
    """Splat and Distill on four neighbouring views of a few rooms, with measured depth. "true": poses and depth are the
    rooms' own; "inferred", "built_in": they are what a student of Distill3R has found in the pictures alone."""
    folder, kind = Path(args.out) / "circle", CIRCLE[name]
    student = {"inferred": str(folder_of(EQ2, 0, args) / "student"), "built_in": "tiny"}.get(kind)
    if kind == "inferred" and not Path(student).exists():
        score_pointmaps(EQ2, 0, args)
    data.make_rooms(folder / "rooms", **CIRCLE_ROOMS)
    for room in sorted((folder / "rooms").glob("room_*")):
        meta = json.loads((room / "transforms.json").read_text())
        for start in range(0, len(meta["frames"]) - 3, 4):
            true, inferred = (folder / which / f"{room.name}_{start:02d}" for which in ("true", kind))
            if not true.exists():
                copy_views(room, meta, slice(start, start + 4), true)
            if not inferred.exists():
                out = folder / "infer"
                distill3r.main(["infer", "--preset", "tiny", "--images", str(true / "images"), "--weights", student, "--out", str(out),
                                "--device", args.device])
                inferred.parent.mkdir(exist_ok=True)
                (out / "scene").rename(inferred)
    score_run(name, seed, args, ["--geometry", "depth", "--masks", "superpixels", "--scene_dir", str(folder / kind)])


def copy_views(room, meta, which, target):
    """Some views of a room as a scene of its own; a folder that exists is a whole one."""
    aside = target.with_name(f".{target.name}")
    for frame in meta["frames"][which]:
        for file in (value for key, value in frame.items() if key.endswith("file_path")):
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(room / file, aside / file)
    (aside / "transforms.json").write_text(json.dumps({**meta, "frames": meta["frames"][which]}))
    aside.rename(target)


def pointmap_table(found) -> str:
    lines = ["| | seeds | accuracy ↓ | median | completeness ↓ | median | scale | conf. rank |", "|---" * 8 + "|"]
    rows = {"mean pointmap": [r["mean"] for r in found.get(EQ2, [])[:1]], "teacher (geometry with errors)": [r["teacher"] for r in found.get(EQ2, [])[:1]]}
    rows |= {name: [r["student"] for r in found[name]] for name in TABLE3 if name in found}
    for label, results in rows.items():
        values = list(zip(*([*r["mean"].values(), r["calibration"]["rank"]] for r in results)))
        cells = [f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {label} | {len(results) if label in TABLE3 else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if EQ2 in found else NOT_YET


def tokens_table(found) -> str:
    lines = ["| | seeds | accuracy ↓ | completeness ↓ | rotation off by ° ↓ | standing still |", "|---" * 6 + "|"]
    for name in (name for name in TOKENS if name in found):
        results = found[name]
        values = zip(*([r["student"]["mean"][key] for key in ("accuracy_mean", "completeness_mean")] + [r["rotation"]["off"], r["rotation"]["still"]] for r in results))
        cells = [f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(set(v)) > 1 else "") for v in values]
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def in_words(name) -> str:
    flags = RUNS[name]
    return "the weights as they are" if flags is None else f"`{' '.join(flags)}`" if flags else "the defaults"


def write_study(args):
    """All that is finished so far; what was written by hand below `KEPT` stays."""
    study, names = Path(args.study), (*RUNS, *STARTS, *REAL, TARGETS, *TABLE3, *TOKENS, *CIRCLE)
    records = {name: found for name in names if (found := remembered(name, args))}
    found = {name: [record["scores"] for record in records[name]] for name in records}
    targets = {name: [scores] for name, scores in found.get(TARGETS, [{}])[0].items()}
    _, _, notes = study.read_text().partition(KEPT) if study.exists() else ("", "", "\n")
    flags = "\n".join(f"| {name} | {in_words(name)} |" for name in RUNS)
    if "start" in found:
        budget_picture(found, Path(args.scores) / "budget.png")

    place = ""
    if all(f"{kind} artifacts{strength}" in found for kind in THREE for strength in (0, 1, 2, 4)):
        picture = place_picture(found, Path(args.scores) / "place.png")
        place = f"\n![the change of each score over the place share of the start]({Path(args.scores).name}/{picture.name})\n"

    others = ' "Foreign": the start has never seen a room (`foreign_start` of tests/study.py). "Semantic": the built-in ViT after self-distillation (`tiny/train.py semantic`).'

    def when(*names):
        dates, machines = (sorted({record[key] for name in names for record in records.get(name, [])}) for key in ("date", "on"))
        return f"*{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {'; '.join(machines)}; {args.rooms} rooms.*" if dates else ""

    text = f"""# What each part brings

`python tests/study.py`: preset `tiny` of `04_distill.py` on built-in rooms, every eighth held out. Heads of `05_probe.py` trained on
{args.views} views of each training room and scored on {args.views} of each held-out one; recall is within 1.5 patches. Means and standard
deviations over the seeds of the training; the same heads, views and pairs for all.

## Splat and Distill and its controls

{when(*MAIN)}

{table(MAIN, found)}

## SnD's Table 5 in miniature

{when(*TABLE5)}

{table(TABLE5, found, ["SnD", "feature rendering (G)"])}

## More steps

{when(*BUDGET)}

{table(BUDGET, found, ["start", "SnD"])}

![each score over the steps of training, and the aim: depth 12 % and normals 6 % better, mIoU 2 points, recall no worse]({Path(args.scores).name}/budget.png)

## Other choices

{when("SnD", *OTHERS)}

{table(OTHERS, found, ["SnD"])}

## Starts with artifacts

{when(*STARTS).replace(f"{args.rooms} rooms", "200 rooms")} Noise of 0, 1, 2 or 4 standard deviations stands on the start's position embedding, so that
its features depend on their place in the picture; "fresh": it is another one in every picture, so that they do not. 600 steps of four triplets. "Rough place share" is the part of the tokens' variance that their
place explains and that perspective does not (`place_share` of 05_probe.py).{others}

{table(STARTS, found, columns=[*COLUMNS, ("place share", "rough", "rough place share %", 1)])}
{place}
## Real pictures

{when(*REAL).replace(f"{args.rooms} rooms", "../shared/data")} Two RGB-D scenes, the kitchen of 7-Scenes (26 training views, 4 held-out ones) and a shelf (13 and 2). Each is distilled
on and probed alone, by the preset's 200 steps. Normals are those of the measured depth.

{table(REAL, found, columns=REAL_COLUMNS)}

## What the student is taught

{when(TARGETS)} Heads on the targets of the first step in place of features: what a student that learned them exactly would score (some score better).
"The view itself" is the starting backbone's own tokens of the same views. Heads see two views a room here, not four, so rows compare
with each other and not with the tables above. No training, so no seeds.

{table(targets, targets)}

## Distill3R's Table III in miniature

{when(*TABLE3)}

{pointmap_table(found)}

## Distillation of features beside pointmaps

{when(*TOKENS)} The teacher is the built-in student, at 48x64; its own tokens are compared with a linear map of the student's (`tokens_compared` of tests/study.py).

{tokens_table(found)}

## Poses from pictures: Distill3R, then Splat and Distill

{when("start", *CIRCLE)}

{table(CIRCLE, found, ["start"])}

## The runs

| run | flags of 04_distill.py |
|---|---|
{flags}

{KEPT}"""
    data.write_whole(study, (text + notes).encode())


def check_settings(args):
    """What lies in --scores and was run otherwise is not to stand in one table with what follows."""
    path, how = Path(args.scores) / "settings.json", dict(rooms=args.rooms, views=args.views, heads=probes.PRESETS["tiny"], preset=distill.PRESETS["tiny"])
    how = json.loads(json.dumps(how))
    if path.exists() and (before := json.loads(path.read_text())) != how:
        differ = ", ".join(f"{key} {before.get(key)}" for key in how if before.get(key) != how[key])
        raise SystemExit(f"{path}: what is here was run with other settings ({differ}); give another --scores and --study")
    data.write_whole(path, json.dumps(how, indent=1).encode())


def main(argv=None):
    parts = {name: functools.partial(score_run, flags=flags) for name, flags in RUNS.items()}
    parts |= dict.fromkeys(STARTS, score_start) | dict.fromkeys(REAL, score_real) | {TARGETS: score_targets} | dict.fromkeys(TABLE3, score_pointmaps) | dict.fromkeys(TOKENS, score_tokens) | dict.fromkeys(CIRCLE, score_circle)
    parser = argparse.ArgumentParser(description="Train and probe every variant; write docs/study.md.")
    parser.add_argument("--scene_dir", default="out/study/rooms", help="made if it is missing")
    parser.add_argument("--rooms", type=int, default=400)
    parser.add_argument("--views", type=int, default=4, help="views a room that the probes see")
    parser.add_argument("--out", default="out/study")
    parser.add_argument("--study", default="docs/study.md")
    parser.add_argument("--scores", default="docs/scores", help="what has been measured, a file a run and seed: these are not run again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    check_settings(args)
    if not Path(args.scene_dir).exists():
        data.make_rooms(args.scene_dir, scenes=args.rooms)
    for seed in range(args.seeds):
        for name in args.only:
            if not remembered(name, args, seed) and (seed == 0 or not name.startswith(("start", TARGETS))):
                print(f"-- {name}, seed {seed}", flush=True)
                parts[name](name, seed, args)
                write_study(args)
    write_study(args)
    print(f"  ->  {args.study}")


if __name__ == "__main__":
    main()
