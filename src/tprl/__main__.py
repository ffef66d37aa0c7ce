"""``python -m tprl``, which ``accelerate launch -m tprl`` starts in every process."""

from tprl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
