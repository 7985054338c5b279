"""A GPU made of air: fake tensors on device ``cuda`` with a CPU build of torch, so that the GPU's own kernels and autocast rules are met.

Shapes and lifetimes of tensors are real, numbers are not computed. To be loaded before torch, which asks for its CUDA hooks only once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def load_fake_gpu() -> None:
    """Compile (once for each torch) and load. Errors: RuntimeError when torch is loaded already or there is no compiler."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is loaded already: start a new process")
    found = compiler()
    if found is None:
        raise RuntimeError("a fake GPU needs a C++ compiler: c++ on the path, or CXX")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    torch = Path(spec.origin).parent
    version = (torch / "version.py").read_text(encoding="utf-8")
    name = hashlib.sha256((version + str(torch) + SOURCE.read_text(encoding="utf-8")).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ftlaunch-fake-gpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    library = folder / f"{name}.so"
    if not library.exists():
        draft = folder / f"{name}-{os.getpid()}.so"
        command = [found, "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), f"-I{torch}/include", f"-L{torch}/lib"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib", "-o", str(draft)], check=True)
        draft.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
