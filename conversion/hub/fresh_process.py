"""Load a model in a process of its own and write what it computes.

This file's text is the program of that process (``python -c``), so that it holds also where foxlm cannot be imported.
Its arguments: the model's folder, the file to write, the Auto class, ``foxlm`` or ``folder``, whose code to use, and
``tokenizer`` if the tokenizer may use code of its own.
"""

import sys


def _main(folder: str, out: str, auto_class: str, source: str, trusted: str) -> None:
    if source == "folder":
        # None blocks an import: as where foxlm is not installed.
        sys.modules["foxlm"] = None  # type: ignore[assignment]
    else:
        import foxlm  # noqa: F401

    import torch
    import transformers
    from safetensors.torch import save_file

    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(folder, trust_remote_code=source == "folder", dtype="auto").eval()
    expected = "transformers_modules" if source == "folder" else "foxlm"
    if type(model).__module__.partition(".")[0] != expected:
        raise SystemExit(f"the model's class must come from {expected}, got {type(model)}")
    # Any tokens will do, the same each time.
    ids = torch.arange(1, 49)[None] * 7919 % model.config.vocab_size
    with torch.no_grad():
        results = {"logits": model(input_ids=ids, use_cache=False).to_tuple()[0].contiguous()}
        if model.can_generate():
            results["generated"] = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted == "tokenizer")
    results["tokens"] = torch.tensor(tokenizer("Forgetting is half of remembering.").input_ids)
    save_file(results, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
