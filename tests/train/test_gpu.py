"""All stages on a GPU; `pytest -m gpu tests/train/test_gpu.py` where there is one."""

from pathlib import Path

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerShape, TrainConfig
from tprl.run import RunFolder
from tprl.train.pipeline import train


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_all_stages(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    lvlm.model.to("cuda")
    config = TrainConfig(
        AutoencoderStage(steps=2, pictures=2),
        ImitateStage(
            demonstrations=16, teachers=("text-attention", "fastervlm", "divprune", "search"), budgets=(8, 4, 2),
            search_rounds=1, search_children=2, epochs=1, batch=8,
        ),
        PpoStage(epochs=2, questions=4, rollouts=3, horizon=2, minibatch=6),
        PrunerShape(latent=8, policy_hidden=16),
        samples=24, validation=24,
    )  # fmt: skip
    pruner = train(RunFolder(tmp_path, {}), lvlm, (World(), World()), config)
    assert pruner.token_mean.device.type == "cuda"
    assert (tmp_path / "pruner").is_dir()
