"""The operators under `torch.compile`, activation checkpointing, export and AOTInductor."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import beit_fast
from beit_fast.ops import compile_cache
from beit_fast.ops.arguments import AttentionArguments
from beit_fast.ops.fallback.attention import attention_forward
from beit_fast.position_bias import table_rows

from ..support.cases import attention_case

attention_op = torch.ops.beit_fast.rel_pos_attention.default
PACKAGE = Path(beit_fast.__file__).parent


@pytest.fixture(autouse=True)
def _reset_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def calls():
    """Shapes of all forward calls of attention, which run the fallback."""
    seen = []

    def counted(*args):
        seen.append(args[0].shape)
        return attention_forward(AttentionArguments(*args))

    library = torch.library.Library("beit_fast", "IMPL")
    library.impl("rel_pos_attention", counted, "CPU", allow_override=True)
    yield seen
    library._destroy()


def assert_same_gradients(compiled, plain, leaves, *others):
    results = [
        (out.detach(), torch.autograd.grad(out.square().sum(), leaves))
        for out in (function(*leaves, *others) for function in (compiled, plain))
    ]
    torch.testing.assert_close(*(out for out, _ in results))
    for grad, expected in zip(*(grads for _, grads in results), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_compiles_to_one_graph(biased, masked, dropout_p):
    case = attention_case((2, 3), masked=masked, biased=biased)

    def attend(q, k, v, table=None):
        return beit_fast.rel_pos_attention(q, k, v, table, (2, 3), case.key_mask, dropout_p=dropout_p, seed=7)

    counter = CompileCounterWithBackend("aot_eager")
    assert_same_gradients(torch.compile(attend, fullgraph=True, backend=counter), attend, case.leaves())
    assert counter.frame_count == 1
    assert [node.target for graph in counter.graphs for node in graph.graph.nodes].count(attention_op) == 1


def test_attention_compiles_once_for_every_batch():
    def attend(q, k, v, table):
        return beit_fast.rel_pos_attention(q, k, v, table, (2, 3))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for batch in (2, 5, 3):
        case = attention_case((2, 3), batch=batch)
        for tensor in (case.query, case.key, case.value):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_same_gradients(compiled, attend, case.leaves())
    assert counter.frame_count == 1


def test_attention_compiles_once_for_every_window():
    """The window is computed from the image size, as in a model."""

    def attend(grid, cls, table):  # [B, Wh, Ww, 3 * H * D], [3 * H * D], [rows, H]
        tokens = torch.cat([cls.expand(grid.shape[0], 1, -1), grid.flatten(1, 2)], dim=1)
        q, k, v = tokens.unflatten(-1, (3, 3, 16)).unbind(2)
        return beit_fast.rel_pos_attention(q, k, v, table, grid.shape[1:3])

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    cls = torch.randn(144, requires_grad=True)
    for window in ((4, 5), (6, 7), (5, 4)):
        grid, table = torch.randn(2, *window, 144), torch.randn(table_rows(window), 3)
        for tensor, dims in ((grid, (1, 2)), (table, 0)):
            torch._dynamo.mark_dynamic(tensor.requires_grad_(), dims)
        assert_same_gradients(compiled, attend, [grid, cls, table])
    assert counter.frame_count == 1


def test_attention_changed_seed_recompiles_once():
    case = attention_case((2, 3))

    def attend(q, k, v, table, seed):
        return beit_fast.rel_pos_attention(q, k, v, table, (2, 3), dropout_p=0.3, seed=seed)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seed in (11, 12, 13, 14):
        assert_same_gradients(compiled, attend, case.leaves(), seed)
    assert counter.frame_count == 2  # one graph for a constant seed, one for any seed


def test_attention_wrong_window_raises_while_tracing():
    case = attention_case((2, 3))
    compiled = torch.compile(
        lambda q, table: beit_fast.rel_pos_attention(q, q, q, table, (3, 3)), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="has 10 tokens, not 7"):
        compiled(case.query, case.table)


def _block(x, weight, table):
    q, k, v = torch.nn.functional.linear(x, weight).sin().unflatten(-1, (3, 3, 8)).unbind(2)
    return beit_fast.rel_pos_attention(q, k, v, table, (2, 3)).flatten(2).sin()


def _save_attention(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op == attention_op else CheckpointPolicy.PREFER_RECOMPUTE


SAVED_BY = {"recomputed": None, "a list": [attention_op], "a policy": _save_attention}


def _checkpointed_block(saved_by):
    options = {}
    if saved_by is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saved_by)
    return lambda x, weight, table: checkpoint(_block, x, weight, table, use_reentrant=False, **options)


def _block_leaves():
    shapes = ((2, 7, 16), (72, 16), (table_rows((2, 3)), 3))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("saved_by", "times"), [("recomputed", 2), ("a list", 1), ("a policy", 1)])
def test_selective_checkpointing_saves_out_and_lse(calls, saved_by, times):
    leaves = _block_leaves()
    expected = torch.autograd.grad(_block(*leaves).square().sum(), leaves)
    calls.clear()
    grads = torch.autograd.grad(_checkpointed_block(SAVED_BY[saved_by])(*leaves).square().sum(), leaves)
    assert len(calls) == times
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("saved_by", "times"), [("recomputed", 2), ("a policy", 1)])
def test_selective_checkpointing_compiled_saves_out_and_lse(calls, saved_by, times):
    leaves = _block_leaves()
    expected = torch.autograd.grad(_block(*leaves).square().sum(), leaves)
    calls.clear()
    compiled = torch.compile(
        _checkpointed_block(SAVED_BY[saved_by]), fullgraph=True, backend="aot_eager_decomp_partition"
    )
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert len(calls) == times
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_partitioner_recomputes_attention_only_to_save_memory(calls):
    leaves = _block_leaves()
    for budget, times in ((1.0, 1), (0.0, 2)):
        torch._dynamo.reset()
        calls.clear()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            compiled = torch.compile(_block, fullgraph=True, backend="aot_eager_decomp_partition")
            torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
        assert len(calls) == times


COMPILED_STEP = """
import torch, beit_fast, sys
assert beit_fast.__file__.startswith(sys.argv[1]), beit_fast.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
q = torch.randn(1, 5, 2, 8, requires_grad=True)
def step(q):
    return beit_fast.rel_pos_attention(q, q, q).sin().sum()
