"""A plugin of components that each break one promise, made from the skeletons of ``plugins new``.

Every class names the check that must fail. Registering them reads this file's own table and imports no torch.
"""

import underpaint

# kind: {class in a mutant_* module: checks that must fail; others may, as a consequence}
MUTANTS = {
    "encoder": {
        "WrongChannels": {"output_as_declared"},
        "WrongGrid": {"output_as_declared"},
        "KeepsClassToken": {"cells_in_place"},
        "StrayClassToken": {"output_as_declared"},
        "Transposed": {"cells_in_place", "output_as_declared"},
        "NotNormalised": {"normalises_once"},
        "NormalisedTwice": {"normalises_once"},
        "WrongMean": {"normalises_once"},
        "RandomInEval": {"deterministic_in_eval", "batch_independent", "state_round_trip", "pickles"},
        "MixesBatch": {"batch_independent"},
        "SingleFloat": {"dtype_follows", "finite_in_bfloat16"},
        "OtherDevice": {"device_follows"},
        "Counts": {"unchanged_by_forward"},
        "HiddenWeight": {"state_round_trip"},
        "Unpicklable": {"pickles"},
        "NoGradient": {"gradients_reach_some", "images_reach_gradients"},
        "FrozenWhenMade": {"learns_when_made", "gradients_reach_some"},
        "NoLicence": {"declares_licence_and_source"},
        "NotANumber": {"finite", "finite_in_bfloat16"},
        "AnySize": {"refuses_other_sizes"},
        "ReadsValues": {"constructs_on_meta"},
        "Ignorant": {"weights_matter", "images_reach_gradients", "cells_in_place", "gradients_reach_some"},
        "Undocumented": {"target_has_docstring"},
    },
    "adapter": {
        "WrongLatents": {"posterior_as_declared"},
        "NegativeKl": {"posterior_is_a_distribution"},
        "ConstantLatent": {"latents_follow_features", "gradients_reach_all"},
        "IdleParameter": {"gradients_reach_all"},
    },
    "decoder": {
        "WrongScale": {"image_as_declared", "pyramid_ascends", "pixels_in_place"},
        "Descending": {"pyramid_ascends"},
        "Flipped": {"pixels_in_place"},
        "ForeignLastLayer": {"last_layer_is_own"},
    },
    "backbone": {
        "WrongVelocity": {"velocity_as_declared"},
        "PromisesVariance": {"velocity_as_declared"},
        "AlwaysHidden": {"velocity_as_declared", "hidden_as_asked"},
        "WrongHidden": {"hidden_as_asked"},
        "Timeless": {"time_and_condition_matter", "gradients_reach_all"},
        "Unconditional": {"time_and_condition_matter", "gradients_reach_all"},
        "IgnoresMask": {"masked_tokens_do_not_matter"},
        "DividesByTime": {"ends_of_time_are_finite"},
        "OtherWidth": {"width_as_configured", "hidden_as_asked"},
        "NeedsOtherWidth": {"accepts_condition_as_wide"},
        "OnlyTiny": {"makes_full_size"},
    },
    "conditioner": {
        "WrongWidth": {"condition_as_declared"},
        "NeverDrops": {"dropped_is_null"},
        "DropsAll": {"dropped_is_null", "inputs_matter"},
        "LongerNull": {"joins_with_null", "dropped_is_null"},
        "OneForAll": {"inputs_matter"},
    },
    "loss": {
        "NotScalar": {"terms_as_declared"},
        "Undeclared": {"reads_only_what_it_needs"},
        "UnknownNeed": {"reads_only_what_it_needs"},
        "Unseeded": {"repeats_with_seed"},
        "IdleUnit": {"compiles_as_declared"},
        "CompiledOtherwise": {"compiles_as_declared"},
        "Sums": {"mean_over_batch"},
        "Detached": {"gradients_reach_outputs"},
        "RootAtZero": {"finite_at_the_optimum"},
        "NoAutocast": {"finite_in_autocast"},
        "InPlace": {"leaves_inputs_alone"},
        "NothingTrains": {"trains_as_declared"},
        "IdleHead": {"trains_as_declared"},
        "FrozenCritic": {"critic_learns"},
        "HeadOutside": {"critic_learns"},
        "TeachesCritic": {"model_spares_critic"},
        "CountsCalls": {"model_spares_critic"},
        "LeavesFlags": {"model_spares_critic"},
        "TeachesModel": {"critic_spares_model"},
    },
    "metric": {
        "Tensors": {"values_are_numbers"},
        "NoDirection": {"declares_direction"},
        "MeanOfMeans": {"updates_add_up", "ranks_merge"},
        "NeverForgets": {"reset_forgets"},
        "WrongDirection": {"identical_is_best"},
        "OneSided": {"sides_in_any_order"},
        "NoState": {"ranks_merge"},
        "WrongReduction": {"ranks_merge"},
        "LosesState": {"pickles_with_state"},
        "EmptyProtocol": {"protocol_tells_enough"},
        "SecretNetwork": {"protocol_tells_enough"},
        "ChangesImages": {"leaves_images_alone"},
    },
    "dataset": {
        "Floats": {"samples_as_declared"},
        "LabelOutOfRange": {"samples_as_declared"},
        "Textless": {"samples_as_declared"},
        "Transposed": {"sides_are_those_of_the_images"},
        "SameKey": {"keys_are_unique"},
        "Endless": {"ends_with_index_error"},
        "Random": {"reads_repeat", "reads_elsewhere"},
        "LocalState": {"reads_elsewhere"},
        "FreshFingerprint": {"fingerprint_is_stable", "reads_elsewhere"},
    },
    "sampler": {
        "Backwards": {"constant_flow_is_exact", "linear_flow_converges"},
        "Crude": {"linear_flow_converges"},
        "StopsEarly": {"constant_flow_is_exact", "protocol_counts_evaluations"},
        "FromZero": {"time_runs_down"},
        "GlobalNoise": {"repeats_with_seed", "samples_are_independent", "constant_flow_is_exact"},
        "SharesNoise": {"samples_are_independent", "constant_flow_is_exact"},
        "SharesMean": {"samples_are_independent", "linear_flow_converges"},
        "OverwritesNoise": {"keeps_noise_and_type"},
        "SinglePrecision": {"keeps_noise_and_type"},
        "MissesCount": {"protocol_counts_evaluations"},
    },
    "tracker": {
        "Silent": {"writes_in_its_folder", "continues_its_folder"},
        "Elsewhere": {"writes_in_its_folder"},
        "ClosesOnce": {"close_is_repeatable"},
        "Fussy": {"accepts_bad_numbers"},
        "Overwrites": {"continues_its_folder"},
    },
    "importer": {
        "Inventive": {"refuses_missing_source"},
        "Lenient": {"refuses_other_weights"},
        "Raw": {"refuses_damaged_files"},
        "Trusting": {"unpickles_no_code"},
    },
}

