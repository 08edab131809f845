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


def test_the_table_shows_no_wrong_value_and_no_traceback() -> None:
    found = families.read()
    statuses = {(key, name): r["status"] for key, row in found["families"].items() for name, r in row.items()}
    failed = [where for where, status in statuses.items() if status in ("wrong", "error")]
    assert failed == []
    assert families.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == families.table(found)
