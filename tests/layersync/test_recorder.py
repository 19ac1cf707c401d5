"""A hooked network stays an ordinary one: copies, pickles, threads and later changes, and what a pass contains."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from residual_network import Network, X
from torch import Tensor, nn

from layerprobe.layersync.loss import LayerSync
from layerprobe.layersync.options import SyncOptions

ONE = [("blocks.0", "blocks.2")]


def sync_of(network: nn.Module, **options: Any) -> LayerSync:
    return LayerSync(network, ONE, weight=0.3, say=lambda line: None, **options)


def hooks(module: nn.Module) -> list[Any]:
    return [
        hook
        for part in module.modules()
        for table in (part._forward_hooks, part._forward_pre_hooks, part._forward_pre_hooks_with_kwargs)
        for hook in table.values()
    ]


def saved(network: Network) -> Network:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded: Network = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_and_pickles_made_in_the_block_have_no_hooks(copied: Any) -> None:
    network = Network()
    mine = network.blocks[0].register_forward_hook(lambda *_: None) if copied is copy.deepcopy else None
    with sync_of(network) as sync, sync_of(network):
        network(X)
        other = copied(network)
        assert len(hooks(other)) == (1 if mine else 0)  # the user's own hook is kept
        assert not any("__getstate__" in part.__dict__ for part in other.modules())
        other(3 * X)  # an average that runs between the forward pass and the loss
        loss = sync.loss()
        network(X)
        torch.testing.assert_close(sync.loss(), loss)
    assert not any("__getstate__" in part.__dict__ for part in network.modules())
    assert len(hooks(network)) == (1 if mine else 0)


def test_attaching_leaves_the_state_dict_alone() -> None:
    network = Network()
    keys = list(network.state_dict())
    with sync_of(network):
        assert list(network.state_dict()) == keys


def test_a_layersync_is_copied_and_pickled_without_being_attached() -> None:
    network = Network()
    with sync_of(network) as sync:
        network(X)
        loss = sync.loss()
        network(X)
        other = copy.deepcopy(sync)
        assert not hooks(other.module)
        with pytest.raises(ValueError, match="no forward pass"):
            other.loss()
        with other:
            other.module(X)
            torch.testing.assert_close(other.loss(), loss)
    plain = LayerSync(network, ONE, weight=0.3)
    assert pickle.loads(pickle.dumps(plain)).pairs == plain.pairs


def test_the_copies_of_data_parallel_are_refused() -> None:
    network = Network()
    with (
        sync_of(network),
        pytest.raises(ValueError, match=r"^nn.DataParallel runs copies of the network that each see"),
    ):
        network._replicate_for_data_parallel()(X)


def test_a_layer_run_by_itself_after_the_pass_does_not_count() -> None:
    network = Network()
    with sync_of(network) as sync:
        network(X)
        expected = sync.loss()
        network(X)
        network.blocks[0](3 * X)
        torch.testing.assert_close(sync.loss(), expected)


class InPlace(Network):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x += 1
        output: Tensor = self.head(x)
        return output


def test_changes_in_place_are_noticed_and_a_clone_is_not_changed() -> None:
    network = InPlace()
    with sync_of(network) as sync:
        network(X)
        with pytest.raises(
            ValueError,
            match=r"^the output of blocks.0 was changed in place after the layer ran, so it is no longer the layer's; "
            r"clone it, such as tokens=lambda output, name: output.clone\(\)$",
        ):
            sync.loss()
    with sync_of(network, tokens=lambda output, name: output.clone()) as sync:
        network(X)
        loss = sync.loss()
    torch.testing.assert_close(loss, loss_of(network))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by Dynamo
def test_a_compiled_graph_records_before_changes_in_place() -> None:
    network = InPlace()
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with sync_of(network) as sync:
        compiled(X)
        loss = sync.loss()
    torch.compiler.reset()
    torch.testing.assert_close(loss, loss_of(network))


def loss_of(network: Network) -> Tensor:
    """The loss of ONE by hand, for blocks with an addition of 1 in between."""
    tokens, x = [], X
    for block in network.blocks:
        tokens.append(block(x))
        x = tokens[-1] + 1
    return -0.3 * torch.cosine_similarity(tokens[0], tokens[2], dim=-1).mean()


def test_a_teacher_may_run_in_inference_mode() -> None:
    network = Network()
    losses = []
    for mode in (torch.no_grad, torch.inference_mode):
        with sync_of(network, options=SyncOptions(noise_gap=0.1)) as sync:
            network(X)
            with sync.teaching() as teacher, mode():
                teacher(X)
            losses.append(sync.loss())
            losses[-1].backward()
    torch.testing.assert_close(*losses)


def test_two_at_once_on_one_network_and_a_change_of_dtype() -> None:
    network = Network()
    with sync_of(network) as first, LayerSync(network, [("blocks.1", "blocks.3")], weight=0.3) as second:
        network(X)
        assert first.loss() != second.loss()
        network.to(torch.float64)
        network(X.double())
        assert first.loss().dtype == torch.float64
