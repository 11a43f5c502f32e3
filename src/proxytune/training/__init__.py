"""``proxytune train``: trains M+ from M- with TRL's ``SFTTrainer``, alone or inside the mixture, and makes a recipe of
it."""

__all__: list[str] = []
