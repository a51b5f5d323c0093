"""How wide the columns of a table are where the terminal is too narrow for it."""

from collections.abc import Sequence

from rich.cells import cell_len

_NAME = 10  # characters of the first column that are left to it in any case
_FRAME = 3  # a space on either side and a line, of each column; and one line more


def fitted(columns: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """The widths of a table's columns, so that as little as possible is broken.

    Titles are broken first, between words; then the first column, which names the rows; then the others; then words in
    the first column.

    Args:
        columns: title and cells of each.
        width: of the terminal, in characters.

    Returns:
        In characters, without the frame; None where there is nothing to do, or where that is too wide.
    """
    room = width - _FRAME * len(columns) - 1
    whole = [max(map(cell_len, texts)) for texts in columns]
    if sum(whole) <= room:
        return None
    words = [max((cell_len(word) for text in texts for word in text.split()), default=0) for texts in columns]
    cells = [max([least, *map(cell_len, texts[1:])]) for least, texts in zip(words, columns, strict=True)]
    for least in (cells, [*words[:1], *cells[1:]], words, [min(words[0], _NAME), *words[1:]]):
        left = room - sum(least)
        if left >= 0:
            more = min(left, whole[0] - least[0])
            return [least[0] + more, *_shared(least[1:], whole[1:], left - more)]
    return None


def _shared(widths: Sequence[int], most: Sequence[int], left: int) -> list[int]:
    """Columns made wider by what is left, one character each in turn."""
    found = list(widths)
    while left > 0 and (growing := [place for place in range(len(found)) if found[place] < most[place]]):
        for place in growing[:left]:
            found[place] += 1
        left -= len(growing[:left])
    return found
