"""How many units of a layer stay, in either framework."""


def kept(size: int, amount: float, round_to: int) -> int:
    """How many of `size` units stay: at least one, and a multiple of `round_to` where that many would stay anyway."""
    wanted = size * (1 - amount)
    if wanted < round_to:
        return min(size, max(1, round(wanted)))
    return min(size, max(1, round(wanted / round_to)) * round_to)
