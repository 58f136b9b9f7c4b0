"""Tables without the spaces that align them."""

import re


def squeeze(text):
    """A text with one space wherever there are several."""
    return re.sub(" +", " ", text)
