"""Six models of the zoo under `backend="mhc"` with Inductor; `make zoo` does the same for all."""

import pytest
import torch
import torch._inductor.config
import torch._inductor.metrics

from benchmarks import zoo
from tests.zoo.models import BY_NAME


@pytest.mark.parametrize("name", ["llama", "bert", "gptj", "resnet", "dinov2", "checkpointed"])
def test_compiled_equals_eager_at_init_and_perturbed(name: str) -> None:
    # A hit in the cache of compiled graphs would generate no kernels.
    torch._inductor.metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        row = zoo.measure(BY_NAME[name])
    assert torch._inductor.metrics.generated_kernel_count > 5 * row.sites
    assert (row.sites, row.chains) == (BY_NAME[name].sites, BY_NAME[name].chains)
    assert max(row.output, row.perturbed_output) <= 1e-5
    assert max(row.gradient, row.perturbed_gradient) <= 2e-4
