"""Where a number comes from: what a row of a CSV file says of the code and the machine."""
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def origin(device, folder=ROOT):
    """{commit, torch, device}: what a figure was measured with: a torch.device, a checkout."""
    return {"commit": commit(folder), "torch": torch.__version__, "device": device_name(device)}


def commit(folder):
    """The commit of the checkout in a folder, "unknown" where it is none."""
    if not (Path(folder) / ".git").exists():  # git would name that of a folder above
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]  # no tags
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"


def device_name(device):
    """cpu, mps, or which GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware(device):
    """The name of the GPU, or of the processor where the system tells it."""
    if device.type != "cpu":
        return device_name(device)
    try:
        found = re.search("model name\t*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    name = found[1] if found else platform.processor() or "cpu"
    return " ".join(re.sub(r"\((R|TM)\)|CPU|@.*", " ", name).split())
