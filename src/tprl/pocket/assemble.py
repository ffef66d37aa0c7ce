"""Where a model comes from: pocket-llava is put together once into a cache folder, others are loaded as they are."""

import hashlib
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import tprl
from tprl import processes
from tprl.checkpoint import make_once, save_tensors
from tprl.lvlm.model import Lvlm
from tprl.pocket.base import CHAT_TEMPLATE, image_token_id, load_base
from tprl.pocket.model import add_delta, new_llava, new_processor
from tprl.pocket.precision import fastest_dtype

NAME = "pocket-llava"
ASSETS = Path(tprl.__file__).parent / "assets"
DELTA = ASSETS / "pocket-llava.safetensors"
SHIPPED_PRUNER = ASSETS / "pruner"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_folder() -> Path:
    """Where this package keeps what it can make again: ``$TPRL_CACHE``, else ``~/.cache/tprl``."""
    return Path(os.environ.get("TPRL_CACHE", Path.home() / ".cache" / "tprl"))


def pocket_llava() -> Path:
    """The folder of pocket-llava in Hugging Face's form, put together where it does not stand yet.

    Raises:
        FileNotFoundError: the package's weights or the base model's package are missing.
    """
    if not DELTA.is_file():
        raise FileNotFoundError(f"the weights of {NAME} are missing: {DELTA}")
    made_from = hashlib.sha256(DELTA.read_bytes() + CHAT_TEMPLATE.encode())
    folder = cache_folder() / f"{NAME}-{made_from.hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with processes.first_alone():  # of processes that work together, transformers lets the first alone save a model
        make_once(folder, partial(_put_together, folder))
    return folder


def _put_together(folder: Path) -> None:
    """``assemble`` the shipped model into ``folder``, whole or not at all."""
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        assemble(DELTA, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def assemble(delta: Path, folder: Path) -> None:
    """Write the model and its processor into ``folder``, loadable with ``from_pretrained(folder)``."""
    base, tokenizer = load_base()
    llava = new_llava(base, image_token_id(tokenizer))
    add_delta(llava, load_file(delta))
    llava.save_pretrained(folder)
    new_processor(tokenizer).save_pretrained(folder)


def save_delta(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write what ``to_delta`` gives."""
    save_tensors(path, tensors, {"format": "pt"})


def _check_device(device: str) -> None:
    """Raise ValueError unless this machine has a device of that name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not allowed on this machine, 'cpu' is: {reason}") from error


def choose_dtype(dtype: str, device: str) -> str:
    """One of ``DTYPES`` by name. "auto" is bfloat16 where ``device`` multiplies it faster, else float32; processes that
    work together agree on it.

    Raises:
        ValueError: the dtype is not one of these, or this machine has no such device.
    """
    _check_device(device)
    if dtype == "auto":
        return "bfloat16" if processes.agreed(fastest_dtype(device) == torch.bfloat16) else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not 'auto' or one of {', '.join(DTYPES)}")
    return dtype


def open_lvlm(model: str, dtype: str = "auto", device: str = "cpu") -> Lvlm:
    """A frozen model by name.

    Args:
        model: "pocket-llava", a folder, or a Hub id.
        dtype: see ``choose_dtype``.
        device: as torch names it.

    Raises:
        ValueError: the dtype is not one of these, or this machine has no such device.
        FileNotFoundError: the model is missing.
    """
    precision = DTYPES[choose_dtype(dtype, device)]
    return Lvlm.from_pretrained(str(pocket_llava()) if model == NAME else model, precision, device)
