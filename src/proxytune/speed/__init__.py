"""What steering costs: measured, and planned."""

__all__: list[str] = []
