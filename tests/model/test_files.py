"""model/files.py: a JSON file that is there is whole."""

import json
import math

import pytest

from model.files import write_json


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
