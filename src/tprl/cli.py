"""The command line ``tprl``. Every command is a function in ``tprl.commands``; tyro makes the options of its arguments.

The modules are imported when they are called, since transformers takes seconds.
"""

import os
import sys
from importlib import import_module

COMMANDS = {
    "answer": "answer a question about a picture, with and without pruning",
    "demo": "serve a page to ask about pictures, and to see what was kept",
    "train": "train a pruner",
    "evaluate": "measure methods under budgets",
    "benchmark": "measure all methods on all data",
    "ablate": "train with one part changed at a time, and measure what it is worth",
    "profile": "tell where the time of training and of an answer goes",
    "report": "make a page of results",
    "flops": "count a model's FLOPs at token budgets",
    "data": "make data, or look at them: sheet, make",
    "pocket": "the small LVLM of this package: path, train, pack",
}
GROUPS = {"data": ("sheet", "make"), "pocket": ("path", "train", "pack")}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of the user are one sentence on standard error and code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from tprl import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"tprl: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():  # bars are for people
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import tyro

    from tprl.checkpoint import DamagedCheckpoint

    module = import_module(f"tprl.commands.{name}")
    prog, config = f"tprl {name}", (tyro.conf.PositionalRequiredArgs,)
    try:
        if name in GROUPS:
            functions = {action: getattr(module, action) for action in GROUPS[name]}
            tyro.extras.subcommand_cli_from_dict(
                functions, prog=prog, args=rest, description=module.__doc__, config=config
            )
        else:
            tyro.cli(getattr(module, name), prog=prog, args=rest, config=config)
    except (ValueError, OSError, DamagedCheckpoint, FloatingPointError) as error:
        print(f"tprl {name}: {error}", file=sys.stderr)
        return 2
    return 0


def _overview() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: tprl COMMAND ...", "", *lines, "", "tprl COMMAND --help tells the options of each."])


if __name__ == "__main__":
    raise SystemExit(main())
