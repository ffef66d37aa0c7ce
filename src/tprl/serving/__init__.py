"""TPRL in vLLM: LLaVA and Qwen2.5-VL with fewer visual tokens, as a plugin from outside of vLLM's tree."""

ARCHITECTURES = {
    "TprlLlavaForConditionalGeneration": "tprl.serving.llava:PrunedLlava",
    "TprlQwen2_5_VLForConditionalGeneration": "tprl.serving.qwen2_5_vl:PrunedQwen2_5_VL",
}
"""What ``--hf-overrides`` may name as a model's architecture, and the class that it stands for."""


def register() -> None:
    """Make the architectures known; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    for name, where in ARCHITECTURES.items():
        ModelRegistry.register_model(name, where)
