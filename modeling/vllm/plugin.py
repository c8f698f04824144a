"""The entry point by which vLLM learns of FoX (group ``vllm.general_plugins`` in setup.cfg)."""

from ..registration import register_fox


def register() -> None:
    """Make FoX models known to vLLM, and their configuration to transformers; vLLM calls it in each of its processes.

    The model is named, not imported: vLLM imports it where it runs.
    """
    from vllm import ModelRegistry

    register_fox()
    ModelRegistry.register_model("FoxForCausalLM", f"{__package__}.model:FoxForServing")