_CONFIGS = {
    "encoder": ("underpaint_demo_encoder.config:ConvConfig", {"width": 16, "patch": 8}),
    "adapter": ("underpaint_demo_adapter.config:LinearConfig", {}),
    "decoder": ("underpaint_demo_decoder.config:ConvConfig", {"width": 16}),
    "backbone": ("underpaint_demo_backbone.config:ConvConfig", {"width": 16, "depth": 2}),
    "loss": ("underpaint_demo_loss.config:CharbonnierConfig", {}),
    "dataset": ("underpaint_demo_dataset.config:GradientsConfig", {"count": 20, "size": 16}),
    "sampler": ("underpaint_demo_sampler.config:MidpointConfig", {"steps": 8}),
    "importer": ("underpaint_demo_importer.config:FlatConfig", {}),
}


_MODULES = {"dataset": "datasets", "encoder": "encoders", "importer": "importers", "loss": "losses"}


def _register(kind, register):
    config, tiny = _CONFIGS.get(kind, (None, {}))
    for name in MUTANTS[kind]:
        register(
            f"mutant/{name}",
            f"tests.testing.mutant_{_MODULES.get(kind, 'classes')}:{name}",
            config=config,
            tiny=tiny,
            takes_weights=kind == "encoder",
            summary="A mutant",
        )


@underpaint.hookimpl
def register_encoders(register):
    _register("encoder", register)


@underpaint.hookimpl
def register_adapters(register):
    _register("adapter", register)


@underpaint.hookimpl
def register_decoders(register):
    _register("decoder", register)


@underpaint.hookimpl
def register_backbones(register):
    _register("backbone", register)


@underpaint.hookimpl
def register_conditioners(register):
    _register("conditioner", register)


@underpaint.hookimpl
def register_losses(register):
    _register("loss", register)


@underpaint.hookimpl
def register_metrics(register):
    _register("metric", register)


@underpaint.hookimpl
def register_datasets(register):
    _register("dataset", register)


@underpaint.hookimpl
def register_samplers(register):
    _register("sampler", register)


@underpaint.hookimpl
def register_trackers(register):
    _register("tracker", register)


@underpaint.hookimpl
def register_importers(register):
    _register("importer", register)
