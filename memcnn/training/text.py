"""Text from files of other people, made safe to print."""


def clean(text: str) -> str:
    """Return a text as one line of printable characters, whatever a file from elsewhere contains."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
