"""The paper's tasks for lm-evaluation-harness: one YAML file each, and what they share in utils.py.

``lm_eval --include_path`` takes this directory too; ``proxytune eval --tasks-dir`` prints where it is.
"""

from __future__ import annotations

__all__: list[str] = []
