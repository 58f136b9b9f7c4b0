"""Sizes of images: one side in pixels of squares, else (height, width)."""

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def text(size: Size) -> str:
    """`"224"` of a square, `"192x256"` of height 192 and width 256."""
    return str(size) if isinstance(size, int) else "x".join(map(str, pair(size)))