compiled, = torch.autograd.grad(torch.compile(step)(q), q)
plain, = torch.autograd.grad(step(q), q)
torch.testing.assert_close(compiled, plain)
counters = torch._dynamo.utils.counters["aot_autograd"]
print(counters["autograd_cache_saved"], counters["autograd_cache_hit"], plain.norm().item())
"""

DOUBLED_GRADIENT = """

def _doubled(ctx, *grads):
    return tuple(None if grad is None else 2 * grad for grad in _gradient(attention_backward_op)(ctx, *grads))


from .library import library
torch.library.register_autograd("beit_fast::rel_pos_attention", _doubled, setup_context=_setup_context, lib=library)
"""


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler")
def test_disk_cache_changed_backward_is_compiled_again(tmp_path):
    """The source tag adds the Python code of an operator to cache keys."""
    for name in ("before", "after"):
        shutil.copytree(PACKAGE, tmp_path / name / "beit_fast", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "after" / "beit_fast" / "ops" / "attention.py", "a") as changed:
        changed.write(DOUBLED_GRADIENT)
    printed = []
    for name in ("before", "after"):
        folder = tmp_path / name
        environment = os.environ | {"PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-W", "ignore", "-c", COMPILED_STEP, str(folder)]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        printed.append([float(word) for word in run.stdout.split()])
    (saved, hits, norm), (saved_after, hits_after, norm_after) = printed
    assert (saved, hits) == (saved_after, hits_after) == (1, 0)
    assert norm_after == 2 * norm


def test_cache_tag_is_appended_to_user_tag():
    code = "import torch.compiler.config as config, beit_fast; print(config.cache_key_tag)"
    environment = os.environ | {"TORCH_COMPILE_CACHE_KEY_TAG": "mine"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == f"mine {compile_cache.source_tag()}"


class PackedAttention(torch.nn.Module):
    """Projection and attention for a window of 2 x 3 patches."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.table = torch.nn.Parameter(torch.randn(table_rows((2, 3)), 2))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return beit_fast.rel_pos_attention(q, k, v, self.table, (2, 3)).flatten(2)


LOAD_AND_RUN = """
import sys, torch
if sys.argv[1] == "import":
    import beit_fast
torch.set_num_threads(1)
package, data = sys.argv[2:]
x, expected = torch.load(data)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), expected)
"""


@pytest.fixture(scope="module")
def packaged_model(tmp_path_factory):
    """Package of a model for any batch size, an input and its output."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    folder = tmp_path_factory.mktemp("aoti")
    torch.manual_seed(0)
    model = PackedAttention().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 7, 16),), dynamic_shapes=({0: batch},))
    assert attention_op in [node.target for node in program.graph.nodes]
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    with torch.no_grad():
        x = torch.randn(5, 7, 16)
        torch.save((x, model(x)), folder / "data.pt")
    return package, str(folder / "data.pt")


def test_aotinductor_package_with_beit_fast_runs(packaged_model):
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, "import", *packaged_model], check=True)


def test_aotinductor_package_without_beit_fast_raises(packaged_model):
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, "without", *packaged_model], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "Could not find schema for beit_fast::rel_pos_attention" in run.stderr
