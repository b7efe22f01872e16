"""The nets on which the rows of the contract are tried.

Every row on every net takes an hour (``pytest --whole``), so ``cases.py`` states which of
these lists a row is tried on. The sample is chosen by what any pass could stumble over;
``test_nets.py`` asks that every kind of layer that passes rewrite, and every tag that is not about
channels, is among them. The list of a pass has a net for every kind of edit, on every kind of
module, and for every refusal and note, that the pass gives on any of the nets.

A net of the core is held to all checks, the costly ones with every third row; another net of the
sample with every fourth row. All others are held to the decisive ones.
"""

from __future__ import annotations

__all__ = [
    "CONVOLUTIONS",
    "CORE",
    "COSTLY",
    "DECISIVE",
    "DTYPES",
    "GRAPHS",
    "NORMS",
    "PARTS",
    "SAMPLE",
    "VOLUMES",
    "WIDTHS",
]

HABITS = {
    "each norm": "batch_norm batch_norm_1d batch_norm_no_affine batch_norm_no_statistics "
    "batch_norm_bare batch_norm_cumulative instance_norm instance_norm_no_affine "
    "instance_norm_statistics group_norm group_norm_no_affine layer_norm_channels_last "
    "layer_norm_functional rms_norm local_response_norm norm_after_flatten raw_buffer",
    "norms in 3d": "monai_highresnet_padding conv3d",
    "each activation": "activations_of_every_kind prelu_one prelu_per_channel "
    "softmax_over_channels time_conditioned glu_chunk",
    "conv - norm - activation as people write it": "unet dense monai_unet_2d monai_dynunet_plain "
    "nnunet_plain_conv_deep_supervision monai_segresnet densenet resnext efficientnet",
    "skips": "unet_add concat concat_with_itself concat_with_input residual residual_on_input",
    "gates": "attention_gate squeeze_excite_conv",
    "transposed, grouped": "conv_transpose2d conv_grouped",
    "pooled, resampled": "pools pools_3d spatial_transformer",
    "in place": "in_place put_into_zeros",
    "attention": "multihead_batch_first transformer_encoder tiny_vi_t",
    "modules used twice": "shared_conv shared_block shared_with_input tied_module",
    "ties": "tied_weights transposed_tie tied_embedding",
    "computed weights": "weight_norm_legacy weight_norm_parametrized "
    "spectral_norm_parametrized functional_weights",
    "random numbers": "dropout stochastic_depth drop_path noise_always",
    "modes": "in_eval_mode mixed_modes frozen_parameters",
    "hooks": "hook_that_records hook_that_changes hook_on_backward hook_of_its_own",
    "several inputs": "two_inputs list_argument dict_argument keyword_inputs mask_input",
    "outputs": "tuple_output dataclass_output nested_output stacked_supervision "
    "returns_its_input class_map_output",
    "state": "counts_calls moving_average counts_in_python extra_state unused_parameters",
    "values decide": "branch_on_values branch_on_shape",
    "parts of another kind": "checkpointed scripted_part graph_module custom_function "
    "frame_with_identity data_parallel patched_forward recurrent_middle",
    "dtypes and formats": "double_precision bfloat16_precision half_precision autocast_inside "
    "mixed_precision_by_hand channels_last channels_last_3d",
    "copies": "keeps_features features_kept_from_a_call copies_itself knows_its_parent gradients",
    "lazy": "lazy_after_a_call",
    "no float64": "fourier_neural_operator",
    "one layer, and none": "single_layer no_parameters",
}

SAMPLE = frozenset(" ".join(HABITS.values()).split())
"""Names of the nets."""

