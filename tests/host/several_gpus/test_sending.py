"""What cannot be sent is named and runs on one GPU, with the same picture; what can be comes out as it went in."""

from __future__ import annotations

import functools
import re
import shutil

import pytest
import torch

from testing.measure import relative_error

from .support import EXACT, Run, with_lora

RUN = Run((1, 16, 2, 6, 10))


def _wrapper(kind):
    def put(model):
        from comfy.patcher_extension import WrappersMP

        def halving(executor, *args, **kwargs):
            return executor(*args, **kwargs) * 0.5

        model.add_wrapper_with_key(getattr(WrappersMP, kind), "foreign", halving)

    return put


def _replacing(model):
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)


def _weight(model):
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    model.add_patches({(key, None, lambda weight: weight * 1.5): ("diff", (torch.ones(160, 160) / 40,))}, 1.0)


def _forward(model):
    network = model.model.diffusion_model
    model.add_object_patch("diffusion_model.blocks.0", network.blocks[0])


FOREIGN = {
    "wrapper .*halving": _wrapper("DIFFUSION_MODEL"),
    "the wrapper .*halving": _wrapper("APPLY_MODEL"),
    "patch that replaces dit blocks": _replacing,
    "the patch .*lambda": lambda model: model.set_model_attn1_patch(lambda kwargs: kwargs["x"] * 0.9),
    "model function wrapper": lambda model: model.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * 0.5
    ),
    "changes the weight by a function": _weight,
    "object patch on diffusion_model.blocks.0": _forward,
    "attention of .*_foreign_attention": lambda model: model.model_options["transformer_options"].update(
        optimized_attention_override=_foreign_attention
    ),
    "my_option": lambda model: model.model_options["transformer_options"].update(my_option=object()),
}


def _foreign_attention(function, *args, **kwargs):
    return function(*args, **kwargs) * 1.1


@pytest.mark.parametrize("words", FOREIGN)
def test_what_cannot_be_sent_says_so_by_name_and_runs_here(load, divide, parts, words):
    model = load("wan")
    FOREIGN[words](model)
    assert relative_error(RUN.sample(divide(model)), RUN.sample(model)) <= EXACT
    assert parts == []
    (sentence,) = divide.said
    assert re.search(f"Several GPUs: .*{words}.* cannot be sent to other GPUs", sentence)


class _Halving(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 0.5


def _weaker(original):
    @functools.wraps(original)
    def weaker(*args, **kwargs):
        return original(*args, **kwargs) * 0.9

    return weaker


@pytest.mark.parametrize("kind", ["hook", "forward", "class", "layer"])
def test_code_of_another_node_at_a_layer_is_named_and_runs_here(load, divide, parts, monkeypatch, kind):
    """A hook, and three ways to put another forward in the place of core's."""
    model = load("wan")
    attention = model.model.diffusion_model.blocks[1].self_attn
    named, hooks = f"the forward of blocks.1.self_attn, which is from {__name__},", []
    if kind == "hook":
        hooks.append(attention.q.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,)))
        named = "the hook .*lambda.* on blocks.1.self_attn.q"
    elif kind == "forward":
        monkeypatch.setattr(attention, "forward", _weaker(attention.forward))
    elif kind == "class":
        monkeypatch.setattr(type(attention), "forward", _weaker(type(attention).forward))
        named = named.replace("1", "0")
    else:
        monkeypatch.setitem(attention._modules, "o", _Halving(attention.o))
        named = named.replace("self_attn", "self_attn.o")
    try:
        assert relative_error(RUN.sample(divide(model)), RUN.sample(model)) <= EXACT
    finally:
        for hook in hooks:
            hook.remove()
    assert parts == []
    (sentence,) = divide.said
    assert re.search(f"Several GPUs: {named} cannot be sent to other GPUs", sentence)


@pytest.mark.parametrize("named", FOREIGN)
def test_no_worker_starts_for_it(host, load, named):
    devices = (torch.device("cpu:0"), torch.device("cpu"))
    model = load("wan")
    FOREIGN[named](model)
    host.dividing.divide(model, devices, "sequence")
    assert host.dividing._TEAMS[devices].workers == []


def test_a_model_of_another_kind_runs_here(host, load, divide, parts):
    model = load("wan")

    class Other(type(model.model.diffusion_model)):
        pass

    model.model.diffusion_model.__class__ = Other
    try:
        assert RUN.sample(divide(model)).isfinite().all()
    finally:
        model.model.diffusion_model.__class__ = Other.__bases__[0]
    assert parts == []
    assert ["of the kind Other" in sentence for sentence in divide.said] == [True]


def test_a_model_that_no_file_holds_runs_here(load, divide, parts):
    model = load("wan")
    model.cached_patcher_init = None
    RUN.sample(divide(model))
    assert parts == []
    assert ["has loaded from a file" in sentence for sentence in divide.said] == [True]


