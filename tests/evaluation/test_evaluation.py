"""Recording, gate statistics, bigrams, the corpus and lm-eval's command line."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from foxlm import FoxConfig, FoxForCausalLM, forgetting_attention
from foxlm.evaluation.demo.bigram import BigramModel
from foxlm.evaluation.demo.corpus import SEPARATOR, SourceFile, is_held_out, load_corpus, to_tokens, windows
from foxlm.evaluation.demo.lm_eval_tasks import (
    CONTINUATION_BYTES,
    NEXT_LINES,
    PREFIX_BYTES,
    next_lines_questions,
    write_tasks,
)
from foxlm.evaluation.demo.tokenizer import byte_tokenizer
from foxlm.evaluation.demo.train import RandomWindows, bits_per_byte
from foxlm.evaluation.gates import (
    RULES,
    attention_reach,
    attention_weights,
    decay_time_table,
    decay_times,
    skipped_shares,
)
from foxlm.evaluation.provenance import provenance
from foxlm.evaluation.recording import AttentionInputs, record_attention
from foxlm.modeling.attention_backends import ALL_ATTENTION_FUNCTIONS
from foxlm.modeling.versions import cache_of


def tiny_model(**overrides) -> FoxForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "decay_time_max": 64.0,
    }
    return FoxForCausalLM(FoxConfig(**(fields | overrides))).eval()


def attend(layer: AttentionInputs, log_f: torch.Tensor) -> torch.Tensor:
    out = forgetting_attention(layer.q, layer.k, layer.v, log_f, scale=layer.scale)
    assert isinstance(out, torch.Tensor)
    return out


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("implementation", ["fox_reference", "sdpa", "eager"])
@pytest.mark.parametrize("gate_heads", ["query", "key_value"])
def test_recorded_inputs_reproduce_each_layer(implementation: str, gate_heads: str) -> None:
    model = tiny_model(forget_gate_heads=gate_heads, use_output_gate=False, use_output_norm=False)
    model.set_attn_implementation(implementation)
    outputs: list[torch.Tensor] = []
    for block in model.model.layers:
        block.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    assert [layer.layer for layer in layers] == [0, 1]
    for layer, output in zip(layers, outputs, strict=True):
        torch.testing.assert_close(attend(layer, layer.log_f).flatten(-2), output, rtol=1e-4, atol=1e-5)


def test_recording_can_tell_a_wrong_gate() -> None:
    """Negative control of the test above: its tolerance would notice gates of the wrong layer."""
    model = tiny_model()
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    first, second = layers
    assert (attend(first, first.log_f) - attend(first, second.log_f)).abs().max() > 1e-3


def test_recording_leaves_no_trace() -> None:
    model = tiny_model()
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for implementation in ("fox_reference", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match="inside"), record_attention(model):
            raise RuntimeError("inside")
        assert ALL_ATTENTION_FUNCTIONS._local_mapping == before
    with record_attention(model) as layers:
        pass
    model(tokens())
    assert layers == []


def test_recording_takes_one_of_two_models() -> None:
    model, other = tiny_model(), tiny_model()
    with torch.no_grad(), record_attention(model) as layers:
        other(tokens(), use_cache=False)
        assert layers == []
        model(tokens(), use_cache=False)
    assert len(layers) == 2


def test_recording_refuses_what_it_would_misread() -> None:
    model = tiny_model()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padding"), record_attention(model):
        model(tokens(), attention_mask=mask)
    positions = torch.arange(40).remainder(20)[None]
    with pytest.raises(ValueError, match="packing"), record_attention(model):
        model(tokens(1), position_ids=positions, use_cache=False)
    cache = cache_of(model(tokens(), use_cache=True))
    with pytest.raises(ValueError, match="earlier tokens"), record_attention(model):
        model(tokens(), cache=cache)
    with pytest.raises(ValueError, match="FoX"), record_attention(torch.nn.Linear(2, 2)):
        pass


def test_attention_weights_stop_at_a_hard_reset() -> None:
    x = torch.randn(1, 6, 1, 4)
    log_f = torch.full((1, 6, 1), -0.1)
    log_f[0, 3] = -math.inf
    weights = attention_weights(AttentionInputs(0, x, x, x, log_f, 0.5), head=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=torch.double))
    assert weights[3:, :3].abs().max() == 0.0


def test_attention_weights_are_the_models_own() -> None:
    model = tiny_model()
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens(), use_cache=False, output_attentions=True).attentions
    for head in range(4):
        weights = attention_weights(layers[1], head, sequence=1)
        torch.testing.assert_close(weights.float(), expected[1][1, head], rtol=1e-4, atol=1e-6)


def test_decay_times() -> None:
    log_f = torch.tensor([[[-0.5, -0.001, 0.0]], [[-0.3, -0.003, 0.0]]])
    assert decay_times(log_f).tolist() == pytest.approx([2.5, 500.0, math.inf], rel=1e-6)
    model = tiny_model(forget_gate="fixed", decay_time_min=2.0, decay_time_max=16.0, num_key_value_heads=4)
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(), use_cache=False)
    assert decay_time_table(layers).tolist() == [pytest.approx([2.0, 4.0, 8.0, 16.0], rel=1e-5)] * 2


def test_skipped_shares_drop_no_more_than_eps() -> None:
    model = tiny_model(decay_time_max=4.0)
    with torch.no_grad(), record_attention(model) as layers:
        model(tokens(1, 200), use_cache=False)
    log_eps = (-3.0, -10.0)
    shares = {rule: skipped_shares(layers, log_eps, rule) for rule in RULES}
    for values in shares.values():
        assert values.shape == (2, 2, 4)
        assert (values[0] >= values[1]).all()
        assert values[0].mean() > 0.2
    assert (shares["tight"] >= shares["paper"]).all()
    assert (skipped_shares(layers, log_eps, "tight", 16, 16) <= shares["tight"]).all()


def test_bigram_by_hand() -> None:
    # After a: b, b, c. After b: a. The separator starts the text with a.
    stream = np.array([SEPARATOR, 97, 98, 97, 98, 97, 99], dtype=np.uint16)
    model = BigramModel(stream, k=1.0)
    assert model.bits[97, 98] == pytest.approx(-math.log2(3 / 259))
    assert model.bits[97, 99] == pytest.approx(-math.log2(2 / 259))
    assert model.bits[98, 97] == pytest.approx(-math.log2(3 / 258))
    assert model.bits[SEPARATOR, 97] == pytest.approx(-math.log2(2 / 257))
    assert model.bits[0, 0] == pytest.approx(8.0)
    np.testing.assert_allclose((2.0**-model.bits).sum(1), 1.0)
    held_out = np.array([[97, 98, SEPARATOR, 97]])
    assert model.bits_per_byte(held_out) == pytest.approx((model.bits[97, 98] + model.bits[SEPARATOR, 97]) / 2)
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        BigramModel(stream, k=0)


def test_corpus_split_is_disjoint_and_depends_on_names_alone() -> None:
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again
    train, held_out = ({file.name for file in files} for files in corpus)
    assert not train & held_out
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.2
    assert not any("/tests/" in name or name.startswith(("test/", "encodings/")) for name in train | held_out)
    counts = corpus.describe()
    assert counts["train_files"] == len(train)
    assert counts["held_out_bytes"] == sum(len(file.data) for file in corpus.held_out)


def test_corpus_needs_both_kinds_of_files(tmp_path) -> None:
    (tmp_path / "alone.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"got [01] and [01] files in"):
        load_corpus(tmp_path)


def test_windows_score_every_byte_once() -> None:
    files = [SourceFile("a", bytes(range(20))), SourceFile("b", b"xy"), SourceFile("c", bytes(range(100, 113)))]
    cut = windows(files, 5, 100)
    assert cut.shape == (8, 5)
    assert cut[:, 1:].ravel().tolist() == [*range(20), *range(100, 112)]
    assert cut[[0, 1, 5], 0].tolist() == [SEPARATOR, 3, SEPARATOR]
    assert len(windows(files, 5, 3)) == 3
    with pytest.raises(ValueError, match="got 99"):
        windows(files, 99, 1)


def test_training_windows_repeat_for_a_seed() -> None:
    stream = to_tokens([SourceFile("a", bytes(range(256)))])
    assert stream.tolist() == [SEPARATOR, *range(256)]
    first, again, other = (RandomWindows(stream, 16, 8, seed) for seed in (0, 0, 1))
    drawn = [[draws[i]["input_ids"].tolist() for i in range(8)] for draws in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bits_per_byte_is_the_models_own_loss() -> None:
    model = tiny_model()
    held_out = tokens(3, 24)
    loss = model(held_out, labels=held_out, use_cache=False).loss.item() / math.log(2)
    assert bits_per_byte(model, held_out.numpy(), batch=2) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("text", ["", " a  b\t\r\n", "é€😀", "<|endoftext|> <|padding|> [UNK]", "\x00\x7f ."])
def test_byte_tokenizer_is_exact(tmp_path, text: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert len(tokenizer) == 258
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)


def test_next_lines_questions_come_from_the_files() -> None:
    corpus = load_corpus()
    questions = next_lines_questions(corpus.held_out, 20, seed=0)
    assert questions == next_lines_questions(corpus.held_out, 20, seed=0)
    assert len(questions) == 20
    text = "\0".join(file.data.decode(errors="ignore") for file in corpus.held_out)
    for question in questions:
        right = question["choices"][question["answer"]]
        assert question["prefix"] + right in text
        assert question["prefix"].endswith("\n") and len(question["prefix"]) >= PREFIX_BYTES
        assert {len(choice) for choice in question["choices"]} == {CONTINUATION_BYTES}
        assert len(set(question["choices"])) == 4
    with pytest.raises(ValueError, match="at least 4 passages"):
        next_lines_questions([SourceFile("a", b"x")], 1, seed=0)


def test_provenance_names_the_run() -> None:
    facts = provenance("cpu", 7, ("no-such-distribution",))
    assert facts["seed"] == 7
    assert facts["torch"] == torch.__version__
    assert facts["no-such-distribution"] == "not installed"
    assert facts["commit"]


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foxlm.evaluation", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=os.environ | offline | environment, capture_output=True, text=True, check=False)


def test_lm_eval_loads_a_saved_fox(tmp_path) -> None:
    """lm-eval's own command line, unchanged but for FoX being known: a folder without code beside its weights."""
    pytest.importorskip("lm_eval")
    model = tiny_model(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", load_corpus().held_out[:4], questions=4, bits_bytes=64, seed=0)
    done = run_module(
        *("run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"),
        *("--tasks", NEXT_LINES, "--include_path", str(tmp_path / "tasks"), "--device", "cpu"),
        *("--batch_size", "4", "--output_path", str(tmp_path / "results")),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(written.read_text())["results"][NEXT_LINES]
    assert 0.0 <= results["acc,none"] <= 1.0

    # The same questions answered here: the continuation with the highest likelihood.
    rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{NEXT_LINES}.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([list((row["prefix"] + choice).encode())])
            start = len(row["prefix"].rstrip().encode())
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(log_p[range(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item())
        right += int(np.argmax(sums)) == row["answer"]
    assert results["acc,none"] == pytest.approx(right / len(rows))


def test_without_lm_eval_one_line_says_what_to_install(tmp_path) -> None:
    # Found first, and no package: what `find_spec` sees where lm-eval is not installed.
    script = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lm_eval' else found(name, *rest)\n"
        "import runpy; runpy.run_module('foxlm.evaluation', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: lm-eval is not installed; it comes with: pip install 'foxlm[eval]'"
    )


def attention_inputs(length: int, log_f: float = 0.0) -> AttentionInputs:
    """Queries and keys that like all alike, of 4 heads over 2."""
    q, k = torch.zeros(2, length, 4, 8), torch.zeros(2, length, 2, 8)
    return AttentionInputs(0, q, k, k, torch.full((2, length, 4), log_f), 1.0)


def test_reach_of_even_attention_is_a_share_of_what_is_before() -> None:
    reach = attention_reach([attention_inputs(400)], share=0.8)
    assert reach.shape == (1, 4)
    torch.testing.assert_close(reach, torch.full((1, 4), 0.8 * 300, dtype=torch.float64), rtol=0.01, atol=1.0)


def test_reach_of_geometric_attention_is_its_quantile() -> None:
    layers = [attention_inputs(2000, -1 / time) for time in (20.0, 100.0)]
    reach = attention_reach(layers, share=0.9)
    torch.testing.assert_close(reach[:, 0], math.log(10) * torch.tensor([20.0, 100.0]).double(), rtol=0.03, atol=1.0)


def test_reach_counts_what_a_token_gives_to_itself() -> None:
    """Against the definition, where much of the attention is on the query's own key."""
    layer = attention_inputs(40)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 40, 4, layer.k.shape[-1], generator=generator)
    layer = layer._replace(q=keys + torch.randn(keys.shape, generator=generator), k=keys)
    expected = []
    for head in range(4):
        weights = attention_weights(layer, head)
        weights[:, 0] = 0.0
        within = [weights[row, : row + 1].flip(0).cumsum(0) for row in range(20, 40)]
        expected.append(sum((one < 0.9 * one[-1]).sum().item() for one in within) / 20)
    torch.testing.assert_close(attention_reach([layer])[0], torch.tensor(expected, dtype=torch.float64))


def test_reach_leaves_out_the_first_key() -> None:
    layer = attention_inputs(400, -1 / 20)
    layer.k[:, 0], layer.q[:] = 1.0, 10.0
    assert attention_reach([layer]).max() < 60
    # The negative control: a key that is looked for from afar counts.
    layer.k[:, 0], layer.k[:, 1] = 0.0, 1.0
    assert attention_reach([layer]).min() > 200
