"""One module per case, each with ``run(*, quick) -> Iterator[dict]``: flat rows of numbers and labels."""
