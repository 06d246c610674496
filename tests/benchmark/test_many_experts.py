"""What more experts cost is measured for every number of them and both ways of choosing one."""

import json

import many_experts


def test_every_number_of_experts_is_measured(tmp_path):
    output = tmp_path / "many.json"
    many_experts.main(["--num_experts", "2", "1", "--repeats", "1", "--output", str(output)])
    content = json.loads(output.read_text())
    for name in ("each token by itself", "as a chain"):
        assert list(content[name]) == ["1", "2"]
        one, two = content[name].values()
        assert two["parameters"] < 1.01 * one["parameters"]
        assert all(one[way]["ratio"] == 1.0 and two[way]["ratio"] > 0 for way in many_experts.WAYS)
