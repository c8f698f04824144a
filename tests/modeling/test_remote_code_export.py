"""The code that is saved beside a model: what it holds, and that it works where foxlm is not installed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_import_files
from transformers.integrations.peft import MIN_PEFT_VERSION

import foxlm
from checkpoints import write
from fla_checkpoints import fla_checkpoint
from foxlm import FoxConfig, FoxPagedCache
from foxlm.conversion.convert import convert_to_folder
from foxlm.conversion.graft import graft_to_folder
from foxlm.conversion.hub.model_card import write_model_card
from foxlm.evaluation.demo.tokenizer import VOCAB_SIZE, byte_tokenizer
from foxlm.modeling.code_files import arrange, clashes, merge, read_modules
from foxlm.modeling.remote_code import AUTO_MAP, export_code, exported_files, stale_files
from models import ROPE, tiny_config, tiny_model, tokens
from without_foxlm import run_without

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@torch.no_grad()
def save_with_expectations(folder: Path) -> None:
    """A model in ``model/``, inputs in ``inputs.safetensors`` and what it makes of them in ``expected.safetensors``."""
    # With every part that a block can have but one of each kind.
    fields: dict[str, Any] = ROPE | {"nope_layers": [1], "norm_position": "post", "qk_norm": "all_heads"}
    model = tiny_model(dtype=torch.float32, **fields)
    model.save_pretrained(folder / "model")
    ids = tokens(2, 70)
    paged = FoxPagedCache(model.config, max_cache_len=128)
    save_file({"ids": ids}, folder / "inputs.safetensors")
    save_file(
        {
            "logits": model(ids).logits,
            "dynamic": model.generate(ids, **GREEDY),
            "static": model.generate(ids, cache_implementation="static", **GREEDY),
            "paged": model.generate(ids, cache=paged, **GREEDY),
            "evicting": model.generate(ids, free_dead_cache=True, **GREEDY),
        },
        folder / "expected.safetensors",
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    save_with_expectations(folder)
    return folder


# Shared by the processes below: they write what they find as a model's class makes it.
OUTPUTS = """
import importlib.util, sys, torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
)
torch.set_num_threads(1)
ids = load_file("inputs.safetensors")["ids"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}

@torch.no_grad()
def outputs(model):
    paged = getattr(sys.modules[type(model).__module__], "FoxPagedCache")(model.config, max_cache_len=128)
    return {
        "logits": model(ids).logits,
        "dynamic": model.generate(ids, **GREEDY),
        "static": model.generate(ids, cache_implementation="static", **GREEDY),
        "paged": model.generate(ids, cache=paged, **GREEDY),
        "evicting": model.generate(ids, free_dead_cache=True, **GREEDY),
    }
"""


def assert_same(found: Path, expected: Path) -> None:
    one, other = load_file(found), load_file(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        if tensor.is_floating_point():
            # Another number of threads, another order of sums.
            torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(one[name], tensor), name


@pytest.mark.versions
def test_saved_model_works_without_foxlm_and_saves_itself_again(saved: Path) -> None:
    code = """
for name in ("model", "again", "third"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert type(model.config).__module__.rpartition(".")[0] == type(model).__module__.rpartition(".")[0]
    save_file(outputs(model), f"found_{name}.safetensors")
    if name == "model":
        model.save_pretrained("again")
        model.model.save_pretrained("decoder")
        if importlib.util.find_spec("peft"):
            from peft import LoraConfig, get_peft_model
            whole = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
            assert get_peft_model(whole, LoraConfig(r=2)).peft_config["default"].target_modules == {"q_proj", "v_proj"}
    if name == "again":
        model.config.save_pretrained("third")
        save_file(model.state_dict(), "third/model.safetensors", metadata={"format": "pt"})
decoder = AutoModel.from_pretrained("decoder", trust_remote_code=True)
assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("third", trust_remote_code=True),
                                         trust_remote_code=True)
