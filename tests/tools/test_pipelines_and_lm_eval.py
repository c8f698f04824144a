"""What else takes a model of transformers: pipelines, streamers, sentence-transformers, lm-eval's own command line."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from foxlm.modeling.modeling_fox import (
    FoxForCausalLM,
    FoxForSequenceClassification,
    FoxForTokenClassification,
    FoxModel,
)
from models import assert_close, tiny_model, tokens
from without_foxlm import run_without
from word_tokenizer import word_tokenizer

SENTENCES = ["w1 w2 w3 w4 w5 w6", "w7 w8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(dtype=torch.float32, initializer_range=0.1, eos_token_id=2).save_pretrained(tmp_path / "fox")
    word_tokenizer().save_pretrained(tmp_path / "fox")
    return tmp_path / "fox"


def model_for(model_class: Any, **overrides: Any) -> Any:
    return tiny_model(model_class=model_class, dtype=torch.float32, initializer_range=0.1, **overrides)


def test_text_generation_pipeline_pads_a_batch(folder: Path) -> None:
    generate = pipeline("text-generation", model=str(folder))
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    together = generate(SENTENCES, batch_size=2, **how)
    assert together == [generate(text, **how) for text in SENTENCES]
    assert all(len(rows[0]["generated_text"]) > len(text) for rows, text in zip(together, SENTENCES, strict=True))


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("feature-extraction", FoxModel),
        ("text-classification", FoxForSequenceClassification),
        ("token-classification", FoxForTokenClassification),
    ],
)
def test_pipeline_gives_a_batch_what_it_gives_each_text(task: str, model_class: Any) -> None:
    tokenizer = word_tokenizer()
    run = pipeline(task, model=model_for(model_class, num_labels=3), tokenizer=tokenizer)
    together, alone = run(SENTENCES, batch_size=2), [run(text) for text in SENTENCES]
    if task == "feature-extraction":
        for a, b in zip(together, alone, strict=True):
            # A batch's padding is not cut off.
            assert_close(torch.tensor(a)[:, : len(b[0])], torch.tensor(b), 1e-5)
        return
    rows = [x if isinstance(x, list) else [x] for x in together]
    for row, expected in zip(rows, alone, strict=True):
        assert [x.get("label", x.get("entity")) for x in row] == [x.get("label", x.get("entity")) for x in expected]
        assert [x["score"] for x in row] == pytest.approx([x["score"] for x in expected], abs=1e-5)


def test_streamer_gives_what_generate_returns() -> None:
    model, tokenizer, ids = model_for(FoxForCausalLM), word_tokenizer(), tokens(1, 6)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = tokenizer.decode(model.generate(ids, **how)[0, 6:])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, args=(ids,), kwargs=how | {"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1 and "".join(pieces).split() == expected.split()


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_sentence_embeddings(pooling: str, folder: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    embed = sentence_transformers.SentenceTransformer(
        modules=[modules.Transformer(str(folder)), modules.Pooling(32, pooling)], device="cpu"
    )
    together = embed.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    alone = torch.stack([embed.encode(text, convert_to_tensor=True, show_progress_bar=False) for text in SENTENCES])
    assert_close(together, alone, 1e-5)
    embed.save(str(tmp_path / "embed"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "embed"), device="cpu")
    assert torch.equal(again.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False), together)


def test_lm_eval_scores_by_the_code_in_the_folder(folder: Path) -> None:
    """Without foxlm, as ``lm_eval --model hf --model_args pretrained=fox,trust_remote_code=True`` loads it."""
    pytest.importorskip("lm_eval")
    code = f"""
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained="fox", trust_remote_code=True, device="cpu", dtype="float32", batch_size=2)
requests = [Instance("loglikelihood", {{}}, (text, " w9 w10"), i) for i, text in enumerate({SENTENCES})]
print("scores", *(score for score, _ in model.loglikelihood(requests, disable_tqdm=True)))
"""
    lines = run_without(("foxlm",), code, folder.parent).splitlines()
    scores = next(line for line in lines if line.startswith("scores")).split()[1:]
    model, tokenizer = FoxForCausalLM.from_pretrained(folder), word_tokenizer()
    for text, score in zip(SENTENCES, scores, strict=True):
        ids = tokenizer(f"{text} w9 w10", return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert float(score) == pytest.approx(log_p[-2:].sum().item(), abs=1e-4)
