"""Shared by all tests: the repository on the path, quiet threads, four small rooms."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on shared cores its waiting threads would spin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are small, and some tests start two processes at a time
sys.path.insert(0, str(Path(__file__).parents[1]))

import importlib

import pytest


@pytest.fixture(scope="session")
def rooms_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "data"
    importlib.import_module("01_data").make_rooms(folder, scenes=4, views=12)
    return folder


@pytest.fixture(scope="session")
def rooms(rooms_dir):
    return importlib.import_module("01_data").load_scenes(rooms_dir)
