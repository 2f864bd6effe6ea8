"""Every model family against transformers: first loss, logits, what comes out on disk, what is refused.

Most of it happens in one pair of processes, families_driver.py; the real command runs for three families, and
for the others in the slow part.
"""

import json
import re

import pytest
import torch
import real_model as real
import transformers
from helpers import HF_FAMILIES, make_hf_model, make_tokenizer, read_checkpoint, read_metrics, run_script
from model_runs import (
    NUM_SAMPLES, SCRATCH, SEQ_LEN, loss_of, pieces_of, trained, training_flags, write_documents,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TIES = [(family, tie) for family in HF_FAMILIES for tie in (True, False)]
CASES = [f"{family}-{'tied' if tie else 'untied'}" for family, tie in TIES]
SMALL = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, attention_dropout=0.0,
)
# Models that do more to their logits than a matrix product: (configuration class, its arguments).
CAPPED = {
    "gemma2": ("Gemma2Config", dict(
        SMALL, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=2.0,
    )),
    "cohere": ("CohereConfig", dict(SMALL, logit_scale=0.25)),
    "granite": ("GraniteConfig", dict(SMALL, logits_scaling=8.0)),
}
# The same name in the configuration as Granite's, but this one multiplies where Granite divides.
UNKNOWN = {"hyperclovax": ("HyperCLOVAXConfig", dict(SMALL, logits_scaling=4.0))}
REMOTE_CODE = """
from transformers import LlamaForCausalLM


class TripledForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        labels = kwargs.pop("labels", None)
        out = super().forward(*args, **kwargs)
        out.logits = 3 * out.logits
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
        return out
"""


