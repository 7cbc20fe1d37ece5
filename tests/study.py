"""The study: what each part of Splat and Distill brings on the built-in rooms, by the probes of 05. Hours; a killed one goes on.

Run     OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/study.py          all runs, three seeds: about 3 minutes each
        ... python tests/study.py --only SnD "2D control" --seeds 1               some of them
Out     STUDY.md; out/study/: the runs, their scores, the operators that they share.
"""
import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

lift, distill, probes = (importlib.import_module(name) for name in ("02_lift", "04_distill", "05_probe"))

PLAIN = ["--no_blend", "--upscale", "bilinear"]
MAIN = {  # name -> what 04_distill is told; "start" is the backbone as it is
    "start": None,
    "2D control": ["--target", "image", *PLAIN],
    "masks without 3D": ["--target", "image"],
    "3D without masks": PLAIN,
    "correspondence loss": ["--loss", "correspondence", *PLAIN],
    "feature rendering (G)": ["--loss", "feature", "--frozen_teacher"],
    "SnD": []}
TABLE5 = {
    "without blending (A)": ["--no_blend"],
    "bilinear upscaling (B)": ["--upscale", "bilinear"],
    "cosine loss (C)": ["--loss", "cosine"],
    "frozen teacher (D)": ["--frozen_teacher"],
    "context views (E)": ["--target", "context"],
    "superpixels (F)": ["--masks", "superpixels"],
    "basic variant (H)": ["--frozen_teacher", *PLAIN]}
OTHERS = {
    "temperatures 1 and 1": ["--tau_student", "1", "--tau_teacher", "1"],
    "temperatures 0.1 and 0.1": ["--tau_student", "0.1", "--tau_teacher", "0.1"],
    "plane sweep": ["--geometry", "sweep"],
    "measured depth": ["--geometry", "depth"],
    "unmatched pixels dropped": ["--drop_unmatched"],
    "shared head": ["--shared_head"],
    "mean over patches": ["--downscale", "area"]}
RUNS = MAIN | TABLE5 | OTHERS
COLUMNS = [("depth", "AbsRel", "depth AbsRel ↓", 4), ("depth", "RMSE", "RMSE ↓", 4), ("normals", "RMSE", "normals RMSE ° ↓", 2),
           ("segmentation", "mIoU", "mIoU % ↑", 2), ("segmentation", "mAcc", "mAcc % ↑", 2),
           *(("correspondence", f"1.5 patches{bin}", f"recall{bin or ', all'} % ↑", 1) for bin in ("", *(f" {b}" for b in probes.VIEWPOINTS)))]


def scores_of(name, seed, args) -> dict:
    """Train, probe, remember: {probe: {score: value}}."""
    folder = Path(args.out) / f"{name.replace(' ', '_')}_{seed}"
    if (folder / "scores.json").exists():
        return json.loads((folder / "scores.json").read_text())
    student = "tiny"
    if RUNS[name] is not None:
        student = folder / "student"
        if not (folder / "result.json").exists():
            distill.main(["--preset", "tiny", "--scene_dir", args.scene_dir, "--out", str(folder), "--operators", str(Path(args.out) / "operators"),
                          "--seed", str(seed), "--device", args.device, "--resume", *RUNS[name]])
    asked = probes.parse(["--scene_dir", args.scene_dir, "--models", f"model={student}", "--out", str(folder / "probe"), "--device", args.device])
    models, *views = probes.prepare(asked)  # the same heads and pairs for all seeds: what varies is the training
    scores = probes.probe(models, *views, asked)["model"].scores
    shutil.rmtree(folder / "probe")
    lift.write_whole(folder / "scores.json", json.dumps(scores).encode())
    for checkpoint in folder.glob("checkpoint*"):
        checkpoint.unlink()
    return scores


def table(names, found) -> str:
    """Mean and, of several seeds, the standard deviation of each score."""
    lines = ["| | seeds | " + " | ".join(heading for *_, heading, _ in COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name in names:
        if name in found:
            cells = []
            for probe, score, _, digits in COLUMNS:
                values = [s[probe][score] for s in found[name] if s.get(probe, {}).get(score) is not None]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and name != "start" else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
            lines.append(f"| {name} | {len(found[name])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_study(found, args):
    flags = "\n".join(f"| {name} | {'the weights as they are' if f is None else f'`{chr(32).join(f)}`' if f else 'the defaults'} |" for name, f in RUNS.items())
    text = f"""# What each part brings

`python tests/study.py`, {platform.machine()}, {torch.get_num_threads()} CPU thread(s) of a shared 2-core machine, {args.date}. Preset `tiny` of
`04_distill.py` on the {args.scene_dir} rooms; heads of `05_probe.py` trained on the training rooms and scored on the held-out ones; recall within
1.5 patches. Means and standard deviations over the seeds of the training that have been run; the same heads, views and pairs for all.

{table(MAIN, found)}

SnD's Table 5 in miniature:

{table(["SnD", *TABLE5], found)}

Other choices:

{table(["SnD", *OTHERS], found)}

| run | flags of 04_distill.py |
|---|---|
{flags}
"""
    lift.write_whole(Path(args.study), text.encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train and probe every variant; write STUDY.md.")
    parser.add_argument("--scene_dir", default="data")
    parser.add_argument("--out", default="out/study")
    parser.add_argument("--study", default="STUDY.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.date = importlib.import_module("datetime").date.today().isoformat()
    found = {}
    for seed in range(args.seeds):
        for name in args.only:
            if seed == 0 or RUNS[name] is not None:
                print(f"-- {name}, seed {seed}", flush=True)
                found.setdefault(name, []).append(scores_of(name, seed, args))
                write_study(found, args)
    print(f"  ->  {args.study}")


if __name__ == "__main__":
    main()
