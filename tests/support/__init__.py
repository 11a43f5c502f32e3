"""What several test files share: tiny models, the oracle, data sets, and ways to run things."""

import pytest

# A failed assert in these shows its values, as one in a test does.
pytest.register_assert_rewrite("support.commands", "support.oracle", "support.served")
