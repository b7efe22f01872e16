"""The nets on which every row of the contract is tried in full.

On the others a row is held to the decisive checks only, since a row in full on all of them takes
minutes. They are chosen by what a pass could stumble over; ``test_nets.py`` asks that every kind of
layer that passes rewrite, and every tag that is not a channel's affair, is among them.
"""

from __future__ import annotations

__all__ = ["CORE", "COSTLY", "DECISIVE", "SAMPLE"]

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
"""The part of the sample on which variants and combinations of passes are tried."""

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
"""Checks that train, or repeat what a decisive one finds; on the sample only."""
