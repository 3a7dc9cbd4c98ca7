"""Compiled blocks compute and train as the others do. Mostly without code generation, which takes a minute."""

from functools import partial

import pytest
import torch
import torch._functorch.config
from rich.console import Console
from torch._dynamo.testing import CompileCounterWithBackend

from adamae_fast.config import load_config
from adamae_fast.model.block import Block
from adamae_fast.run_folder import RunFolder
from adamae_fast.testing import assert_within_budget
from adamae_fast.train import step
from adamae_fast.train.compile import compile_blocks
from adamae_fast.train.pretrain import pretrain
from tests.convergence.test_mini import needs_compiler
from tests.train.test_pretrain import write_recipe
from tests.train.test_step import DEVICES, build, clips, run_step

# torch hides this one from its users, though not from a filter that makes errors of warnings.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def counter(monkeypatch):
    """The blocks of a Stepper are traced and differentiated ahead of time, and their graphs counted."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(step, "compile_blocks", partial(compile_blocks, backend=counter))
    yield counter
    torch._dynamo.reset()


def gradients(stepper, dtype):
    stepper.model.to(dtype)
    stepper.begin(0, 0.0)
    stepper.accumulate(clips())
    return {name: p.grad for name, p in stepper.model.named_parameters()}


# Inductor's advice on a GPU; fp32 is what is compared.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_loss_and_gradients_are_those_of_plain_blocks(backend, device):
    torch._dynamo.reset()
    compiled = build(device=device)
    compile_blocks(compiled.model, backend)
    truth = build(device=device)
    expected = gradients(truth, torch.float64)
    plain = build(device=device)
    in_fp32 = gradients(plain, torch.float32)
    actual = gradients(compiled, torch.float32)
    for name in expected:
        # Sums over clips and tokens cancel, so a rounding step is one of the gradient's largest number. The bias of the
        # sampler's head has none: a softmax does not change with it.
        similar = "sampler.head.weight" if name == "sampler.head.bias" else name
        largest = float(expected[similar].abs().max())
        assert_within_budget(actual[name], in_fp32[name], expected[name], largest_term=largest)
    figures = [stepper._figures.cpu() for stepper in (compiled, plain, truth)]
    assert_within_budget(figures[0], figures[1], figures[2].double(), largest_term=1.0)


def test_blocks_of_a_kind_share_one_graph_and_names_stay(counter):
    stepper = build(compile=True)
    assert list(stepper.model.state_dict()) == list(build().model.state_dict())
    assert sum(isinstance(module, Block) for module in stepper.model.modules()) == 4 + 1 + 2
    for i in range(2):
        run_step(stepper, clips(), step=i)
    assert counter.frame_count == 3  # encoder, sampler, decoder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_in_a_compiled_block_follows_from_seed_and_step(counter, precision):
    stepper = build(compile=True, dropout=0.5, precision=precision)
    losses = [run_step(stepper, clips(), step=i, learning_rate=0.0)["loss_sampling"] for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def saved_bytes(recompute):
    """What a compiled training forward keeps for the backward, as the compiler that makes code divides the two."""
    torch._dynamo.reset()
    stepper = build(recompute=recompute)
    compile_blocks(stepper.model, "aot_eager_decomp_partition")
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.accumulate(clips())
    return sum(kept.values())


def test_what_is_computed_again_is_not_kept_in_compiled_blocks():
    # Restores the compiler's settings; what it finds in its cache does not see the hooks.
    with torch._functorch.config.patch(cse=True, enable_autograd_cache=False):
        kept = [saved_bytes(recompute) for recompute in ("none", "pointwise", "fc1", "block")]
    assert kept == sorted(set(kept), reverse=True)


def test_a_compiled_run_draws_its_report_without_compiling_again(counter, tiny_videos, tmp_path):
    manifest = tmp_path / "manifest.txt"
    manifest.write_text("".join(f"{path} 0\n" for path in tiny_videos))
    overrides = {"output_dir": str(tmp_path / "run"), "train.compile": True, "train.steps": 2, "data.num_workers": 0}
    pretrain(load_config(write_recipe(tmp_path / "recipe.yaml", manifest), overrides), Console(quiet=True))
    assert RunFolder(tmp_path / "run").report.is_file()
    assert counter.frame_count == 3
