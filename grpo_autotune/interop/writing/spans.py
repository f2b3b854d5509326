"""A piece of a text replaced, the rest left as it is."""


def replaced(data: bytes, span: tuple[int, int], words: str) -> str:
    """UTF-8 text with the bytes of a span replaced."""
    return (data[: span[0]] + words.encode() + data[span[1] :]).decode()
