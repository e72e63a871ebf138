"""lib/device.py: where a program runs, how it multiplies, and whether it can compile."""
import math
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import REPO

from lib.device import (
    autocast,
    matmul_seconds,
    memory_of,
    pick_compile,
    pick_device,
    pick_dtype,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_auto_takes_the_first_device_there_is():
    with (patch("torch.cuda.is_available", return_value=False),
          patch("torch.backends.mps.is_available", return_value=False)):
        assert pick_device("auto") == CPU
    with patch("torch.cuda.is_available", return_value=True):
        assert pick_device("auto") == CUDA


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", "", "cpu cpu", "CPU", "cuda:-1",
                                  "hpu", "xpu", "xla"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"device={name} is not there"):
        pick_device(name)


@pytest.mark.parametrize("name", ["float16", "int8", "", "bf16"])
def test_arithmetic_that_is_not_known_is_named(name):
    with pytest.raises(ValueError, match=f"dtype={name} is not known"):
        pick_dtype(name, CPU)


@pytest.mark.parametrize("bfloat16_seconds, picked", [(0.5, "bfloat16"), (0.9, "float32")])
def test_auto_takes_bfloat16_on_a_cpu_only_where_it_is_clearly_faster(bfloat16_seconds, picked):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    with patch("lib.device.matmul_seconds", seconds.get):
        assert pick_dtype("auto", CPU) == picked
        assert pick_dtype("float32", CPU) == "float32"
        assert pick_dtype("bfloat16", CPU) == "bfloat16"


@pytest.mark.parametrize("laps, best, n", [
    ([9, 3, 1], 3, 2),                         # slow: two are enough
    ([9e-3, 1e-3] + 10 * [2e-3] + [0], 1e-3, 12)])
def test_a_cpu_is_timed_once_and_briefly(laps, best, n):
    clock = [moment for lap in laps for moment in (0, lap)]
    matmul_seconds.cache_clear()
    try:
        with patch("time.perf_counter", side_effect=clock) as looked:
            assert matmul_seconds(torch.float64) == matmul_seconds(torch.float64) == best
            assert looked.call_count == 2 * n
    finally:
        matmul_seconds.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_run_in_the_dtype(dtype):
    x = torch.ones(2, 2)
    with autocast(dtype, CPU):
        assert (x @ x).dtype == getattr(torch, dtype)


def test_memory_of_a_cpu_is_known():
    assert 1e8 < memory_of(CPU) < 1e15
    assert memory_of(CUDA) == math.inf, "a GPU says itself when it is full"


@pytest.mark.parametrize("wanted, device, works, picked", [
    (None, CPU, True, False), (None, CUDA, True, True), (None, CUDA, False, False),
    (True, CPU, True, True), (False, CUDA, True, False)])
def test_compiling_is_for_gpus_unless_it_is_asked_for(wanted, device, works, picked):
    with patch("lib.device.can_compile", return_value=works):
        assert pick_compile(wanted, device) is picked


@pytest.mark.parametrize("wanted, works, picked", [(None, True, True), (None, False, False),
                                                   (False, True, False)])
def test_a_long_job_is_compiled_on_a_cpu_as_well(wanted, works, picked):
    with patch("lib.device.can_compile", return_value=works):
        assert pick_compile(wanted, CPU, long=True) is picked


def test_compiling_that_is_asked_for_needs_a_compiler():
    with (patch("lib.device.can_compile", return_value=False),
          pytest.raises(ValueError, match="needs a C.. compiler.*g.. or clang.*--compile=False")):
        pick_compile(True, CPU)


def test_a_compiler_that_is_missing_is_noticed(tmp_path):
    program = ("import torch\n"
               "from lib.device import can_compile\n"
               "print('works:', can_compile(torch.device('cpu')))")
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    found = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True,
                           text=True, env=environment | {"PATH": str(tmp_path)})
    assert found.stdout == "works: False\n", found.stderr