_CORE = (
    "batch_norm batch_norm_no_affine instance_norm instance_norm_statistics group_norm",
    "activations_of_every_kind prelu_per_channel unet monai_segresnet monai_highresnet_padding",
    "conv3d concat_with_itself residual residual_on_input squeeze_excite_conv conv_transpose2d",
    "in_place transformer_encoder shared_block tied_module tied_weights weight_norm_legacy",
    "spectral_norm_parametrized dropout noise_always mixed_modes frozen_parameters",
    "hook_that_records hook_that_changes hook_on_backward two_inputs keyword_inputs",
    "nested_output stacked_supervision counts_calls extra_state branch_on_shape checkpointed",
    "scripted_part graph_module custom_function double_precision channels_last_3d",
    "keeps_features lazy_after_a_call single_layer no_parameters",
)
CORE = frozenset(" ".join(_CORE).split())
"""The part of the sample of which variants and combinations are tried on an eighth each."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


WIDTHS = _names(
    "branch_on_values conv3d conv_transpose2d counts_calls efficientnet fourier_neural_operator "
    "functional_weights group_norm instance_norm_statistics layer_norm_functional "
    "local_response_norm moving_average norm_after_flatten prelu_per_channel raw_buffer "
    "recurrent_middle rms_norm scripted_part shared_with_input spectral_norm_parametrized "
    "tied_embedding tiny_vi_t weight_norm_legacy weight_norm_parametrized multihead_batch_first "
    "conv_grouped nnunet_plain_conv_deep_supervision"
)
"""Each kind of tensor with channels, and each reason why they stay."""

NORMS = _names(
    "batch_norm batch_norm_1d batch_norm_no_affine batch_norm_no_statistics batch_norm_cumulative "
    "instance_norm instance_norm_no_affine instance_norm_statistics group_norm "
    "group_norm_no_affine activations_of_every_kind prelu_one prelu_per_channel unet concat "
    "residual conv3d nnunet_plain_conv_deep_supervision monai_dynunet_plain monai_segresnet "
    "efficientnet functional_weights hook_on_backward hook_that_records hrnet norm_after_flatten "
    "recurrent_residual resnext shared_block tied_module mixed_modes frozen_parameters in_place "
    "checkpointed double_precision dropout"
)
"""Each norm with each activation, and each reason why one stays."""

GRAPHS = _names("batch_norm_cumulative conv1d graph_module latents memory_attention no_parameters")
"""Each kind of operator whose result is kept, and each refusal."""

PARTS = _names(
    "batch_norm_1d branch_on_values cbam crop_by_tensor data_parallel efficientnet "
    "every_width_seen fourier_neural_operator hrnet local_response_norm low_rank_update "
    "nested_frames numbers_seeded_by_generator recurrent_middle recurrent_residual res2net "
    "scripted_part selective_kernels sequential_with_repeats single_layer sorted_channels "
    "squeeze_excite_conv stochastic_depth tied_module unet unused_parameters "
    "weight_norm_parametrized weight_norm_transposed weight_standardised_flat"
)
"""Each kind of part that is run again, and each refusal."""

CONVOLUTIONS = _names(
    "conv3d conv_transpose2d resnext scripted_part single_layer tied_weights unused_parameters "
    "weight_norm_legacy"
)
"""Each kind of convolution, and each reason why one stays."""

VOLUMES = _names(
    "branch_on_values class_map_output counts_calls counts_in_python features_kept_from_a_call "
    "graph_module hook_of_its_own hook_that_changes hook_that_records layer_norm_channels_last "
    "layer_norm_functional noise_always pools pools_3d put_into_zeros recurrent_middle resnext "
    "rms_norm spatial_transformer tied_embedding tiny_vi_t transposed_tie unet"
)
"""Each way to run an operator by tiles, and each refusal."""

DTYPES = _names(
    "batch_norm_bare batch_norm_no_affine bfloat16_precision double_precision graph_module "
    "half_precision mixed_precision_by_hand no_parameters autocast_inside"
)
"""Each kind of norm that autocast treats in its way, and each refusal."""

DECISIVE = (
    "original_untouched",
    "same_keys",
    "same_outputs_in_shape",
    "hooks_survive",
    "exact_gradients",
    "in_place",
)
"""Checks that run on every net where the row changes anything."""

COSTLY = ("exact_outputs", "exact_training", "checkpoints_fit_both_ways", "resumes", "copies_train")
"""Checks that train, or repeat what a decisive one finds; on a third of the pairs of the sample."""
