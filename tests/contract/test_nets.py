"""The test nets themselves: complete, small, repeatable, and talking about layers that exist."""

from __future__ import annotations

import pytest
import torch

from pocketize.graph.inputs import as_inputs
from tests.contract import trees
from tests.contract.sample import CORE, SAMPLE
from tests.contract.widths import tensors_of, width_of
from tests.contract.zoo import every_net, parameters
from tests.foreign import foreign_nets
from tests.models import Net, nets

# What the engine is to cope with, and the nets that try it.
COVERAGE = {
    "conv 1d, 2d, 3d": "conv1d conv2d conv3d",
    "transposed": "conv_transpose1d conv_transpose2d conv_transpose3d conv_transpose_grouped",
    "grouped": "conv_grouped conv_transpose_grouped conv_more_groups_than_width",
    "depthwise": "conv_depthwise conv_depthwise_multiplier depthwise_over_concat",
    "linear": "linear_only linear_after_flatten",
    "batch norm": "batch_norm batch_norm_no_affine batch_norm_bare batch_norm_1d",
    "instance norm": "instance_norm instance_norm_no_affine instance_norm_statistics",
    "group norm": "group_norm group_norm_per_channel group_norm_one_group group_norm_no_affine",
    "layer norm": "layer_norm_channels_last layer_norm_channels_first layer_norm_functional",
    "PReLU": "prelu_one prelu_per_channel",
    "concat": "concat concat_with_itself concat_with_input dense unet",
    "add": "residual residual_on_input unet_add shortcut_by_padding",
    "mul with broadcasting": "attention_gate squeeze_excite squeeze_excite_conv",
    "split": "split_by_shape split_literal split_uneven split_by_layer_sizes tensor_split",
    "chunk": "glu_chunk glu_functional shuffle_unit",
    "unbind": "unbind_pairs attention_fused",
    "slices": "slices_by_shape slices_literal slices_strided narrow",
    "view, flatten, permute": "flatten_and_back fold_into_batch unflatten squeeze_round_trip",
    "pixel shuffle": "pixel_shuffle_module pixel_shuffle_functional subpixel_up3d",
    "pixel unshuffle": "pixel_unshuffle_module pixel_shuffle_functional",
    "channel shuffle": "channel_shuffle_by_view channel_shuffle_module",
    "pad": "pad_and_crop shortcut_by_padding",
    "expand, repeat": "expand_single expand_literal repeat_channels repeat_interleave_channels",
    "pooling, interpolation": "pools pools_3d unet_add",
    "global pooling": "squeeze_excite pools_3d",
    "attention": "attention_separate attention_fused attention_einsum non_local tiny_vi_t",
    "nn.MultiheadAttention": "multihead_batch_first multihead_batch_second cross_attention",
    "transformer layers": "transformer_encoder",
    "raw parameters": "raw_affine raw_buffer tiny_vi_t parameter_list_conv matmul_mixing",
    "modules called several times": "shared_conv shared_block shared_with_input",
    "tied": "tied_weights tied_module transposed_tie tied_embedding",
    "weight norm": "weight_norm_legacy weight_norm_parametrized weight_norm_transposed",
    "spectral norm": "spectral_norm_legacy spectral_norm_parametrized",
    "no rule": "recurrent_middle fourier_over_channels sorted_channels unfold",
    "size in forward": "view_literal view_literal_spatial new_tensor_literal size_in_config",
    "size in attributes": "owner_view owner_groups owner_heads layer_attributes",
    "several inputs": "two_inputs list_argument mask_input time_conditioned",
    "dict and keyword inputs": "dict_argument keyword_inputs dict_without_such_parameters",
    "outputs": "tuple_output dict_output nested_output dataclass_output named_tuple_output",
    "deep supervision": "deep_supervision stacked_supervision",
    "dropout, stochastic depth": "dropout stochastic_depth drop_path",
    "train and eval": "in_eval_mode mixed_modes",
    "values decide": "branch_on_values branch_on_shape",
    "hooks": "hook_that_records hook_that_changes hook_on_backward hook_of_its_own",
    "buffers": "counts_calls moving_average blur_pool",
    "flags": "frozen_parameters unused_parameters gradients",
    "dtypes": "double_precision bfloat16_precision half_precision mixed_precision_by_hand",
    "memory format": "channels_last channels_last_3d",
    "copies": "keeps_features features_kept_from_a_call copies_itself knows_its_parent",
    "lazy": "lazy_never_called lazy_after_a_call",
    "parts of another kind": "checkpointed scripted_part graph_module custom_function",
    "random numbers": "noise_always",
    "in place": "in_place put_into_zeros",
}


def test_every_habit_has_a_net() -> None:
    known = {net.name for net in nets()}
    assert not set(" ".join(COVERAGE.values()).split()) - known


def test_names_are_unique_across_all_tables() -> None:
    names = [net.name for net in every_net()]
    assert len(set(names)) == len(names)


def test_the_foreign_networks_that_are_promised_are_there() -> None:
    promised = str.split(
        "monai_unet_2d monai_unet_3d monai_basic_unet monai_basic_unet_plus_plus monai_dynunet "
        "monai_segresnet monai_segresnet_ds monai_attention_unet monai_vnet monai_unetr "
        "monai_mednext monai_highresnet monai_flexible_unet nnunet_plain_conv "
        "nnunet_residual_encoder"
    )
    names = [net.name for net in foreign_nets()]
    assert [p for p in promised if not any(name.startswith(p) for name in names)] == []


@pytest.mark.parametrize("net", parameters())
def test_net_runs_is_built_alike_every_time_and_its_expectations_name_what_exists(
    net: Net,
) -> None:
    state = torch.random.get_rng_state()
    first, second = tensors_of(net.build()), tensors_of(net.build())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())
    model = net.build()
    inputs = as_inputs(net.inputs(), model)
    for mode in (model.training, False, True):
        model.train(mode)
        assert any(True for _ in trees.tensors(inputs.call(model)))
    for path in (*net.movable, *net.shrinks):
        assert width_of(model, path) > net.width, path
    for path in net.frozen:
        assert width_of(model, path) > 0


# Tags of what concerns the number of channels only, which the sample need not have.
_WIDTHS = {"counts-channels", "depthwise", "concat", "linear", "pad", "mask", "unfold", "gather"}
_WIDTHS |= {"matmul", "hard-coded", "bottleneck", "shuffle", "pixel", "repeat"}
_WIDTHS |= {"indices", "numbers", "made-weight", "sizes"}


def test_the_sample_has_every_norm_activation_and_dropout_and_every_habit() -> None:
    families = ("activation", "batchnorm", "instancenorm", "normalization", "dropout")
    kinds, tags = [], []
    for net in nets():
        tags += [(tag, net.name) for tag in net.tags - _WIDTHS]
        if net.error is None:
            modules = {type(module) for module in net.build().modules()}
            kinds += [
                (kind.__name__, net.name)
                for kind in modules
                if kind.__module__.rpartition(".")[2] in families
            ]
    for listed in (kinds, tags):
        everything = {habit for habit, _ in listed}
        assert everything == {habit for habit, name in listed if name in SAMPLE}
    assert {net.name for net in every_net()} >= SAMPLE > CORE


def test_awkward_nets_are_small() -> None:
    sizes = {
        net.name: sum(p.numel() for p in net.build().parameters())
        for net in nets()
        if not net.error
    }
    assert max(sizes.values()) < 20_000