fresh.save_pretrained("fresh")
print(*sorted(name for name, module in sys.modules.items() if module and name.partition(".")[0] == "foxlm"))
"""
    assert run_without(("foxlm",), OUTPUTS + code, saved).strip() == ""
    for name in ("model", "again", "third"):
        assert_same(saved / f"found_{name}.safetensors", saved / "expected.safetensors")
    for name in ("model", "again", "third", "decoder", "fresh"):
        files = {path.name: path.read_text() for path in (saved / name).glob("*.py")}
        assert files == exported_files(), name
        assert json.loads((saved / name / "config.json").read_text())["auto_map"] == AUTO_MAP, name
    assert load_file(saved / "again/model.safetensors").keys() == load_file(saved / "model/model.safetensors").keys()


def test_tokenizer_needs_no_code_of_the_folder(tmp_path: Path) -> None:
    """Of every folder that foxlm writes, and without a question if the card's line is used."""
    write_tokenizer = byte_tokenizer().save_pretrained
    tiny_model(vocab_size=VOCAB_SIZE, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    write_tokenizer(tmp_path / "saved")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    graft_to_folder(tmp_path / "llama", tmp_path / "grafted")
    theirs = {"model_type": "forgetting_transformer", "num_heads": 4, "qk_norm": True} | sizes
    theirs |= {"vocab_size": VOCAB_SIZE}
    del theirs["num_attention_heads"]
    write(tmp_path / "theirs", theirs, fla_checkpoint(theirs))
    write_tokenizer(tmp_path / "theirs")
    convert_to_folder(tmp_path / "theirs", tmp_path / "converted")
    write_model_card(tmp_path / "saved", license="mit")
    assert (
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)" in (tmp_path / "saved/README.md").read_text()
    )
    code = """
import builtins, sys
from transformers import AutoTokenizer

def asked(prompt):
    raise SystemExit(f"asked: {prompt}")

builtins.input = asked
for name in ("saved", "grafted", "converted"):
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    print(*tokenizer("What is kept?").input_ids)
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
    lines = run_without(("foxlm",), code, tmp_path).splitlines()
    assert lines == 3 * [" ".join(map(str, byte_tokenizer()("What is kept?").input_ids))]


HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def test_task_heads_load_without_foxlm(tmp_path: Path) -> None:
    """As the first model of a process: no other has made the decoder's class known to `AutoModel` before."""
    ids = tokens(1, 24)
    save_file({"ids": ids}, tmp_path / "inputs.safetensors")
    tiny_model(dtype=torch.float32).model.save_pretrained(tmp_path / "decoder")
    for head in HEADS:
        model = tiny_model(model_class=getattr(foxlm, f"FoxFor{head}"), num_labels=3, dtype=torch.float32).eval()
        model.save_pretrained(tmp_path / head)
        with torch.no_grad():
            save_file({"first": model(ids).to_tuple()[0].contiguous()}, tmp_path / f"expected_{head}.safetensors")
    code = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
