"""Several numbers after one option: `--shots 5 10` beside `--shots 5 --shots 10`."""

import re
from typing import Any

from typer.core import TyperCommand

NUMBER = re.compile(r"[+-]?\d+")


class SpreadingCommand(TyperCommand):
    """A command whose repeatable options take all whole numbers that follow.

    The parser takes one value per option, so `--shots 5 10` is read as `--shots 5 --shots 10`. Only whole numbers are
    taken, up to the first word that is none: an argument after them (`--shots 5 10 few_shot`) and further options are
    left alone. Of words, an option takes one each time it is named, as more could not be told from an argument.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the parser's, of the arguments spread out."""
        options = [option for option in self.get_params(ctx) if getattr(option, "multiple", False)]
        return super().parse_args(ctx, spread(args, {name for option in options for name in option.opts}))


def spread(args: list[str], repeatable: set[str]) -> list[str]:
    """Arguments with an option before each of its values."""
    made: list[str] = []
    option, plain = None, False  # the option whose numbers we are among; after `--` nothing is one
    for place, word in enumerate(args):
        name, _, value = word.partition("=")
        if plain or word == "--":
            made.append(word)
            option, plain = None, True
        elif option is not None and NUMBER.fullmatch(word):
            made += [word] if place and args[place - 1] == option else [option, word]
        else:
            option = name if name in repeatable and (not value or NUMBER.fullmatch(value)) else None
            made.append(word)
    return made
