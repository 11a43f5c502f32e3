"""The decoding loop and its arithmetic: ids and tensors, no models, no text."""

__all__: list[str] = []
