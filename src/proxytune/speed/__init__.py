"""The cost of steering, measured and predicted."""

__all__: list[str] = []
