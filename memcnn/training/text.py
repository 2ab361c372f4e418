"""Text from outside on its way to a screen."""


def clean(text: str) -> str:
    """One line of printable characters, whatever a stranger's file holds."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
