"""For the tests alone: drives the extension inside of the webui, and looks at the model's very memory."""

import functools
import gc
import hashlib
import os
import random
import sys
import threading
import time
import traceback

import torch
from fastapi.responses import JSONResponse
from modules import (
    call_queue,
    processing,
    script_callbacks,
    script_loading,
    sd_models,
    sd_vae_approx,
    shared,
    ui_common,  # noqa: F401
)

try:
    from backend.diffusion_engine.sd15 import StableDiffusion
    from huggingface_guess import model_list
except ImportError:
    FORGE = False
else:
    FORGE = True

    class Small(model_list.SD15):
        """The embedded model, which Forge would not know by its shapes."""

        huggingface_repo = os.environ["PROBE_DESCRIBED"]
        unet_config = {**model_list.SD15.unet_config, "context_dim": 192, "model_channels": 64}
        unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    model_list.models.insert(0, Small)
    StableDiffusion.matched_guesses.append(Small)

if "PROBE_OPEN_CLIP" in os.environ:
    # the second text encoder of the embedded model in SDXL's shape, which open_clip knows neither size nor words of
    import open_clip
    from modules import sd_hijack_open_clip
    from transformers import CLIPTokenizer

    class Words:
        def __init__(self, folder):
            self._own = CLIPTokenizer.from_pretrained(folder)
            known = self._own.get_vocab()
            self.encoder = known | {"<start_of_text>": self._own.bos_token_id, "<end_of_text>": self._own.eos_token_id}

        def encode(self, text):
            return self._own(text, add_special_tokens=False).input_ids

    open_clip.add_model_config(os.environ["PROBE_OPEN_CLIP"])
    sd_hijack_open_clip.tokenizer = Words(os.environ["PROBE_OPEN_CLIP"])

# the webui's own rough picture of latents, which breaks off on those in half precision
rough = sd_vae_approx.cheap_approximation
sd_vae_approx.cheap_approximation = lambda sample: rough(sample.float())

SECONDS = {}
COMMENTS = []
inner_comment = processing.StableDiffusionProcessing.comment


def comment(p, text):
    COMMENTS.append(text)
    inner_comment(p, text)


processing.StableDiffusionProcessing.comment = comment


def timed(inner, label):
    """Notes the processor time of the call, by what ``label`` makes of its first argument.

    Without a collection of the whole webui's garbage, which falls on anybody by chance.
    """

    @functools.wraps(inner)
    def outer(*args, **kwargs):
        gc.disable()
        began = time.thread_time()
        try:
            return inner(*args, **kwargs)
        finally:
            SECONDS[label(*args)] = time.thread_time() - began
            gc.enable()

    return outer


@functools.wraps(script_callbacks.add_callback)
def add_callback(callbacks, fun, *, name=None, category="", **kwargs):
    if name == "forget_concept":
        fun = timed(fun, lambda *_: category)
    return added(callbacks, fun, name=name, category=category, **kwargs)


# this folder's scripts run before the extension's, and have by now imported what every webui does in the end
script_loading.load_module = timed(script_loading.load_module, lambda path: os.path.basename(path))
added, script_callbacks.add_callback = script_callbacks.add_callback, add_callback


def neighbour(arguments):
    """What a neighbouring extension with a `core` of its own says."""
    import core

    return {"who": core.WHO}


def ours(name=""):
    """The extension's package, whatever its name is here."""
    found = next(key for key in sys.modules if key.startswith("forget_concept_") and key.endswith(".sd_webui_ext"))
    __import__(found + name)
    return sys.modules[found + name]


def core(name):
    package = ours().__name__.rpartition(".")[0]
    __import__(f"{package}.core.{name}")
    return sys.modules[f"{package}.core.{name}"]


def host():
    return ours().running()


