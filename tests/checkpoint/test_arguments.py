"""Transformers' ordinary arguments of `from_pretrained`, and devices that cannot be loaded to."""

import itertools
import json

import pytest
import torch
import transformers

import beit_fast

from ..support.transformers_reference import TINY, randomize
from .test_files import hub_cache

load = beit_fast.BeitModel.from_pretrained


def make_model(seed=0, **options):
    model = beit_fast.BeitModel(beit_fast.BeitConfig(**(TINY | options))).eval()
    randomize(model, seed)
    return model


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_from_pretrained_accepts_arguments_of_transformers_scripts(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = load(
        tmp_path,
        low_cpu_mem_usage=True,
        trust_remote_code=True,
        use_safetensors=True,
        force_download=True,
        weights_only=True,
        subfolder="",
        variant=None,
        proxies=None,
        key_mapping=None,
        offload_buffers=False,
        state_dict=None,
    )
    assert same_weights(loaded, model)
    assert loaded.config == load(tmp_path).config
    assert not {"low_cpu_mem_usage", "trust_remote_code", "force_download"} & set(loaded.config.to_dict())


def test_from_pretrained_with_use_safetensors_reads_that_kind_only(tmp_path):
    safe, pickled = make_model(0), make_model(1)
    safe.save_pretrained(tmp_path)
    torch.save(pickled.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_weights(load(tmp_path), safe)
    assert same_weights(load(tmp_path, use_safetensors=True), safe)
    assert same_weights(load(tmp_path, use_safetensors=False), pickled)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' is a pickle, and use_safetensors=True"):
        load(tmp_path / "pytorch_model.bin", use_safetensors=True)
    with pytest.raises(ValueError, match=r"is a safetensors file, and use_safetensors=False"):
        load(tmp_path / "model.safetensors", use_safetensors=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(expected model.safetensors or model.safetensors.index.json\)"):
        load(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_from_pretrained_with_a_variant_reads_files_of_transformers(size, tmp_path):
    plain = transformers.BeitModel(transformers.BeitConfig(**TINY)).eval()
    variant = transformers.BeitModel(transformers.BeitConfig(**TINY)).eval()
    randomize(plain, 0)
    randomize(variant, 1)
    plain.save_pretrained(tmp_path)
    variant.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    wanted = transformers.BeitModel.from_pretrained(tmp_path, variant="fp16").embeddings.cls_token
    assert torch.equal(load(tmp_path, variant="fp16").embeddings.cls_token, wanted)
    assert torch.equal(load(tmp_path).embeddings.cls_token, plain.embeddings.cls_token)
    with pytest.raises(
        FileNotFoundError, match=r"expected model\.bf16\.safetensors or model\.safetensors\.index\.bf16"
    ):
        load(tmp_path, variant="bf16")
    with pytest.raises(ValueError, match="does not have variant='fp16'"):
        load(tmp_path / "model.safetensors", variant="fp16")


def test_from_pretrained_with_a_subfolder_reads_its_config_and_weights(tmp_path):
    large, small = make_model(0), make_model(1, num_hidden_layers=2)
    large.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path / "small")
    assert same_weights(load(tmp_path, subfolder="small"), small)
    assert same_weights(load(tmp_path), large)
    with pytest.raises(FileNotFoundError, match="does not contain the subfolder 'none'"):
        load(tmp_path, subfolder="none")
    with pytest.raises(ValueError, match=r"is a file, and subfolder='small' expects a folder"):
        load(tmp_path / "model.safetensors", subfolder="small")


def test_from_pretrained_passes_subfolder_and_force_download_to_the_hub(tmp_path, monkeypatch):
    model = make_model()
    cache = hub_cache(tmp_path, model)
    revision = next((cache / "models--someone--beit-tiny/snapshots").iterdir())
    (revision / "small").mkdir()
    for file in [file for file in revision.iterdir() if file.is_symlink()]:
        (revision / "small" / file.name).symlink_to(file.resolve())
        file.unlink()
    options = {"cache_dir": cache, "local_files_only": True}
    assert same_weights(load("someone/beit-tiny", subfolder="small", **options), model)
    config = beit_fast.BeitConfig.from_pretrained("someone/beit-tiny", subfolder="small", **options)
    assert config.num_hidden_layers == model.config.num_hidden_layers
    with pytest.raises(FileNotFoundError, match="in 'other'"):
        load("someone/beit-tiny", subfolder="other", **options)
    asked = []

    def download(name, file, **given):
        asked.append(given["force_download"])
        return revision / "small" / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for force in (True, False):
        load("someone/beit-tiny", force_download=force)
        beit_fast.BeitConfig.from_pretrained("someone/beit-tiny", force_download=force)
    assert [force for force, _ in itertools.groupby(asked)] == [True, False]


def test_from_pretrained_with_a_state_dict_and_no_name_copies_the_tensors(tmp_path):
    model = make_model()
    loaded = load(None, config=model.config, state_dict=model.state_dict())
    assert same_weights(loaded, model)
    with torch.no_grad():
        loaded.embeddings.cls_token.add_(1)
    assert not same_weights(loaded, model)
    inferred = load(None, state_dict=make_model(use_relative_position_bias=True).state_dict())
    assert inferred.config.hidden_size == 32
    model.save_pretrained(tmp_path)
    other = make_model(1)
    assert same_weights(load(tmp_path, state_dict=other.state_dict()), other)
    with pytest.raises(TypeError, match="=None requires state_dict"):
        load(None, config=model.config)
    with pytest.raises(TypeError, match=r"state_dict=3 is not supported \(expected a dict or None\)"):
        load(tmp_path, state_dict=3)


def test_from_pretrained_with_arguments_that_it_cannot_fulfill_says_so(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_only=False is not supported: a pickle could then run code"):
        load(tmp_path, weights_only=False)
    with pytest.raises(ValueError, match="offload_buffers have no effect without device_map"):
        load(tmp_path, offload_buffers=True)
    with pytest.warns(UserWarning, match="proxies has no effect.*HTTPS_PROXY"):
        load(tmp_path, proxies={"https": "localhost:1"})


def test_from_pretrained_with_arguments_of_wrong_types_lists_all_of_them(tmp_path):
    wrong = {
        "use_safetensors": "yes",
        "use_ema": 1,
        "subfolder": 3,
        "variant": True,
        "key_mapping": [],
        "weights_only": 0,
    }
    with pytest.raises(TypeError, match="has 6 errors") as raised:
        load(tmp_path, **wrong)
    for name, value in wrong.items():
        assert f"{name}={value!r} is not supported (expected " in str(raised.value)
    make_model().save_pretrained(tmp_path)
    assert load(tmp_path, variant="", subfolder=None).dtype == torch.float32
    for mapping in ({"(": "x"}, {"embeddings": 3}):
        with pytest.raises(ValueError, match="expected regular expressions and their replacements"):
            load(tmp_path, key_mapping=mapping)
    with pytest.raises(TypeError, match="is not a device"):
        load(tmp_path, device=object())


def test_from_pretrained_with_an_unknown_argument_lists_what_is_accepted(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="got unexpected arguments gguf_file, use_safetensor ") as raised:
        load(tmp_path, use_safetensor=True, gguf_file="x")
    message = str(raised.value)
    for name in ("fields of BeitConfig", "add_pooling_layer", "use_safetensors", "subfolder", "key_mapping", "use_ema"):
        assert name in message
    assert message.endswith("(did you mean 'use_safetensors'?)")
    for name, meant in (("num_classes", "num_labels"), ("img_size", "image_size"), ("use_auth_token", "token")):
        with pytest.raises(TypeError, match=rf"\(did you mean '{meant}'\?\)$"):
            load(tmp_path, **{name: 5})


def test_from_pretrained_with_offload_buffers_passes_it_to_accelerate(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path)
    given = {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, places, **options: given.update(options))
    load(tmp_path, device_map={"": "cpu"}, offload_buffers=True)
    assert given["offload_buffers"] is True


@pytest.mark.parametrize("argument", ["device", "device_map"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", r"='tpu' is not a device \(expected 'cpu', or an accelerator such as 'cuda:0'\)"),
        ("disk", "='disk' is not a device"),
        ("meta", "='meta' is meta, which has no values"),
        ("cuda:77", "='cuda:77' cannot be used here: "),
    ],
)
def test_from_pretrained_checks_the_device_before_it_reads_a_file(argument, device, message, tmp_path):
    """The folder has no weights: an error about them would show that files were read first."""
    with pytest.raises(ValueError, match=argument + message) as raised:
        load(tmp_path, **{argument: device})
    assert "\n" not in str(raised.value)
    assert "pin_memory" not in str(raised.value)


def test_from_pretrained_under_the_meta_device_does_not_call_a_file_damaged(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match="torch's default device is meta, which has no values"):
        load(tmp_path)
    with torch.device("meta"):
        loaded = load(tmp_path, device="cpu", image_size=32)
    assert same_weights(loaded, model)


def test_output_loading_info_has_the_types_of_transformers(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "beit"}))
    with pytest.warns(UserWarning, match="were initialized"):
        _, ours = beit_fast.BeitForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    _, theirs = transformers.BeitForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value)
    assert ours["missing_keys"].isdisjoint({"beit.embeddings.cls_token"})
    assert ours["missing_keys"] == {"classifier.weight", "classifier.bias"}
