"""Lists on the command line."""


def parse_names(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once.

    Raises:
        ValueError: there are none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ValueError(f"expected comma-separated names, got {text!r}")
    return names


def parse_budgets(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers, each once.

    Raises:
        ValueError: something is no whole number of at least 1.
    """
    budgets = []
    for part in parse_names(text):
        if not part.isdecimal() or int(part) < 1:
            raise ValueError(
                f"budget {part!r} is not allowed; whole numbers from 1 to a picture's number of visual tokens, "
                "as in 192,128,64,32"
            )
        budgets.append(int(part))
    return tuple(dict.fromkeys(budgets))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers from 0 on, each once.

    Raises:
        ValueError: something is none.
    """
    names = parse_names(text)
    if wrong := [name for name in names if not name.isdecimal()]:
        raise ValueError(f"seeds are whole numbers from 0 on, got {', '.join(wrong)}")
    return tuple(int(name) for name in names)