def unet():
    if FORGE:
        with torch.inference_mode():
            return sd_models.forge_model_reload()[0].forge_objects.unet.model.diffusion_model
    return shared.sd_model.model.diffusion_model


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest(parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
    return digest.hexdigest()[:24]


def state(arguments):
    """Hashes of the UNet's memory as it is, and of flags, identities and hooks."""
    flags = []
    for name, part in unet().named_modules():
        flags += [name, part.training, len(part._forward_hooks), len(part._forward_pre_hooks), "forward" in vars(part)]
        flags += [vars(part).get("checkpoint"), vars(part).get("padding_mode")]
    for name, tensor in [*unet().named_parameters(), *unet().named_buffers()]:
        flags += [name, tensor.requires_grad, tensor.device, tensor.dtype, tensor.grad is not None]
        # Forge puts other parameters in their place itself
        flags += [] if FORGE else [id(tensor), tensor.data_ptr()]
    weights = sorted(unet().state_dict().items())
    return {
        "weights": _digest(x for name, tensor in weights for x in (name, _bytes(tensor))),
        "state": _digest(flags),
        "networks": [net.name for net in sys.modules["networks"].loaded_networks],
        "hypernetworks": len(getattr(shared, "loaded_hypernetworks", [])),
        "job": shared.state.job,
        "locked": not call_queue.queue_lock.acquire(blocking=False) or call_queue.queue_lock.release() is not None,
    }


def request_of(arguments):
    concept, request = core("request.concept"), core("request.request")
    asked = tuple(
        concept.Concept(name, "object", replacement)
        for name, replacement in arguments.get("concepts", [["star", "circle"]])
    )
    return request.ForgetRequest(
        asked,
        preserve=tuple(arguments.get("preserve", ["moon", "heart"])),
        method=arguments.get("method", "uce"),
        settings=arguments.get("settings", {}),
    )


def forget(arguments):
    """Train in place and save the patch, as the tab does; what it gave as figures."""
    fit, kohya = core("methods.fit").fit, core("formats.kohya")
    plan = core("methods.registry").plan_request(request_of(arguments))
    began = time.perf_counter()
    steps = []
    with host().job("probe") as progress:

        def told(event):
            steps.append((event.step, event.total, event.loss))
            if len(steps) == arguments.get("interrupt_after"):
                shared.state.interrupt()
            if len(steps) == arguments.get("raise_after"):
                raise RuntimeError("the trap went off")
            progress(event)
            shown.append((shared.state.job, shared.state.sampling_steps))

        shown = []
        with host().latent_diffusion() as model:
            facts = {"hash": model.model_hash, "layer": model.text.layer, "shape": model.latent_shape}
            facts |= {"guidance": model.guidance, "prediction": model.prediction_type}
            facts |= {"requires_grad": any(p.requires_grad for p in model.unet.parameters())}
            patch = fit(model, plan, told)
    if arguments.get("name"):
        kohya.save(patch, host().lora_folder() / (arguments["name"] + ".safetensors"))
        host().refresh_patches()
    return facts | {
        "layers": len(patch),
        "norm": sum(float(f.delta().norm()) for f in patch.factors.values()),
        "losses": [loss for _, _, loss in steps if loss is not None],
        "shown": shown,
        "seconds": time.perf_counter() - began,
    }


def texts(arguments):
    """How the core reads prompts, and how the webui itself does."""
    from modules.prompt_parser import SdConditioning

    with host().job("probe"), host().latent_diffusion() as model:
        states = model.text.encode(arguments["prompts"])
        ids = [model.text.token_ids(prompt) for prompt in arguments["prompts"]]
        phrases = [model.text.phrase_ids(prompt) for prompt in arguments["prompts"]]
        with torch.no_grad():
            plain = shared.sd_model.get_learned_conditioning(SdConditioning(arguments["plain"]))
        plain = plain["crossattn"] if isinstance(plain, dict) else plain
    return {
        "ids": ids,
        "phrases": phrases,
        "shape": list(states.hidden.shape),
        "same": [torch.equal(a, b[: len(a)]) for a, b in zip(states.hidden, plain, strict=True)],
    }


def compare(arguments):
    """The core's sampler on the loaded model: a digest of its latents, and gradients against finite differences."""
    with host().job("probe"), host().latent_diffusion() as model:
        latents = model.sample(["a photo of a red star"], [1], steps=2, guidance=2.5)
        states = model.text.encode(["a photo of a red star"])
        noise, time_step = model.initial_noise([1]).to(model.device), torch.tensor([500])
        site = model.survey.sites[0]
        delta = torch.zeros(site.projection("to_k").weight.shape, requires_grad=True)
        hook = site.projection("to_k").register_forward_hook(lambda m, a, out: out + a[0] @ delta.T.to(out.dtype))
        try:
            loss = model.predict_noise(noise, time_step, states).square().sum()
            loss.backward()
            step = delta.grad / delta.grad.norm()
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    delta.copy_(sign * arguments.get("step", 1e-2) * step)
                    found.append(float(model.predict_noise(noise, time_step, states).double().square().sum()))
        finally:
            hook.remove()
        told = {}
        if arguments.get("vae", True):
            again = model.vae.encode(model.decode(latents))
            told["round_trip"] = float((again.float() - latents).norm() / latents.norm())
    return told | {
        "latents": latents.flatten().tolist(),
        "gradient": float(delta.grad.norm()),
        "slope": (found[0] - found[1]) / (2 * arguments.get("step", 1e-2)),
    }


def apply(arguments):
    kohya = core("formats.kohya")
    patch = kohya.load(host().lora_folder() / (arguments["patch"] + ".safetensors"))
    low_rank = core("patch.low_rank").LowRank
    factors = dict(patch.factors)
    last = list(factors)[-1]
    if arguments.get("wrong") == "layers":
        factors[last] = low_rank(torch.ones(3, 1), torch.ones(1, 3))
    if arguments.get("wrong") == "nan":
        factors[last] = factors[last].scaled(float("inf"))
    patch = core("patch.patch").Patch(factors, patch.metadata)
    host().apply(arguments.get("name", arguments["patch"]), patch, float(arguments.get("strength", 1.0)))
    return active({})


def remove(arguments):
    host().remove(arguments["name"])
    return active({})


def active(arguments):
    began = time.perf_counter()
    found = [[a.name, a.strength, a.in_force] for a in host().active()]
    return {"active": found, "seconds": time.perf_counter() - began}


def model(arguments):
    found = host().model()
    return {"title": found.title, "family": found.family, "key": found.key, "object": id(shared.sd_model)}


def spoil(arguments):
    """Changes weights behind everybody's back: of all layers with a patch, or of the first one."""
    with torch.inference_mode():
        sites = core("models.unet").survey_unet(unet()).sites
        for site in sites[: arguments.get("sites", len(sites))]:
            for which in ("to_k", "to_v"):
                site.projection(which).weight.add_(0.01)
    return {}


def damage(arguments):
    """Puts a NaN into a weight of a part of the checkpoint: its file is damaged there; the weight's name."""
    parts = {"unet": unet, "text": text_module, "vae": vae_module}
    with torch.inference_mode():
        name, weight = next((n, p) for n, p in parts[arguments["part"]]().named_parameters() if p.ndim > 1)
        weight.view(-1)[0] = torch.nan
    return {"name": name}


def text_module():
    if FORGE:
        return shared.sd_model.text_processing_engine.text_encoder
    return shared.sd_model.cond_stage_model


def vae_module():
    if FORGE:
        return shared.sd_model.forge_objects_original.vae.first_stage_model
    return shared.sd_model.first_stage_model


def checkpoint(arguments):
    """Chooses another checkpoint, as the menu does."""
    info = next(i for i in sd_models.checkpoints_list.values() if i.name_for_extra == arguments["name"])
    if FORGE:
        from modules_forge import main_entry

        main_entry.checkpoint_change(info.title)
        if arguments.get("load", True):  # else Forge does so with the next picture
            sd_models.forge_model_reload()
    else:
        if arguments.get("in_place"):  # as where both have the same configuration: the same object takes its weights
            shared.sd_model.used_config = os.path.splitext(info.filename)[0] + ".yaml"
        shared.opts.sd_model_checkpoint = info.title
        with call_queue.queue_lock:
            sd_models.reload_model_weights(info=info)
    return {}


def reload_checkpoint(arguments):
    """The weights from the disk again."""
    if FORGE:
        sd_models.model_data.forge_hash = ""
        sd_models.forge_model_reload()
    else:
        sd_models.reload_model_weights(forced_reload=True)
    return {}


def cycles(arguments):
    """Apply and remove in random order, with random pictures in between; what the webui itself would draw."""
    rng = random.Random(arguments["seed"])
    kohya = core("formats.kohya")
    loaded = {name: kohya.load(host().lora_folder() / f"{name}.safetensors") for name in arguments["patches"]}
    applied = removed = drawn = 0
    while applied < arguments["count"]:
        names = [a.name for a in host().active()]
        if names and rng.random() < 0.5:
            host().remove(rng.choice(names))
            removed += 1
        else:
            host().apply(rng.choice(list(loaded)), rng.choice(list(loaded.values())), rng.choice([0.3, 1.0, -0.5]))
            applied += 1
        assert all(a.in_force for a in host().active())
        if rng.random() < 0.12:
            tags = rng.sample(arguments["tags"], rng.randint(0, len(arguments["tags"])))
            prompt = "a star " + " ".join(f"<lora:{tag}:{rng.choice([0.5, 1])}>" for tag in tags)
            with call_queue.queue_lock:
                p = processing.StableDiffusionProcessingTxt2Img(
                    sd_model=shared.sd_model, prompt=prompt, steps=1, width=128, height=128, cfg_scale=1.0, seed=1,
                    sampler_name="Euler", do_not_save_samples=True, do_not_save_grid=True,
                )  # fmt: skip
                processing.process_images(p)
                p.close()
            drawn += 1
            assert all(a.in_force for a in host().active())
    for name in rng.sample([a.name for a in host().active()], len(host().active())):
        host().remove(name)
    return {"applied": applied, "removed": removed, "drawn": drawn, "active": len(host().active())}


def hypernetwork(arguments):
    """Puts one on, as `<hypernet:…>` does, or takes them off."""
    if not arguments["on"]:
        shared.loaded_hypernetworks = []
        return {}
    from modules.hypernetworks.hypernetwork import Hypernetwork

    made = Hypernetwork("probe", [192], [1, 1], activation_func="linear", weight_init="Normal")
    torch.manual_seed(0)
    for layers in made.layers.values():
        for layer in layers:
            layer.to(next(unet().parameters()).device)
            for weight in layer.parameters():
                weight.data.normal_(std=0.3)
    shared.loaded_hypernetworks = [made]
    return {}


def optimization(arguments):
    """Switches the attention optimisation, as the settings page does; what is there to choose from."""

    from modules import sd_hijack

    if "name" in arguments:
        shared.opts.cross_attention_optimization = arguments["name"]
        sd_hijack.model_hijack.undo_hijack(shared.sd_model)
        sd_hijack.model_hijack.hijack(shared.sd_model)
    return {
        "names": [option.title() for option in sd_hijack.optimizers if option.is_available()],
        "now": sd_hijack.current_optimizer.name if sd_hijack.current_optimizer else None,
    }


def options(arguments):
    for key, value in arguments.items():
        shared.opts.set(key, value, run_callbacks=False)
    return {}


def reload_ui(arguments):
    shared.state.request_restart()
    return {}


def imported(arguments):
    """Which of the package's modules there are, what their host is, and what they cost at the start."""
    names = [name for name in sys.modules if name.startswith("forget_concept_")]
    return {
        "names": sorted(names),
        "host": [host().name, host().version],
        "method": host().option("forget_concept_method"),
        "id": id(host()),
        "seconds": SECONDS,
        "lora_folder": str(host().lora_folder()),
        "data_folder": str(host().data_folder()),
    }


def pasted(arguments):
    """What Send to txt2img makes of an infotext, for the fields of the always-on script."""
    from modules import infotext_utils, scripts

    parameters = infotext_utils.parse_generation_parameters(arguments["infotext"])
    found = {}
    for _, key in scripts.scripts_txt2img.infotext_fields:
        if callable(key) and getattr(key, "__name__", "").startswith("_pasted"):
            answer = key(parameters)
            found[key.__name__] = answer.get("value") if isinstance(answer, dict) else str(answer)
    return found


def transformer(arguments):
    """Asks for the loaded model while the host's own class of a diffusion transformer is in the UNet's place."""
    if FORGE:
        from backend.nn.flux import IntegratedFluxTransformer2DModel

        model = sd_models.forge_model_reload()[0]
        holder = model.forge_objects_original.unet.model
        made = IntegratedFluxTransformer2DModel(4, 8, 8, 16, 2.0, 2, 1, 1, [2, 2, 4], 10_000, True, True)
    else:
        from modules.models.sd3.mmdit import MMDiT

        model = shared.sd_model
        holder = model.model
        made = MMDiT(depth=1, pos_embed_max_size=4, num_patches=16, adm_in_channels=8)
    known, unet_of_it = host()._residents.pop(model, None), holder.diffusion_model
    holder.diffusion_model = made
    try:
        return {"title": host().model().title}
    finally:
        holder.diffusion_model = unet_of_it
        host()._residents.pop(model, None)
        if known is not None:
            host()._residents[model] = known


def comments(arguments):
    """What the webui was to show below pictures since this was last asked."""
    found, COMMENTS[:] = list(COMMENTS), []
    return {"comments": found}


def plot_axes(arguments):
    """The labels of the axes of txt2img's X/Y/Z plot, in its order."""
    from modules import scripts

    plot = next(one for one in scripts.scripts_txt2img.selectable_scripts if one.title() == "X/Y/Z plot")
    return {"labels": [option.label for option in plot.current_axis_options]}


def queued(arguments):
    """Begins a long job in a thread, so that a test may ask for a picture meanwhile."""
    ended = []

    def work():
        with host().job("probe"), host().latent_diffusion() as model:
            time.sleep(arguments["seconds"])
            model.sample(["a star"], [1], steps=1)
        ended.append(time.time())

    threading.Thread(target=work).start()
    time.sleep(0.2)
    queued.ended = ended
    return {}


def ended(arguments):
    return {"at": queued.ended[0] if queued.ended else None}


WORK = [
    neighbour, state, forget, texts, compare, apply, remove, active, model, spoil, damage, checkpoint,
    reload_checkpoint, cycles, hypernetwork, optimization, options, reload_ui, imported, pasted, comments, transformer,
    plot_axes, queued, ended,
]  # fmt: skip


def routes(demo, app):
    def add(work):
        @app.post(f"/probe/{work.__name__}")
        def answer(arguments: dict):
            try:
                return work(arguments)
            except BaseException as error:
                traceback.print_exc()
                return JSONResponse({"kind": type(error).__name__, "words": str(error)}, 500)

    for work in WORK:
        add(work)


script_callbacks.on_app_started(routes)