for head in HEADS:
    auto = getattr(transformers, f"AutoModelFor{head}")
    # Of its own folder, and as a new head on a decoder.
    for name in (head, "decoder"):
        model = auto.from_pretrained(name, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        assert type(model.model).__module__ == type(model).__module__
        if name == head:
            with torch.no_grad():
                first = model(load_file("inputs.safetensors")["ids"]).to_tuple()[0]
            save_file({"first": first.contiguous()}, f"found_{head}.safetensors")
            model.save_pretrained(f"{head}_again")
""".replace("HEADS", repr(HEADS))
    run_without(("foxlm",), code, tmp_path)
    for head in HEADS:
        assert_same(tmp_path / f"found_{head}.safetensors", tmp_path / f"expected_{head}.safetensors")
        again = load_file(tmp_path / f"{head}_again/model.safetensors")
        assert again.keys() == load_file(tmp_path / f"{head}/model.safetensors").keys()


def test_model_of_the_hub_works_without_foxlm_and_triton(saved: Path) -> None:
    """As the Hub's cache holds it, each file a link to one of another name.

    There transformers asks of every file that what it imports is installed.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = saved / "hub/models--someone--a.fox-1"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(sorted((saved / "model").iterdir())):
        shutil.copy(file, repository / f"blobs/{number}")
        (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{number}")
    code = """
model = AutoModelForCausalLM.from_pretrained("someone/a.fox-1", trust_remote_code=True)
save_file(outputs(model), "found_hub.safetensors")
"""
    # torch.compile's own modules look for triton by other means.
    run_without(("foxlm", "triton"), OUTPUTS + code, saved, HF_HUB_CACHE=str(saved / "hub"))
    assert_same(saved / "found_hub.safetensors", saved / "expected.safetensors")


def test_two_copies_in_one_process_leave_each_other_alone(saved: Path) -> None:
    # A name that is none of Python's.
    (saved / "Modèle 1").symlink_to(saved / "model")
    code = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
import foxlm
from foxlm.kernels.operators import NAMESPACE
from foxlm.modeling.versions import cache_of
installed = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert type(installed) is foxlm.FoxForCausalLM
save_file(outputs(installed), "before.safetensors")
copy = get_class_from_dynamic_module("modeling_fox.FoxForCausalLM", "Modèle 1").from_pretrained("Modèle 1")
assert type(copy).__module__.startswith("transformers_modules.")
# The copy came last; each is used after the other.
save_file(outputs(installed), "installed.safetensors")
save_file(outputs(copy), "copy.safetensors")
save_file(outputs(installed), "after.safetensors")
package = type(copy).__module__.rpartition(".")[0]
kernels = [module for name, module in sys.modules.items() if name.startswith(f"{package}.kernels_")]
other = next(module.NAMESPACE for module in kernels if hasattr(module, "NAMESPACE"))
for namespace in (NAMESPACE, other):
    assert len(dir(getattr(torch.ops, namespace))) > 1, namespace
assert NAMESPACE != other
assert type(AutoModelForCausalLM.from_pretrained("model")) is foxlm.FoxForCausalLM
try:
    installed(ids, cache=copy(ids, use_cache=True)[1])
except ValueError:
    print("refused")
"""
    assert run_without((), OUTPUTS + code, saved).strip() == "refused"
    for name in ("before", "installed", "copy", "after"):
        assert_same(saved / f"{name}.safetensors", saved / "expected.safetensors")


def test_files_are_what_transformers_looks_for(saved: Path) -> None:
    files = {path.name for path in (saved / "model").glob("*.py")}
    found = {Path(path).name for path in get_relative_import_files(saved / "model/modeling_fox.py")}
    assert found | {"modeling_fox.py"} == files == exported_files().keys()
    assert {"kernels_base.py", "kernels_hopper_triton.py", "modeling_base.py"} <= files
    packages = {name for file in files for name in get_imports(saved / "model" / file)}
    assert "triton" not in packages and "torch" in packages
    for name, source in exported_files().items():
        compile(source, name, "exec")
        assert source.startswith(f"# Code of a FoX model, written by foxlm {foxlm.__version__} for transformers 5.")


def test_every_class_of_auto_map_is_there() -> None:
    from foxlm.modeling import modeling_fox

    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert module == "modeling_fox" and hasattr(modeling_fox, name)


def test_older_code_is_replaced_and_other_files_are_kept(tmp_path: Path) -> None:
    config = tiny_config()
    config.auto_map = {"AutoModel": "someone/else--modeling_old.Old", "AutoTokenizer": ["tokens.Tokens", None]}
    config.save_pretrained(tmp_path)
    (tmp_path / "kernels_old.py").write_text("# Code of a FoX model, written by foxlm 0.0.1\n")
    (tmp_path / "tokens.py").write_text("# mine\n")
    (tmp_path / "modeling_fox.py").write_text("raise SystemExit\n")
    assert stale_files(tmp_path) == ["kernels_old.py"]
    export_code(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {*exported_files(), "tokens.py"}
    assert (tmp_path / "modeling_fox.py").read_text() == exported_files()["modeling_fox.py"]
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["auto_map"] == AUTO_MAP | {"AutoTokenizer": ["tokens.Tokens", None]}
    assert FoxConfig.from_pretrained(tmp_path).to_dict().keys() == config.to_dict().keys()


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())


def test_adapters_are_saved_without_code(tmp_path: Path) -> None:
    # transformers 5.24 asks for a peft that is not out yet, where it loads adapters itself; peft's own way works.
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    model = tiny_model(dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.py"))


def test_derived_configuration_writes_no_code(tmp_path: Path) -> None:
    class DerivedConfig(FoxConfig):
        model_type = "derived"

    DerivedConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_saving_with_push_uploads_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[set[str]] = []

    def upload(self, folder, repo_id, files_timestamps, **kwargs) -> None:
        changed = {path.name for path in Path(folder).iterdir() if path.name not in files_timestamps}
        uploaded.append(changed)

    class Repository:
        repo_id = "someone/fox"

    class Hub:
        def create_repo(self, *args, **kwargs):
            return Repository

    for owner in ("modeling_utils", "utils.hub", "configuration_utils"):
        monkeypatch.setattr(f"transformers.{owner}.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)

    class Card:
        def save(self, path) -> None:
            Path(path).touch()

    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "a", push_to_hub=True)
    model.push_to_hub("someone/fox")
    model.config.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert len(uploaded) == 3
    for names in uploaded:
        assert names >= {*exported_files(), "config.json"}


@pytest.mark.parametrize("content", [None, "[]", '{"model_type": "llama"}'])
def test_folder_of_something_else_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"must hold a config\.json with model_type 'fox'"):
        export_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize(
    "line",
    [
        "from . import decay",
        "from .. import kernels",
        "from ..kernels import *",
        "from ..kernels import decay",
        "from .missing import name",
        "from .a.b import name",
        "from ...far.decay import Decay",
        "from .decay import *",
        "import foxlm",
        "from foxlm.kernels.decay import Decay",
        "import scipy.special",
        "import math, einops",
        "def f():\n    import pandas",
    ],
)
def test_imports_that_cannot_be_exported_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "decay.py").write_text("")
    file = tmp_path / "attention.py"
    file.write_text(f"import torch\n{line}\n")
    with pytest.raises(ValueError, match=r"attention\.py, line [23]: .*got"):
        merge(file)


def write_sources(folder: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder / "modeling/modeling_x.py"


def test_modules_of_a_folder_become_one_file(tmp_path: Path) -> None:
    entry = write_sources(
        tmp_path,
        {
            "modeling/modeling_x.py": '"""Says from .decay import nothing."""\n'
            "# First.\nfrom .versions import OLDEST\n# isort: split\n"
            "from typing import TYPE_CHECKING\nimport torch\n"
            "from ..kernels.decay import (\n    Decay,\n)\nfrom .layers.norm import norm as norm_of\n"
            "if TYPE_CHECKING:\n    from ..kernels.group import Group\n"
            "def f():\n    from ..kernels.scan import scan\n    return scan, '.decay'\n",
            "modeling/versions.py": "import torch\nOLDEST = 1\n",
            "modeling/layers/norm.py": "from typing import Any\nimport torch\ndef norm(): return 3\n",
            "modeling/layers/gate.py": "raise SystemExit('not needed')\n",
            "kernels/decay.py": "import torch\nfrom torch import Tensor\nHAS = True\n"
            "if HAS:\n    from .tiles import SIZE\n"
            "def late():\n    from .tiles import SIZE as size\n    return size\n"
            "class Decay: size = SIZE\n",
            "kernels/tiles.py": "import torch\nfrom torch import Tensor\nSIZE = 64\n",
            "kernels/scan.py": "import triton\nfrom triton import (\n    language,\n)\nscan = 5\n",
            "kernels/group.py": "raise SystemExit('for type checkers')\n",
        },
    )
    assert merge(entry) == {
        "kernels_base.py": "# kernels/tiles.py\n\nimport torch\nfrom torch import Tensor\nSIZE = 64\n\n\n"
        "# kernels/decay.py\n\nHAS = True\nif HAS:\n    pass\n"
        "def late():\n    size = SIZE\n    return size\n"
        "class Decay: size = SIZE\n",
        "kernels_triton.py": "# kernels/scan.py\n\n"
        "try:\n    import triton\nexcept ImportError: raise\n"
        "try:\n    from triton import language\nexcept ImportError: raise\nscan = 5\n",
        "modeling_layers.py": "# modeling/layers/norm.py\n\n"
        "from typing import Any\nimport torch\ndef norm(): return 3\n",
        "modeling_base.py": "# modeling/versions.py\n\nimport torch\nOLDEST = 1\n",
        "modeling_x.py": "from .modeling_base import OLDEST\n\n"
        '# modeling/modeling_x.py\n\n"""Says from .decay import nothing."""\n'
        "# First.\nfrom typing import TYPE_CHECKING\nimport torch\n"
        "from .kernels_base import Decay\nfrom .modeling_layers import norm as norm_of\n"
        "def f():\n    from .kernels_triton import scan\n    return scan, '.decay'\n",
    }


def test_modules_that_define_the_same_name_stay_apart(tmp_path: Path) -> None:
    entry = write_sources(
        tmp_path,
        {
            "modeling/modeling_x.py": "from ..kernels.a import f\nfrom ..kernels.b import g\n"
            "from ..kernels.c import h\n",
            "kernels/a.py": "import triton.language as tl\n_INF = tl.constexpr(float('inf'))\n_SIZE = 64\n"
            "def f(): return _SIZE\n",
            "kernels/b.py": "from triton import language as tl\n_INF = tl.constexpr(float('inf'))\n"
            "from .a import _SIZE\ndef g(): return _SIZE\n",
            "kernels/c.py": "import triton\n_SIZE = []\ndef h(): return sum(_SIZE)\n",
        },
    )
    modules = read_modules(entry)
    assert clashes(modules.values()) == [
        "kernels/a.py and kernels/c.py both define _SIZE",
        "kernels/b.py and kernels/c.py both define _SIZE",
    ]
    files = {name: [x.path.stem for x in found] for name, found in arrange(modules, entry).items()}
    assert files == {"kernels_triton": ["a", "b"], "kernels_c": ["c"], "modeling_x": ["modeling_x"]}


def test_a_saved_model_has_few_files() -> None:
    entry = Path(foxlm.__path__[-1]) / "modeling/modeling_fox.py"
    modules = read_modules(entry)
    sections = [module.section for module in modules.values()]
    assert not [x for x in sections if "context_parallel" in x or "fsdp" in x or "code_files" in x]
    assert len(exported_files()) <= 20, "modules of a folder do not share a file:\n" + "\n".join(
        clashes(modules.values())
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_exported_kernels_are_those_of_the_package(tmp_path: Path, head_dim: int) -> None:
    """Heads of 64 and 128 take the Hopper kernels on an H100."""
    model = tiny_model(head_dim=head_dim, max_position_embeddings=512, dtype=torch.bfloat16).cuda()
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": tokens(2, 300)}, tmp_path / "inputs.safetensors")
    code = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

if OWN:
    import foxlm
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=not OWN, dtype="auto").cuda()
assert type(model).__module__.partition(".")[0] == ("foxlm" if OWN else "transformers_modules")
model.eval()
ids = load_file("inputs.safetensors")["ids"].cuda()
with profile(activities=[ProfilerActivity.CUDA]) as record:
    output = model(ids, labels=ids)
    output.loss.backward()
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=12, do_sample=False)
tensors = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
tensors |= {"logits": output.logits, "generated": generated}
save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, "OUT")
print(json.dumps(sorted({event.key for event in record.key_averages()})))
"""
    kernels = {}
    for name, blocked, own in (("package", (), "True"), ("exported", ("foxlm",), "False")):
        out = run_without(blocked, code.replace("OWN", own).replace("OUT", f"{name}.safetensors"), tmp_path)
        # Names of C++ have colons, brackets or blanks.
        kernels[name] = {x for x in json.loads(out.splitlines()[-1]) if x.endswith("_kernel") and x.isidentifier()}
    assert kernels["exported"] == kernels["package"]
    for part in ("forward", "backward", "prologue", "search", "gate_scan", "decode"):
        assert any(part in x for x in kernels["exported"]), part
    package, exported = load_file(tmp_path / "package.safetensors"), load_file(tmp_path / "exported.safetensors")
    assert package.keys() == exported.keys()
    for key, tensor in package.items():
        assert torch.equal(exported[key], tensor), key
