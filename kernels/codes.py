"""The table of diagnostic codes: what can go wrong, why it happens, what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False, repr=False)
class Diagnostic:
    """One thing that can go wrong: a stable code, a title, why it happens, what to do.

    ``nearest`` is the form nearest to the refused one that is accepted, where the code is about a form.
    """

    code: str
    title: str
    explanation: str
    hint: str
    since: str = "0.1.0"
    nearest: str = ""


_ALL = [
    # AR1xx: options, inputs, capture
    Diagnostic(
        "AR101",
        "unknown option",
        "An option, keyword or file field with this name does not exist. Options are never ignored, because an "
        "ignored one changes what runs without a word.",
        "use one of the names listed above",
    ),
    Diagnostic(
        "AR102",
        "option has a wrong value",
        "The option exists, but not with this value or type.",
        "use one of the values listed above",
    ),
    Diagnostic(
        "AR103",
        "model cannot be loaded",
        "MODEL is a folder in the transformers layout (safetensors or GGUF), a .gguf file, a .pt2 file, or "
        "`package.module:function` where the function returns a model or (model, example inputs).",
        "check the path; for a function, check that its module can be imported from here",
    ),
    Diagnostic(
        "AR104",
        "example inputs do not run",
        "The model itself, untouched, raised an error on the example inputs.",
        "call model(*example_inputs) yourself until it works, then pass the same inputs",
    ),
    Diagnostic(
        "AR105",
        "model cannot be captured",
        "torch.export could not trace the model on these inputs: it has control flow that depends on data, or "
        "returns a type that torch.export does not know.",
        "for transformers models pass use_cache=False; torch.nn.TransformerEncoder and Decoder need is_causal= beside "
        "a mask, or they look at the mask's values; otherwise remove what the message names",
    ),
    Diagnostic(
        "AR106",
        "required package is missing",
        "This function needs an optional package that is not installed.",
        "install the extra named above",
    ),
    Diagnostic(
        "AR107",
        "graph under a torch.func transform",
        "The graph calls vmap, grad or another transform of torch.func. Such a graph cannot be traced once more into "
        "operators: what the transform wraps would become a constant.",
        "compile the module inside the transform, or write the batch dimension out",
    ),
    # AR2xx: match and proof
    Diagnostic(
        "AR201",
        "no attention found",
        "The captured graph holds no softmax between two contractions and no fused attention call.",
        "run `attnrewrite explain MODEL` to see every softmax and why it is not attention",
    ),
    Diagnostic(
        "AR202",
        "not attention",
        "A softmax was found, but it is not fed by a contraction of two activations, or its result is not "
        "contracted with values along the same axis: a router, a classifier, a pooling.",
        "nothing to do; the site stays as it is",
        nearest="softmax(query @ key.mT) @ value: both products of two activations, along one axis",
    ),
    Diagnostic(
        "AR203",
        "unsupported form of scores",
        "Between the query-key product and the softmax stands an operation that the normal form of scores does "
        "not cover, so that replacing the site could change its meaning.",
        "the site stays as it is; the operation is named above",
        nearest="softmax(scale * (query @ key.mT), soft-capped, then biased and masked) @ value",
    ),
    Diagnostic(
        "AR204",
        "site crosses an autocast or grad-mode region",
        "Parts of one attention run under different autocast or grad modes; moving them into one operator would "
        "change dtypes or gradients.",
        "put the whole attention into one region",
        nearest="the same attention with both products and the softmax inside one autocast and grad-mode region",
    ),
    Diagnostic(
        "AR205",
        "certificate failed",
        "The matched subgraph and its specification disagree in float64 on test inputs. The match is not used.",
        "the site stays as it is; where it is ordinary attention on every input, please report it with "
        "`attnrewrite explain --format json`",
    ),
    Diagnostic(
        "AR206",
        "attention dropout is active",
        "The exact rewrite does not replace a site that draws random numbers, because a fused operator draws them "
        "in another order.",
        "set the model's attention dropout to 0, or call model.eval()",
        nearest="the same attention with dropout 0, as after model.eval()",
    ),
    Diagnostic(
        "AR207",
        "a matched value is changed in place",
        "A query, key, value, mask or score of this site is written in place, so the moment of reading it matters.",
        "write the update out of place",
        nearest="the same update out of place: q = q * 2 in place of q.mul_(2)",
    ),
    Diagnostic(
        "AR208",
        "pattern cannot be registered",
        "A pattern needs a name of its own and a function that runs at any sizes and computes what torch's "
        "scaled_dot_product_attention computes with the scale and is_causal given. That is proved in float64 when it "
        "is registered, also for rows that see no key.",
        "see attnrewrite.register_pattern",
    ),
    # AR3xx: variants
    Diagnostic(
        "AR301",
        "unknown variant",
        "No variant of this name is registered.",
        "run `attnrewrite variants` for the list",
    ),
    Diagnostic(
        "AR302",
        "unknown config key",
        "The variant's config has no field of this name. Unknown fields are errors because dropping one changes "
        "the maths.",
        "use one of the fields listed above",
    ),
    Diagnostic(
        "AR303",
        "config field has a wrong value",
        "The field exists, but not with this value or type.",
        "see `attnrewrite variants NAME` for fields and defaults",
    ),
    Diagnostic(
        "AR304",
        "variant needs parameters",
        "This variant adds parameters to the model. A compile backend cannot add parameters, because the inputs of "
        "its graph are fixed before it is called.",
        "call attnrewrite.convert(model, config, example_inputs=...) first, then compile without naming a variant",
    ),
    Diagnostic(
        "AR305",
        "model is already converted",
        "The model carries a conversion. Converting twice would stack two variants on the same layers.",
        "call attnrewrite.restore(model) first, or convert the original model",
    ),
    Diagnostic(
        "AR306",
        "targets match no layer",
        "No attention layer of the model has a path that matches the given pattern.",
        "patterns are globs on layer paths, e.g. 'model.layers.*.self_attn'",
    ),
    Diagnostic(
        "AR307",
        "variant is not defined here",
        "The variant's definition does not cover this kind of attention.",
        "leave this layer out with exclude=, or choose another variant for it",
        nearest="an attention as the variant defines it: see docs/variants.md",
    ),
    Diagnostic(
        "AR308",
        "converted model ran without the backend",
        "The model was converted, but this call did not go through the attnrewrite backend. Running on would "
        "silently compute ordinary attention.",
        "call model.compile(backend='attnrewrite') and then the model itself: copies and unpickled models lose their "
        "compilation, and model.forward(...) or a part of the model does not use it",
    ),
    Diagnostic(
        "AR309",
        "converted layer has no attention in this graph",
        "The layer's marker was captured, but no attention of that layer was recognised in the same graph; a graph "
        "break may lie between them. Inside DistributedDataParallel torch cuts the graph of a model at the edges of "
        "its buckets of gradients, and such an edge may lie there, too.",
        "run with TORCH_LOGS=graph_breaks to see where the graph breaks",
    ),
    Diagnostic(
        "AR310",
        "model is not converted",
        "There is nothing to restore or to save: the model carries no conversion.",
        "call attnrewrite.convert(model, config, example_inputs=...) first",
    ),
    Diagnostic(
        "AR311",
        "attribute name is taken",
        "The layer already has an attribute of the variant's name, so the new parameters cannot be registered.",
        "rename the model's attribute",
    ),
    Diagnostic(
        "AR312",
        "variant was asked for and not applied",
        "A variant changes meaning, so a graph in which it cannot be applied is an error, never a silent fall-back.",
        "the sites and reasons are listed above; use exclude= for layers that should stay as they are",
    ),
    Diagnostic(
        "AR313",
        "converted model differs from the original",
        "The config promises the same function at the start, but the outputs on the example inputs differ by more "
        "than rounding. The model was restored.",
        "this is a defect of this library: please report it with the model's config",
    ),
    Diagnostic(
        "AR314",
        "variant cannot be registered",
        "A variant needs a name of its own, a config class that carries that name, and a rewrite rule.",
        "see docs/adding_a_variant.md",
    ),
    Diagnostic(
        "AR315",
        "converted layer is not calibrated",
        "The variant's state is made from what the layer sees, and nothing was shown to it. Running on would compute "
        "something arbitrary.",
        "call attnrewrite.calibrate(model, batches), or run `attnrewrite calibrate MODEL OUT`; or train: the first "
        "batch in train mode sets the state",
    ),
    Diagnostic(
        "AR316",
        "nothing to calibrate",
        "Calibration runs a converted model on batches of real inputs. No layer of this model learns from them, or "
        "the batches did not reach a layer that does.",
        "convert the model to a variant that is calibrated, and pass batches that run its converted layers",
    ),
    Diagnostic(
        "AR320",
        "equal queries and keys lose direction",
        "With form='symmetric' the score of a pair of tokens is the same both ways, and a token scores highest with "
        "itself among those of its length. The paper tested it in encoders only; in causal layers and with rotary "
        "embedding it takes away what they tell apart.",
        "use form='pairwise', or measure what is lost",
    ),
    Diagnostic(
        "AR321",
        "no shared projection is close enough",
        "Queries and keys of these layers are too different for one projection: the best one has a larger relative "
        "error of the scores than max_error. They stay as they are; where all layers do, nothing is converted.",
        "take fit='data', which has smaller errors on what the layers see, or raise max_error (1 converts every layer) "
        "and train afterwards",
    ),
    Diagnostic(
        "AR322",
        "original weights are not at hand",
        "The conversion removed projections, and the model was loaded from files that hold only what is left.",
        "load the original model instead",
    ),
    Diagnostic(
        "AR323",
        "cache does not hold what the variant needs",
        "A converted layer may need more of earlier tokens than their keys and values, such as the votes they have "
        "received. This cache has not kept it, or cannot.",
        "start from an empty DynamicCache or StaticCache, such as generate makes by itself, or pass use_cache=False",
    ),
    Diagnostic(
        "AR324",
        "no layer with selective attention",
        "The memory loss counts the tokens that the layers of a model still need, which only the votes of selective "
        "attention tell.",
        "convert layers with SelectiveConfig or SelectiveSSAConfig, and call the model with inputs that run them",
    ),
    # AR4xx: lowering
    Diagnostic(
        "AR401",
        "no fused implementation",
        "The site is recognised, but no fused operator of torch or of this library computes it; the original "
        "operations stay.",
        "nothing to do; the result is exact either way",
        nearest="a positive scale, biases, sinks of one number per head, and masks that fill with the dtype's lowest "
        "number or -inf",
    ),
    Diagnostic(
        "AR402",
        "arguments do not fit",
        "An attention function was called with tensors whose shapes, dtypes or options do not fit together.",
        "shapes are query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv]",
    ),
    Diagnostic(
        "AR403",
        "no generated kernel",
        "kernels='triton' was asked for, but there is no generated kernel for this variant, these tensors or this "
        "device.",
        "use kernels='auto', which takes kernels where there are any; TRITON_INTERPRET=1 runs them without a GPU",
    ),
    Diagnostic(
        "AR404",
        "already fused",
        "The model calls fused attention itself, and its masks and heads leave nothing to improve; the call stays.",
        "nothing to do",
        nearest="the call as it stands: scaled_dot_product_attention",
    ),
    Diagnostic(
        "AR405",
        "kernel does not fit the device",
        "A generated kernel could be compiled or launched in none of its configurations: each needs more shared memory "
        "or registers than the device has, or triton's compiler failed.",
        "use kernels='reference', and please report the message with the device's name",
    ),
    # AR5xx: tuning and its store
    Diagnostic(
        "AR501",
        "no GPU to tune on",
        "Times mean something on the device that will run the kernels, and this machine has none that triton can use. "
        "Nothing was tuned.",
        "run the command on a machine with the GPU, and share what it finds with `attnrewrite cache push` or a pack",
    ),
    Diagnostic(
        "AR502",
        "kernel was not tuned",
        "No configuration could be compiled, checked and timed, or the device is of a generation without a cost model. "
        "The kernel runs in the configuration that it has without tuning.",
        "see the reason above; `attnrewrite env` shows the device and the versions",
    ),
    Diagnostic(
        "AR511",
        "tuning record is missing",
        "The mode is strict, and no stored record has exactly this key. The fields that differ from the nearest record "
        "are listed above.",
        "tune this kernel on this device, or leave strict out of ATTNREWRITE_AUTOTUNE to run with what is near",
    ),
    Diagnostic(
        "AR512",
        "folder of tuning records cannot be used",
        "The folder is full, read-only, not readable or no folder. What this process tunes is kept in memory and lost "
        "when it ends; nothing else changes.",
        "name a folder that can be written in ATTNREWRITE_CACHE_DIR, or add readonly to ATTNREWRITE_AUTOTUNE",
    ),
    Diagnostic(
        "AR513",
        "tuning records were refused",
        "Records that are truncated, changed, unsigned, of another version or outside the space of configurations are "
        "left aside, as if they were not there.",
        "`attnrewrite cache verify` lists them with their reasons, `attnrewrite cache prune` removes what is broken",
    ),
    Diagnostic(
        "AR514",
        "shared tuning store cannot be used",
        "The store at this address does not answer, answers too slowly, or refuses. A process goes on without it.",
        "check the address in ATTNREWRITE_CACHE_URL, the credentials and the network; `attnrewrite cache push` sends "
        "later what was tuned meanwhile",
    ),
    Diagnostic(
        "AR515",
        "no such tuning record",
        "Keys are named by the first characters of their hash, at least enough to tell them apart.",
        "`attnrewrite cache ls --keys` lists them",
    ),
    # AR6xx: saving and loading
    Diagnostic(
        "AR601",
        "output exists",
        "The output path exists. Nothing is overwritten unless asked for.",
        "choose another path, or pass --overwrite (overwrite=True)",
    ),
    Diagnostic(
        "AR602",
        "file is missing, truncated or of another kind",
        "The file cannot be read as what it should be.",
        "check that the file was copied whole",
    ),
    Diagnostic(
        "AR603",
        "saved conversion does not fit this model",
        "The saved conversion names layers or shapes that the model does not have.",
        "load it into the base model it was made from",
    ),
    Diagnostic(
        "AR604",
        "saved conversion is of an unknown format",
        "The schema version of the file is newer than this library, or the file is not a conversion.",
        "update attnrewrite",
    ),
    Diagnostic(
        "AR605",
        "format cannot hold the program",
        "The model was captured and rewritten, but what writes this format, torch.export.save or torch-mlir, refused "
        "the program, mostly for one operator that it does not know.",
        "export to pt2, which holds every operator of torch, or replace the operator named above in the model",
    ),
    # AR9xx: internal
    Diagnostic(
        "AR901",
        "internal error",
        "A pass failed unexpectedly. For the exact rewrite the original graph runs instead.",
        "please report the message; strict=True turns it into an error with a traceback",
    ),
]

DIAGNOSTICS: dict[str, Diagnostic] = {d.code: d for d in _ALL}
