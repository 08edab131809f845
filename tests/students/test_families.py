"""Each causal and sequence-to-sequence family of transformers: the product computes what the model does, or refuses.

`python tests/support/families.py` writes the table.
"""

import pytest

from support import families


@pytest.mark.slow
@pytest.mark.parametrize("key", families.ALL)
def test_no_check_of_a_family_is_wrong_or_a_traceback(key: str) -> None:
    results = families.run_family(key)
    failed = {name: r["detail"] for name, r in results.items() if r["status"] in ("wrong", "error")}
    assert not failed
