"""Where members run."""

__all__: list[str] = []
