"""Text from files of other people, made safe to print."""


def clean(text: str) -> str:
    """Return a text as one line of printable characters, so that it cannot control the terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