@pytest.mark.parametrize("patched", [False, True])
def test_weights_that_were_changed_in_place_run_here(host, divide, parts, patched):
    """The other GPUs would have those of the file; a LoRA on them is no such change."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(host.folder / "wan.safetensors"))
    model.model.diffusion_model.blocks[0].ffn[0].weight.data[0, 0] += 3.0
    model = with_lora(model, 0.5) if patched else model
    assert relative_error(RUN.sample(divide(model)), RUN.sample(model)) <= EXACT
    assert parts == []
    assert ["weights that another node has changed" in sentence for sentence in divide.said] == [True]


def test_cores_choice_of_attention_and_its_loader_go_along(host, divide, parts):
    import comfy.sd
    from comfy.ldm.modules.attention import get_attention_function

    model = comfy.sd.load_diffusion_model(str(host.folder / "wan.safetensors"))
    model.set_model_optimized_attention(get_attention_function("sub_quad"))
    assert relative_error(RUN.sample(divide(model)), RUN.sample(model)) <= EXACT
    assert set(parts) == {"all"}
    assert divide.said == []


def test_a_model_patched_as_before_is_not_sent_again(load, divide, workers, monkeypatch):
    model = with_lora(load("wan"), 0.5)
    RUN.sample(divide(model))
    described = []
    monkeypatch.setattr(workers().workers[0], "send", _noting(workers().workers[0].send, described))
    RUN.sample(divide(model.clone()))
    assert "model" not in described
    RUN.sample(divide(with_lora(model, 0.1)))
    assert described.count("model") == 1


def _noting(send, described):
    def noting(message, tensors=()):
        described.append(message["do"])
        send(message, tensors)

    return noting


def test_a_worker_does_not_look_for_nan_where_comfyui_does(host, monkeypatch, tmp_path):
    looked = []
    monkeypatch.setattr("lowbit.ops.finite._look", looked.append)
    path = shutil.copy(host.folder / "wan.safetensors", tmp_path / "a.safetensors")
    host.model_copy.Copies().load_file("a model", ["lowbit", str(path)])
    assert looked == []
    path = shutil.copy(host.folder / "wan.safetensors", tmp_path / "b.safetensors")
    host.loading.load_diffusion_model(str(path))
    assert looked


def test_a_file_is_loaded_once_and_goes_with_the_last_model_of_it(host, monkeypatch, tmp_path):
    """Also one that is loaded before its model is sent, while another model goes."""
    loaded = []
    monkeypatch.setattr(host.model_copy, "LOADERS", {"any": lambda path: loaded.append(path) or object()})
    path, copies = tmp_path / "a.safetensors", host.model_copy.Copies()
    path.touch()
    copies.load_file("one", ["any", str(path)])
    copies.forget("another")
    for model in ("one", "two"):
        copies.load_file(model, ["any", str(path)])
    copies.forget("one")
    copies.load_file("two", ["any", str(path)])
    assert len(loaded) == 1
    copies.forget("two")
    copies.load_file("three", ["any", str(path)])
    assert len(loaded) == 2


def test_a_memory_limit_goes_along(host, load, monkeypatch):
    session = host.model_copy.session()
    monkeypatch.setattr(session.limit, "nbytes", 12345)
    model = load("wan")
    options = model.model_options["transformer_options"]
    assert host.model_copy.describe(model, options)["limit"] == 12345
    assert 12345 in host.model_copy.version(model, options)


def test_plain_data_comes_out_as_it_went_in(core_modules):
    from lowbit.host.several_gpus import plain_data

    value = {
        "a": [1, 2.5, None, True, "text"],
        "b": (torch.randn(3, 5), {"c": torch.arange(4), "d": torch.bfloat16}),
        "e": torch.randn(0, 2),
        "f": torch.randn(2, 2).bfloat16(),
        # As some samplers make sigmas: contiguous, whatever its stride.
        "g": torch.randn(()).expand(1),
    }
    encoded, tensors = plain_data.take_apart(value)
    read, empty = plain_data.from_json(plain_data.as_json(encoded, tensors), torch.device("cpu"))
    for ours, theirs in zip(empty, tensors, strict=True):
        plain_data.as_bytes(ours).copy_(plain_data.as_bytes(theirs))
    back = plain_data.put_together(read, empty)
    assert str(back) == str(value)
    assert type(back["b"]) is tuple


@pytest.mark.parametrize("foreign", [object(), {1, 2}, {3: "a key that is no name"}, lambda: None, b"bytes"])
def test_what_is_not_plain_is_named(core_modules, foreign):
    from lowbit.host.several_gpus import plain_data

    with pytest.raises(plain_data.NotPlainError, match=r"here\.there"):
        plain_data.take_apart({"here": {"there": [foreign]}})
