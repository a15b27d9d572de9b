"""`ModelOutput` as a dict, tuple, object and pytree, in eager mode, compile, export and trace."""

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import transformers.modeling_outputs
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree

from beit_fast.models import outputs
from beit_fast.models.outputs import (
    BackboneOutput,
    BaseModelOutput,
    BeitModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedLMOutput,
    ModelOutput,
    SemanticSegmenterOutput,
)

CLASSES = [
    BaseModelOutput,
    BeitModelOutputWithPooling,
    MaskedLMOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
    BackboneOutput,
]
THEIR_NAMES = {"BeitModelOutputWithPooling": "BaseModelOutputWithPooling"}


class Classifier(nn.Module):
    """A module that sets the first field of its output last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, values, target=None):
        logits = self.linear(values)
        output = ImageClassifierOutput(logits=logits, hidden_states=(values, logits))
        if target is not None:
            output.loss = (output["logits"] - target).square().mean()
        return output


@pytest.fixture
def output():
    return ImageClassifierOutput(logits=torch.arange(6.0).view(2, 3), hidden_states=(torch.ones(2), torch.zeros(2)))


@pytest.mark.parametrize("output_class", CLASSES)
def test_output_fields_equal_transformers(output_class):
    theirs = getattr(transformers.modeling_outputs, THEIR_NAMES.get(output_class.__name__, output_class.__name__))
    assert [field.name for field in dataclasses.fields(output_class)] == [
        field.name for field in dataclasses.fields(theirs)
    ]
    assert list(inspect.signature(output_class).parameters) == [field.name for field in dataclasses.fields(theirs)]


@pytest.mark.parametrize("output_class", CLASSES)
def test_output_classes_are_dicts_with_documented_fields(output_class):
    assert isinstance(output_class(), (dict, OrderedDict))
    assert len(output_class()) == 0
    for field in dataclasses.fields(output_class):
        assert field.name in output_class.__doc__
    assert set(CLASSES) == {
        value for value in vars(outputs).values() if inspect.isclass(value) and issubclass(value, ModelOutput)
    } - {ModelOutput}


def test_output_none_fields_are_absent(output):
    assert output.loss is None
    assert output.attentions is None
    assert list(output) == list(output.keys()) == list(dict(output)) == list({**output}) == ["logits", "hidden_states"]
    assert len(output) == len(output.to_tuple()) == len(list(output.values())) == 2
    assert "loss" not in output
    assert output.get("loss") is None
    with pytest.raises(KeyError, match=r"holds \['logits', 'hidden_states'\], not 'loss'"):
        output["loss"]


def test_getitem_by_name_index_and_slice(output):
    assert output["logits"] is output.logits is output[0]
    assert output[-1] is output.hidden_states
    assert output[1:] == (output.hidden_states,)
    assert output[:] == output.to_tuple()
    with pytest.raises(IndexError):
        output[2]


def test_setattr_updates_every_view_in_field_order(output):
    loss, attentions = torch.tensor(1.0), (torch.ones(1),)
    output["attentions"] = attentions
    output.loss = loss
    assert list(output) == ["loss", "logits", "hidden_states", "attentions"]
    assert output.to_tuple() == tuple(output.values())
    assert output[0] is output["loss"] is loss
    output.hidden_states = None
    assert list(output) == ["loss", "logits", "attentions"]
    output["loss"] = None
    assert output.loss is None
    assert output[0] is output.logits
    replacement = torch.zeros(2, 3)
    output.logits = replacement
    assert output["logits"] is replacement


@pytest.mark.parametrize(
    "change",
    [
        lambda output: output.pop("logits"),
        lambda output: output.popitem(),
        lambda output: output.clear(),
        lambda output: output.setdefault("loss", 1),
        lambda output: output.update(loss=1),
        lambda output: output.move_to_end("logits"),
        lambda output: output.__delitem__("logits"),
        lambda output: output.__delattr__("logits"),
        lambda output: output.__ior__({"loss": 1}),
    ],
)
def test_dict_methods_that_change_fields_raise(output, change):
    before = output.copy()
    with pytest.raises(TypeError, match="the fields of a ImageClassifierOutput are fixed"):
        change(output)
    assert output == before


def test_unknown_field_names_raise(output):
    with pytest.raises(AttributeError, match=r"has the fields \['loss', 'logits', .*, not 'logit'"):
        output.logit = 1
    with pytest.raises(KeyError, match="not 'logit'"):
        output["logit"] = 1
    with pytest.raises(KeyError, match="not 'logit'"):
        ImageClassifierOutput({"logit": 1})
    with pytest.raises(TypeError, match="logit"):
        ImageClassifierOutput(logit=1)


def test_init_from_mapping_or_pairs():
    """torch.nn.parallel.gather passes a generator of pairs, Accelerate a dict."""
    loss, logits = torch.tensor(1.0), torch.ones(2)
    expected = MaskedLMOutput(loss=loss, logits=logits)
    assert MaskedLMOutput(loss, logits) == expected
    assert MaskedLMOutput({"logits": logits, "loss": loss}) == expected
    assert MaskedLMOutput([("logits", logits), ("loss", loss)]) == expected
    assert type(expected)((name, expected[name]) for name in expected) == expected
    assert list(MaskedLMOutput({"logits": logits, "loss": loss, "attentions": None})) == ["loss", "logits"]
    assert len(MaskedLMOutput({})) == 0
    with pytest.raises(TypeError, match=r"\(name, value\) pairs, not an iterator of"):
        MaskedLMOutput(iter([1, 2]))


@pytest.mark.parametrize("maps", [(), (torch.ones(2), torch.zeros(2)), [torch.ones(2)]], ids=len)
def test_init_from_tensor_sequence_is_a_field(maps):
    assert BackboneOutput(maps).feature_maps is maps


def test_apply_to_tensors_and_replace_rebuild_output(output):
    doubled = _apply_to_tensors(lambda tensor: 2 * tensor, output)
    assert type(doubled) is ImageClassifierOutput
    assert torch.equal(doubled.hidden_states[0], torch.full((2,), 2.0))
    replaced = dataclasses.replace(output, logits=None)
    assert list(replaced) == ["hidden_states"]


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda output: pickle.loads(pickle.dumps(output)),
        lambda output: output.copy(),
    ],
)
def test_copy_is_equal_and_independent(output, duplicate):
    other = duplicate(output)
    assert other == output
    assert list(vars(other)) == list(vars(output))
    other.loss = torch.tensor(1.0)
    assert output.loss is None
    assert other != output


def test_eq_compares_tensors():
    tensor = torch.tensor([1.0, float("nan")])
    assert MaskedLMOutput(logits=torch.ones(2)) == MaskedLMOutput(logits=torch.ones(2))
    assert MaskedLMOutput(logits=tensor) == MaskedLMOutput(logits=tensor)
    assert MaskedLMOutput(logits=tensor) != MaskedLMOutput(logits=tensor.clone())
    for other in (
        torch.zeros(2),
        torch.ones(1, 2),
        torch.ones(2, dtype=torch.float64),
        torch.ones(2, device="meta"),
        None,
        1,
    ):
        assert MaskedLMOutput(logits=torch.ones(2)) != MaskedLMOutput(logits=other)
    assert MaskedLMOutput(logits=torch.ones(2)) != ImageClassifierOutput(logits=torch.ones(2))
    assert MaskedLMOutput(logits=torch.ones(2)) != {"logits": torch.ones(2)}
    with pytest.raises(TypeError, match="unhashable"):
        hash(MaskedLMOutput())


def test_repr_shows_shapes(output):
    output.loss = torch.tensor(0.5)
    shapes = "logits=Tensor([2, 3], float32), hidden_states=(Tensor([2], float32), Tensor([2], float32))"
    assert repr(output) == f"ImageClassifierOutput(loss=tensor(0.5000), {shapes})"


@pytest.mark.parametrize("output_class", CLASSES)
def test_pytree_round_trip_keeps_class_order_and_none(output_class):
    names = [field.name for field in dataclasses.fields(output_class)]
    output = output_class(**{names[1]: torch.ones(1), names[-1]: (torch.zeros(1), torch.ones(1))})
    leaves, structure = pytree.tree_flatten(output)
    assert len(leaves) == 3
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert rebuilt == output
    assert getattr(rebuilt, names[0]) is None
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(output)[0]]
    assert paths == [f"['{names[1]}']", f"['{names[-1]}'][0]", f"['{names[-1]}'][1]"]


def test_tree_map_accepts_any_result():
    output = MaskedLMOutput(loss=torch.ones(1))
    assert pytree.tree_map(lambda leaf: {"mean": 1}, output).loss == {"mean": 1}
    assert pytree.tree_map(lambda leaf: [("a", 1)], output).loss == [("a", 1)]
    assert len(pytree.tree_map(lambda leaf: None, output)) == 0


def test_vmap_returns_output():
    model, values = Classifier(), torch.randn(5, 4)
    mapped = torch.vmap(model)(values)
    assert type(mapped) is ImageClassifierOutput
    torch.testing.assert_close(mapped.logits, model(values).logits)
    assert mapped.loss is None


def test_subclass_with_fields_is_an_output():
    class WithScore(MaskedLMOutput):
        score: torch.Tensor | None = None

    output = WithScore(score=torch.ones(1), loss=torch.zeros(1))
    assert list(output) == ["loss", "score"]
    assert type(pytree.tree_map(torch.neg, output)) is WithScore
    assert list(dataclasses.dataclass(WithScore)(output.loss)) == ["loss"]
    assert WithScore(torch.ones(2)) == WithScore(torch.ones(2))


def test_subclass_with_required_field_raises():
    with pytest.raises(TypeError, match=r"without it: \['score'\]"):
        type("Required", (ModelOutput,), {"__annotations__": {"score": int}})
    with pytest.raises(TypeError, match="at least one"):
        type("Empty", (ModelOutput,), {})


def test_backward_through_output_gives_gradients():
    model = Classifier()
    model(torch.ones(2, 4), torch.zeros(2, 3))[0].backward()
    assert model.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_makes_one_graph(backend):
    torch._dynamo.reset()
    model, values, target = Classifier(), torch.randn(2, 4), torch.zeros(2, 3)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for arguments in ((values,), (values, target)):
        result, expected = compiled(*arguments), model(*arguments)
        assert type(result) is ImageClassifierOutput
        assert result == expected
        assert list(result) == list(expected)
        assert result.loss is result.get("loss")


def test_compile_output_as_argument_equals_eager(output):
    torch._dynamo.reset()

    def total(output):
        return output.logits.sum() + output[1][0].sum() + output["hidden_states"][1].sum() + len(output)

    assert torch.equal(torch.compile(total, fullgraph=True, backend="eager")(output), total(output))


@pytest.mark.parametrize("strict", [True, False])
def test_export_save_loads_in_fresh_process(strict, tmp_path):
    model, values, target = Classifier(), torch.randn(2, 4), torch.zeros(2, 3)
    program = torch.export.export(model, (values, target), strict=strict)
    expected = model(values, target)
    assert program.module()(values, target) == expected
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((values, target, dict(expected)), tmp_path / "tensors.pt")
    script = (
        "import torch, beit_fast.models.outputs\n"
        "values, target, expected = torch.load('tensors.pt')\n"
        "result = torch.export.load('program.pt2').module()(values, target)\n"
        "assert type(result) is beit_fast.models.outputs.ImageClassifierOutput, type(result)\n"
        "assert result == type(result)(expected) and list(result) == ['loss', 'logits', 'hidden_states']\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_jit_trace_returns_a_dict():
    class Traced(Classifier):
        def forward(self, values):
            return ImageClassifierOutput(logits=super().forward(values).logits)

    model, values = Traced(), torch.randn(2, 4)
    traced = torch.jit.trace(model, (values,), strict=False)
    other = torch.randn(2, 4)
    torch.testing.assert_close(traced(other)["logits"], model(other).logits)
