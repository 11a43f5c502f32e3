"""Text in, text out."""

__all__: list[str] = []
