"""From traces to understanding: why each token of an answer was chosen."""

__all__: list[str] = []
