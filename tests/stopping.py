"""Runs of a stage as a user starts it; what a command says when it refuses; and runs that are to be killed, forked from a
process that has imported torch already, which saves seconds each."""
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

distill, _ = (importlib.import_module(name) for name in ("04_distill", "06_distill3r"))  # the last one imports them all
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["06_distill3r"])


ROOT = Path(__file__).parents[1]
TORCHRUN = """-m torch.distributed.run --nproc_per_node=2 --master_port=0 --rdzv_backend=c10d
    --rdzv_endpoint=localhost:0""".split()


def script(stage, *arguments, launcher=(), cwd=ROOT):  # -> what it printed
    command = [sys.executable, *launcher, str(ROOT / f"{stage}.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(main, *arguments):
    with torch.enable_grad():
        main([str(a) for a in arguments])


def refusal(main, *arguments):  # the one line that a command ends with
    with pytest.raises(SystemExit) as stop:
        call(main, *arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def child(stage, arguments, file_limit=None):
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    importlib.import_module(stage).main([str(a) for a in arguments])


def fork(stage, *arguments, **options):
    process = SERVER.Process(target=child, args=(stage, arguments), kwargs=options)
    process.start()
    return process


def finish(process):
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


def kill_and_resume(again, out, kills, pauses):
    """`again` starts the run that writes to `out`; it is killed `kills` times, each after the next of `pauses` in seconds, and
    then left to its end."""
    while kills:
        process = again()
        process.join(next(pauses))
        if process.exitcode is not None:  # came to its end first: begin again
            assert process.exitcode == 0
            for file in out.glob("checkpoint*"):
                file.unlink()
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills -= 1
    assert finish(again()) == 0


def log_of(out):
    return [{**json.loads(line), "seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()]


def same(out, whole, steps, *files):
    """A run has come to the same bytes, and through the same steps, as an undisturbed one."""
    for name in ("student/model.safetensors", "student/config.json", *files):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert log_of(out) == log_of(whole) and len(log_of(out)) == steps
    ours, theirs = (distill.read_run(folder / "checkpoint.safetensors") for folder in (out, whole))
    assert ours[0] == theirs[0] == steps and ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(ours[2][key], value) for key, value in theirs[2].items())
