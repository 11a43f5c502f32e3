"""What a recipe says; loads no weights."""

__all__: list[str] = []