def make_model(folder, config_class, arguments):
    make_tokenizer(folder, 500)
    config = getattr(transformers, config_class)(
        **arguments, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_bin_model(folder):
    """As before safetensors: one pytorch_model.bin."""
    make_hf_model("llama", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def make_remote_model(folder):
    make_hf_model("llama", folder)
    (folder / "modeling_tripled.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tripled.TripledForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What families_driver.py reports of each model, by the model's name."""
    base = tmp_path_factory.mktemp("models")
    folders = [make_hf_model(family, base / case, tie=tie) for case, (family, tie) in zip(CASES, TIES)]
    folders += [make_model(base / name, *made) for name, made in (CAPPED | UNKNOWN).items()]
    folders += [make_hf_model("llama", base / "bf16", dtype="bfloat16"), make_bin_model(base / "bin"),
                make_remote_model(base / "remote")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    texts = write_documents(base / "texts.jsonl", tokenizer)
    run_script([base / "results.json", texts, *folders], nproc=2, script="tests/families_driver.py", cwd=base,
               env={"HF_MODULES_CACHE": str(base / "modules")})
    return json.loads((base / "results.json").read_text())


def check_same_model(found):
    assert "error" not in found, found["error"]
    assert found["loss"] > 1, "a model that knows the text proves nothing"
    assert found["logits_error"] < 1e-5
    assert found["loss_error"] < 1e-5
    assert found["leak"] > 0.1, "documents that see each other would not show"
    assert found["packed_error"] < 1e-5
    assert found["packed_logits_error"] < 1e-5
    # Blocks are found without knowing the family, and the root holds the rest.
    assert found["num_fsdp_modules"] == found["num_layers"] + 1


# ----------------------------------------------------------------------------------------------------
# 1. Two processes, all families: loss, packed loss, logits, sharding, ties, how the weights were read


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(seen, case):
    found = seen[case]
    check_same_model(found)
    assert not found["whole_logits"], "the chunked loss was given up"
    assert bool(found["ties"]) == case.endswith("-tied")
    # Only Mixtral's experts are stored otherwise than they are held; all others are read slice by slice.
    assert ("rank 0 loads the model" in found["said"]) == case.startswith("mixtral"), found["said"]
    assert found["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("name", CAPPED)
def test_soft_cap_and_scale_of_logits_stay_chunked(seen, name):
    check_same_model(seen[name])
    assert not seen[name]["whole_logits"] and "whole logits" not in seen[name]["said"]


@pytest.mark.parametrize("name", [*UNKNOWN, "remote"])
def test_unknown_transform_of_logits_falls_back_to_whole_logits(seen, name):
    check_same_model(seen[name])
    assert seen[name]["whole_logits"] and "the loss uses whole logits" in seen[name]["said"]


def test_bf16_on_disk_gives_fp32_masters_and_moments(seen):
    check_same_model(seen["bf16"])
    assert seen["bf16"]["dtypes"] == ["torch.float32"]


def test_folder_without_safetensors_is_read_too(seen):
    check_same_model(seen["bin"])
    assert "rank 0 loads the model" in seen["bin"]["said"]


# ----------------------------------------------------------------------------------------------------
# 2. The real command: first loss, exported model

# (family, processes, tied, dtype on disk): tied in bf16, other names on disk, unlike both.
COMMANDS = [("llama", 1, True, "bfloat16"), ("mixtral", 2, None, "float32"), ("gpt2", 1, None, "float32")]
COMMANDS += [pytest.param(family, 1, None, "float32", marks=pytest.mark.slow)
             for family in HF_FAMILIES if family not in ("llama", "mixtral", "gpt2")]


@pytest.mark.parametrize("family, nproc, tie, dtype", COMMANDS)
def test_command_trains_and_exports(family, nproc, tie, dtype):
    folder = trained(family, nproc, tie, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
    pieces = pieces_of(folder / "texts.jsonl", tokenizer)
    source = load_model(folder / "source")
    expected, count = loss_of(source, pieces)
    first, second = read_metrics(folder / "run")
    assert first["train/tokens"] == count and first["samples"] == NUM_SAMPLES
    assert first["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert second["train/loss"] != first["train/loss"]

    # The checkpoint in a model of transformers' own, without the script's loading or export.
    saved = read_checkpoint(folder / "run" / "checkpoints" / "step_000002")
    dtypes = {tensor.dtype for name, tensor in saved.items() if name.startswith(("model.", "optim."))}
    assert dtypes == {torch.float32}
    live = model_of_checkpoint(source.config, saved)
    exported = load_model(folder / "run" / "hf")
    ids = torch.arange(SEQ_LEN)[None]
    logits = [model(ids, use_cache=False).logits for model in (exported, live, source)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], rtol=1e-3), "training changed nothing"
    assert shapes_on_disk(folder / "run" / "hf") == shapes_on_disk(folder / "source")


def load_model(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def model_of_checkpoint(config, saved):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights_of(saved), strict=False)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert not unexpected and set(missing) == ({"lm_head.weight"} if tied else set())
    return model.eval().requires_grad_(False)


def weights_of(saved):
    # `removeprefix` once: the names within the model may begin with "model." themselves.
    return {name.removeprefix("model."): value for name, value in saved.items() if name.startswith("model.")}


def shapes_on_disk(folder):
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


@pytest.mark.parametrize("nproc, dtype", [(1, "float32"), (2, "bfloat16")])
def test_export_from_scratch_is_a_llama(nproc, dtype):
    import train_llm

    folder = trained(SCRATCH, nproc, export_dtype=dtype)
    config = json.loads((folder / "run" / "hf" / "config.json").read_text())
    dtype = dtype if real.computes_bf16() else "float32"
    assert (config["model_type"], config["dtype"]) == ("llama", dtype)
    exported = transformers.LlamaForCausalLM.from_pretrained(folder / "run" / "hf", dtype=torch.float32)
    exported.eval()
    saved = read_checkpoint(folder / "run" / "checkpoints" / "step_000002")
    sizes = train_llm.decoder_config(train_llm.MODEL_SIZES["test"], config["vocab_size"], SEQ_LEN)
    live = train_llm.CausalLM(sizes)
    live.load_state_dict({name: value.to(getattr(torch, dtype)).float()
                          for name, value in weights_of(saved).items()})
    ids = torch.arange(SEQ_LEN)[None]
    with torch.no_grad():
        torch.testing.assert_close(live(ids), exported(ids).logits, rtol=1e-5, atol=1e-6)
    # It has learned, and the tokenizer beside it is the one it was trained with.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "hf")
    pieces = pieces_of(folder / "texts.jsonl", tokenizer)
    assert loss_of(exported, pieces)[0] < read_metrics(folder / "run")[0]["train/loss"]


# ----------------------------------------------------------------------------------------------------
# 3. Named sizes

TABLE = {"350M": (24, 1024, 16), "1B": (24, 2048, 16), "3B": (28, 3072, 24), "7B": (32, 4096, 32),
         "13B": (40, 5120, 40), "30B": (60, 6656, 52), "70B": (80, 8192, 64)}


def test_sizes_are_what_their_names_say():
    import train_llm

    assert set(TABLE) <= set(train_llm.MODEL_SIZES)
    for name, sizes in train_llm.MODEL_SIZES.items():
        if name in TABLE:
            assert sizes[:3] == TABLE[name]
        number = re.fullmatch(r"(\d+)([MB])", name)
        if number is None:
            continue  # test and quickstart promise no count
        with torch.device("meta"):
            model = train_llm.CausalLM(train_llm.decoder_config(sizes))
        nominal = int(number[1]) * {"M": 1e6, "B": 1e9}[number[2]]
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(nominal, rel=0.05), name


# ----------------------------------------------------------------------------------------------------
# 4. What is refused: one clear line, exit code 1


def refusal(result):
    """The one line on stderr."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("train_llm.py: error: "), result.stderr
    return lines[0]


def test_model_with_a_missing_tensor_is_refused(tmp_path):
    source = make_hf_model("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_documents(tmp_path / "texts.jsonl", transformers.AutoTokenizer.from_pretrained(source))
    result = run_script(["--hf-model", source, *training_flags(tmp_path, 1)], cwd=tmp_path, check=False)
    assert "layers.1.mlp.up_proj" in refusal(result)
    assert not (tmp_path / "run" / "hf").exists()


def test_hub_name_offline_names_the_page_and_the_login(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "never read"}\n')
    result = run_script(["--hf-model", "no-such-owner/no-such-model", *training_flags(tmp_path, 1)],
                        cwd=tmp_path, check=False,
                        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    line = refusal(result)
    assert "https://huggingface.co/no-such-owner/no-such-model" in line and "hf auth login" in line
