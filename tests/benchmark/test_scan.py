"""Every form of the scan that is timed computes the recurrence, and its gradients."""

import json

import pytest
import scan
import torch

IN_FLOAT32 = ("stored", "transformers")  # whatever their arguments are


def results(form, arguments):
    output = form(*arguments)
    weight = torch.arange(output.numel(), dtype=output.dtype).view_as(output).sin()
    return [output, *torch.autograd.grad((output * weight).sum(), arguments, materialize_grads=True)]


@pytest.mark.parametrize("length", [1, 7, scan.CHUNK, 2 * scan.CHUNK + 5])
@pytest.mark.parametrize("name", [name for name in scan.FORMS if name not in (*IN_FLOAT32, "recurrence")])
def test_all_forms_are_the_recurrence(name, length):
    arguments = [t.double().detach().requires_grad_() for t in scan.scan_arguments(length, 2, 4, 3, "cpu")]
    for a, b in zip(results(scan.FORMS[name], arguments), results(scan.recurrence, arguments)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [7, 2 * scan.CHUNK + 5])
@pytest.mark.parametrize("name", [name for name in scan.FORMS if name in IN_FLOAT32])
def test_forms_that_keep_float32_are_the_recurrence_within_its_rounding(name, length):
    arguments = scan.scan_arguments(length, 2, 4, 3, "cpu")
    for a, b in zip(results(scan.FORMS[name], arguments), results(scan.recurrence, arguments)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_command_writes_every_form_that_the_budget_allows(tmp_path):
    arguments = ["--lengths", "9", "5", "--inner", "4", "--state_size", "2", "--repeats", "2"]
    scan.main([*arguments, "--output", str(tmp_path / "scan.json")])
    lengths = json.loads((tmp_path / "scan.json").read_text())["lengths"]
    assert list(lengths) == ["5", "9"]
    assert all(len(cells) == 2 * len(scan.FORMS) for cells in lengths.values())
    scan.main([*arguments, "--budget_s", "0", "--output", str(tmp_path / "scan.json")])
    lengths = json.loads((tmp_path / "scan.json").read_text())["lengths"]
    assert lengths["5"]  # nothing is known of the first length yet
    assert not lengths["9"]
