"""Arguments of `BeitConfig.from_pretrained`, typos, two dtypes, and configurations of Transformers."""

import json
import warnings

import pytest
import torch
import transformers

import beit_fast
from beit_fast import BeitConfig
from beit_fast.configuration.conversion import as_beit_config

from ..support.transformers_reference import TINY


def test_from_pretrained_with_a_subfolder_reads_its_file(tmp_path):
    BeitConfig(num_hidden_layers=12).save_pretrained(tmp_path)
    BeitConfig(num_hidden_layers=6).save_pretrained(tmp_path / "small")
    read = BeitConfig.from_pretrained(tmp_path, subfolder="small")
    assert read == transformers_layers(tmp_path, "small")
    assert read.num_hidden_layers == 6
    assert "subfolder" not in read.to_dict()
    assert BeitConfig.from_pretrained(tmp_path).num_hidden_layers == 12
    with pytest.raises(FileNotFoundError, match="does not contain the subfolder 'none'"):
        BeitConfig.from_pretrained(tmp_path, subfolder="none")


def transformers_layers(folder, subfolder):
    theirs = transformers.BeitConfig.from_pretrained(folder, subfolder=subfolder)
    return BeitConfig(num_hidden_layers=theirs.num_hidden_layers)


def test_from_pretrained_keeps_arguments_of_loading_out_of_the_fields(tmp_path):
    BeitConfig(**TINY).save_pretrained(tmp_path)
    read = BeitConfig.from_pretrained(
        tmp_path,
        force_download=True,
        trust_remote_code=True,
        code_revision="main",
        proxies={"https": "localhost:1"},
        local_files_only=True,
        subfolder=None,
        _from_auto=True,
        _commit_hash="0",
    )
    assert read == BeitConfig(**TINY)
    assert set(vars(read)) == set(vars(BeitConfig(**TINY)))


def test_from_pretrained_with_return_unused_kwargs_returns_what_is_not_a_field(tmp_path):
    values = TINY | {"own_field": 1, "model_type": "beit"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    options = {"hidden_dropout_prob": 0.5, "own_field": 2, "foo": 3, "device_map": "auto", "force_download": True}
    config, unused = BeitConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **options)
    theirs, wanted = transformers.BeitConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **options)
    assert unused == wanted == {"foo": 3, "device_map": "auto"}
    assert (config.hidden_dropout_prob, config.own_field) == (0.5, 2)
    assert (theirs.hidden_dropout_prob, theirs.own_field) == (0.5, 2)
    assert not {"foo", "device_map", "return_unused_kwargs"} & set(config.to_dict())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_hidden_layer", "num_hidden_layers"),
        ("hidden_sise", "hidden_size"),
        ("use_relative_positon_bias", "use_relative_position_bias"),
        ("attn_implementaton", "attn_implementation"),
        ("num_label", "num_labels"),
        ("out_indice", "out_indices"),
        ("num_classes", "num_labels"),
        ("drop_path", "drop_path_rate"),
        ("depth", "num_hidden_layers"),
        ("embed_dim", "hidden_size"),
        ("mlp_ratio", "intermediate_size"),
        ("in_chans", "num_channels"),
        ("img_size", "image_size"),
        ("init_values", "layer_scale_init_value"),
        ("num_heads", "num_attention_heads"),
        ("mean", "pixel_mean"),
        ("crop_pct", "pixel_resize"),
    ],
)
def test_construction_with_a_typo_or_a_name_of_timm_warns_with_the_field_that_was_meant(name, meant, tmp_path):
    message = rf"{name}=3 is not a field of BeitConfig and has no effect \(did you mean '{meant}'\?\)"
    with pytest.warns(UserWarning, match=message) as caught:
        config = BeitConfig(**{name: 3})
    assert caught[0].filename == __file__
    assert getattr(config, name) == 3
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "beit", name: 3}))
    with pytest.warns(UserWarning, match=message):
        BeitConfig.from_pretrained(tmp_path)


def test_construction_with_an_option_that_only_timm_has_warns():
    """Regression: `qkv_bias=False` was kept without a word, and the biases were there."""
    with pytest.warns(UserWarning, match=r"qkv_bias=False .* has no effect \(other libraries have this option, this"):
        BeitConfig(qkv_bias=False)


def test_construction_with_fields_of_transformers_and_own_ones_does_not_warn():
    names = {*vars(transformers.BeitConfig()), *transformers.BeitConfig().to_dict(), *OLD_FIELDS}
    ours = transformers.BeitConfig().to_dict()
    unknown = {name: None for name in names if not name.startswith("_") and not hasattr(BeitConfig(), name)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BeitConfig(**(ours | unknown), learning_rate=1, dataset="x")


# Fields that Transformers 4 writes for every model.
OLD_FIELDS = [
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "is_decoder",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
]


def test_from_dict_with_two_dtypes_takes_the_new_name(tmp_path):
    values = {"model_type": "beit", "dtype": "float16", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert BeitConfig.from_pretrained(tmp_path).dtype == torch.float16
    assert transformers.BeitConfig.from_pretrained(tmp_path).dtype == torch.float16
    old = {"model_type": "beit", "dtype": None, "torch_dtype": "bfloat16"}
    assert BeitConfig.from_dict(old).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torch_dtype='float32' contradicts dtype='float16'"):
        BeitConfig(dtype="float16", torch_dtype="float32")


@pytest.mark.parametrize("asked", ["eager", "triton", None])
def test_a_transformers_configuration_keeps_the_implementation_that_was_asked_for(asked, tmp_path):
    theirs = transformers.BeitConfig(**TINY)
    theirs._attn_implementation = asked
    assert as_beit_config(theirs).attn_implementation == asked
    model = beit_fast.BeitModel(theirs)
    assert (model.attn_implementation, model.config.attn_implementation) == (asked, asked)
    model.save_pretrained(tmp_path)
    assert beit_fast.BeitModel.from_pretrained(tmp_path, config=theirs).attn_implementation == asked


def test_the_configuration_of_a_transformers_model_requests_nothing():
    """Transformers writes "sdpa" into it."""
    theirs = transformers.BeitModel(transformers.BeitConfig(**TINY)).config
    assert theirs._attn_implementation == "sdpa"
    assert beit_fast.BeitModel(theirs).attn_implementation is None
    assert beit_fast.BeitModel(theirs, attn_implementation="sdpa").attn_implementation == "sdpa"


def test_a_transformers_configuration_with_another_implementation_raises(tmp_path):
    theirs = transformers.BeitConfig(**TINY, attn_implementation="flash_attention_2")
    beit_fast.BeitModel(BeitConfig(**TINY)).save_pretrained(tmp_path)
    for convert in (
        as_beit_config,
        beit_fast.BeitModel,
        lambda config: beit_fast.BeitModel.from_pretrained(tmp_path, config=config),
    ):
        with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' is not supported"):
            convert(theirs)


@pytest.mark.parametrize("wrong", ["microsoft/beit-base-patch16-224", {"hidden_size": 32}, None, 3, BeitConfig])
def test_construction_of_a_model_without_a_configuration_raises_one_error(wrong):
    with pytest.raises(TypeError, match=r"config=.* is of type .* \(expected a BeitConfig, .*; .*call BeitModel.*\)$"):
        beit_fast.BeitModel(wrong)


def test_from_pretrained_with_a_configuration_of_another_type_raises(tmp_path):
    beit_fast.BeitModel(BeitConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"config=3 is of type int \(expected a BeitConfig"):
        beit_fast.BeitModel.from_pretrained(tmp_path, config=3)
