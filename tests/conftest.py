"""Shared by all tests: the repository on the path, quiet threads, four small rooms; and two processes where the whole suite runs."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on shared cores its waiting threads would otherwise spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are small, and several processes run at a time
sys.path.insert(0, str(Path(__file__).parents[1]))

import importlib

import pytest

BESIDE = ("test_04_distill.py", "test_05_probe.py", "test_reproduce.py")  # half of the suite's time
OTHER_HALF = pytest.StashKey[tuple]()  # its process, and the file that it writes to


def pytest_sessionstart(session):
    config = session.config
    if config.args_source == config.ArgsSource.TESTPATHS and not config.option.collectonly:  # no tests were named
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *config.invocation_params.args]
        output = tempfile.TemporaryFile("w+")
        files = [Path(__file__).with_name(name) for name in BESIDE]
        config.stash[OTHER_HALF] = subprocess.Popen([*command, *files], stdout=output, stderr=subprocess.STDOUT), output


def pytest_ignore_collect(collection_path, config):
    return True if OTHER_HALF in config.stash and collection_path.name in BESIDE else None


def pytest_sessionfinish(session):
    if OTHER_HALF in session.config.stash:
        process, _ = session.config.stash[OTHER_HALF]
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            process.terminate()
        codes = {session.exitstatus, process.wait()} - {pytest.ExitCode.NO_TESTS_COLLECTED}  # of one half, with -k
        session.exitstatus = max(map(abs, codes), default=pytest.ExitCode.NO_TESTS_COLLECTED)  # below 0: killed by a signal


def pytest_terminal_summary(terminalreporter, config):
    if OTHER_HALF in config.stash:
        _, output = config.stash[OTHER_HALF]
        output.seek(0)
        terminalreporter.section(f"in a process beside this one: {', '.join(BESIDE)}")
        terminalreporter.write(output.read())
        terminalreporter.section("in this process")


@pytest.fixture(scope="session")
def rooms_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "data"
    importlib.import_module("01_data").make_rooms(folder, scenes=4, views=12)
    return folder


@pytest.fixture(scope="session")
def rooms(rooms_dir):
    return importlib.import_module("01_data").load_scenes(rooms_dir)
