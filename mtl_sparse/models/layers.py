"""Names of the network's layers: short forms, and their order."""


def short(path: str) -> str:
    """Return a layer's name without "backbone/" and "/kernel": "layer1_0/conv1"."""
    return path.removeprefix("backbone/").removesuffix("/kernel")


def network_order(path: str) -> tuple[int, int, int, str]:
    """Return a sort key: the stem first, then stages and blocks by number, a block's layers by name, heads last."""
    name = short(path)
    if name.startswith("head_"):
        return (2, 0, 0, name)
    block, _, layer = name.partition("/")
    stage, _, index = block.removeprefix("layer").partition("_")
    return (1, int(stage), int(index), layer) if block.startswith("layer") else (0, 0, 0, name)
