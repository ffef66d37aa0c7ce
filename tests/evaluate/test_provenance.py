"""What cells of a pruner are told apart by."""

from dataclasses import replace

import torch

from tprl.config import PrunerConfig
from tprl.evaluate.provenance import pruner_digest
from tprl.pruner import TokenPruner


@torch.no_grad()
def test_a_pruner_is_told_by_all_but_its_threshold() -> None:
    pruner = TokenPruner(PrunerConfig(4, 8, 8, 1, 2, width=8, fingerprint="f"))
    known = pruner_digest(pruner)
    pruner.config = replace(pruner.config, threshold=0.01)
    assert pruner_digest(pruner) == known
    pruner.config = replace(pruner.config, novelty=0.0)
    assert pruner_digest(pruner) != known
    pruner.config = replace(pruner.config, novelty=2.0)
    pruner.token_mean[3] += 1
    assert pruner_digest(pruner) != known
