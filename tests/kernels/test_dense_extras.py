"""ALiBi and sinks at the kernels themselves; and kernels that do not fit the device."""

import pytest
import torch

from attnrewrite.kernels.dense import launch
from attnrewrite.kernels.dense.call import Call
from attnrewrite.kernels.dense.launch import NoConfigurationError, backward, forward
from attnrewrite.kernels.strips import Options

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("on_the_device")]
LOG2E = 1.4426950408889634


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(1, 2, 70, 16) for _ in range(4)]


def exact(query, key, value, upstream, extra):
    """Attention in float64; ``extra`` takes the logits to weights."""
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    logits = wide[0] @ wide[1].mT / 4
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    out = extra(logits.masked_fill(hidden, -torch.inf)) @ wide[2]
    return [out, *torch.autograd.grad((out * upstream.double()).sum(), wide)]


def found(call, upstream):
    out, lse = forward(call)
    gradients, _ = backward(call, out, lse, upstream)
    return [out, gradients.query, gradients.key, gradients.value], lse


def test_alibi(tensors):
    query, key, value, upstream = tensors
    slopes = torch.tensor([0.5, 0.25])
    lag = torch.arange(70) - torch.arange(70).unsqueeze(-1)  # [L, S], j - i
    true = exact(*tensors, lambda logits: torch.softmax(logits + slopes.double().view(1, 2, 1, 1) * lag, -1))
    ours, _ = found(Call(query, key, value, Options(0.25, True, slopes=slopes)), upstream)
    for a, b in zip(ours, true, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)


def test_sinks_take_weight_from_every_row(tensors):
    query, key, value, upstream = tensors
    sinks = torch.tensor([1.0, -0.5])
    column = sinks.double().view(1, 2, 1, 1).expand(1, 2, 70, 1)
    true = exact(*tensors, lambda logits: torch.softmax(torch.cat((logits, column), -1), -1)[..., :-1])
    ours, lse = found(Call(query, key, value, Options(0.25, True, sinks=sinks)), upstream)
    for a, b in zip(ours, true, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-5)
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    logits = (query.double() @ key.double().mT / 4).masked_fill(hidden, -torch.inf)
    assert torch.allclose(lse.double() / LOG2E, torch.cat((logits, column), -1).logsumexp(-1), atol=1e-5)


@pytest.fixture
def small_device(monkeypatch):
    """A device that has not enough shared memory for tiles of more than ``limit`` rows; yields what was tried."""
    from triton.runtime.errors import OutOfResources

    tried, real = [], launch.load

    class Kernel:
        limit = 16

        def __init__(self, emitted):
            self.function = real(emitted)

        def __getitem__(self, grid):
            def call(**arguments):
                tried.append(arguments["BLOCK_M"])
                if arguments["BLOCK_M"] > self.limit:
                    raise OutOfResources(300_000, 232_448, "shared memory")
                self.function[grid](**arguments)

            return call

    monkeypatch.setattr(launch, "load", Kernel)
    monkeypatch.setattr(launch, "_FAILED", set())
    return Kernel, tried


def test_a_configuration_that_does_not_fit_is_not_tried_again(tensors, small_device):
    _, tried = small_device
    call = Call(*tensors[:3], Options(0.25, True))
    out, _ = forward(call)
    assert tried[-1] == 16
    assert tried == sorted(tried, reverse=True)
    count = len(tried)
    assert torch.equal(forward(call)[0], out)
    assert len(tried) == count + 1


def test_a_kernel_that_fits_in_no_configuration(tensors, small_device):
    kernel, _ = small_device
    kernel.limit = 0
    with pytest.raises(NoConfigurationError, match="shared memory"):
        forward(Call(*tensors[:3], Options(0.25, True)))
