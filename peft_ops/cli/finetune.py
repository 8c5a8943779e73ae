"""`peft-ops finetune`: one method, one model, one set of data."""

from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import save_adapter, trainable_parameters
from . import embedded
from .data import Split, pack, read_documents
from .device import pick_device, pick_dtype
from .display import make_console, progress
from .errors import UserError
from .files import write_folder, write_json
from .methods import METHODS, Method, Settings, settings_of
from .models import load_model
from .report import environment, loss_chart, summary
from .run_folder import CHECKPOINT, RunFolder
from .tokenizer import BYTE_VOCABULARY, Tokenizer
from .training import Options, Trainer


@dataclass(frozen=True)
class Defaults:
    """What the embedded model, or a model of the user's, takes where nothing is given."""

    steps: int
    batch_size: int
    sequence_length: int
    settings: Settings


EMBEDDED = Defaults(steps=240, batch_size=8, sequence_length=128, settings=Settings())
OWN_MODEL = Defaults(steps=200, batch_size=4, sequence_length=512, settings=Settings(r=16))


def run(args: Namespace) -> int:
    """The command; returns its exit code."""
    console = make_console()
    device, dtype = pick_device(args.device), pick_dtype(args.dtype, args.device)
    defaults, method = OWN_MODEL if args.model else EMBEDDED, METHODS[args.method]
    for name in ("steps", "batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    if args.lr is None:
        args.lr = method.lr if args.model else method.embedded_lr
    settings = take_settings(args, method, defaults)
    out = args.out or Path("runs", args.method)
    folder = args.model or embedded_folder(args, console, device, dtype)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(folder, method.base_dtype(dtype))
    virtual = settings.virtual_tokens if "virtual_tokens" in method.options else 0
    args.sequence_length = sequence_length(model, args.sequence_length, defaults.sequence_length, virtual)
    data = load_data(args, tokenizer)
    settings = starting_from(settings, args.init_text, tokenizer, data)
    method.apply(model, settings).to(device)
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its old name
        enable({"use_reentrant": False})
    count = trainable_parameters(model)
    console.print(f"{args.method}: {count}")

    options = options_of(args, method, dtype)
    trainer = Trainer(model, data, options)
    run_folder = RunFolder(out, identity(args, folder, dtype, data))
    if args.restart:
        (out / CHECKPOINT).unlink(missing_ok=True)
    if run_folder.resume(trainer):
        console.print(f"resumed from {out / CHECKPOINT} after step {trainer.done} of {args.steps}")
    with run_folder.stopping_cleanly(), progress(console, args.method, args.steps, trainer.done) as observer:
        trainer.observer = observer
        trainer.run(run_folder.after_step)

    saved = save_result(out, model, tokenizer, method)
    unit = "byte" if tokenizer.vocabulary == BYTE_VOCABULARY else "token"
    loss_chart(out / "loss.png", trainer.history, method, unit)
    result = summary(trainer.history)
    write_json(
        out / "run.json",
        {"arguments": jsonable(args), "environment": environment(device, dtype), "trainable_parameters": vars(count)}
        | {"result": result, "history": vars(trainer.history)},
    )
    console.print(
        f"held-out loss {result['held_out_before']:.3f} -> {result['held_out_after']:.3f} nats per {unit}, "
        f"{result['seconds_per_step']:.3f} s per step\nwrote {saved}, {out / 'loss.png'}, {out / 'run.json'}",
        soft_wrap=True,
    )
    return 0


def embedded_folder(args: Namespace, console: Any, device: torch.device, dtype: torch.dtype) -> Path:
    """The embedded base model, pre-trained where it is not in the cache."""
    with ExitStack() as shown:
        return embedded.base_model(
            args.recipe, device, dtype,
            lambda options: shown.enter_context(progress(console, "pre-training", options.steps)),
        )[0]  # fmt: skip


def take_settings(args: Namespace, method: Method, defaults: Defaults) -> Settings:
    """The method's options, moved from `args` (where they come back as what is used) into Settings.

    Raises UserError: an option that the method does not take.
    """
    names = [field.name for field in fields(Settings) if field.name != "init_ids"]
    given = {name: getattr(args, name) for name in (*names, "init_text")}
    if given["target_modules"] is not None and len(given["target_modules"]) == 1:
        given["target_modules"] = given["target_modules"][0]
    settings = settings_of(method, given, defaults.settings)
    for name in names:
        setattr(args, name, getattr(settings, name) if name in method.options else None)
    return settings


def starting_from(settings: Settings, text: str | None, tokenizer: Tokenizer, data: Split) -> Settings:
    """With the token ids of the text, or of the start of the data where there is none.

    Raises UserError: a text without tokens.
    """
    ids = data.train.tokens[0, : settings.virtual_tokens].tolist() if text is None else tokenizer.encode(text)
    if not ids:
        raise UserError(f"--init-text {text!r} has no tokens")
    return replace(settings, init_ids=tuple(ids))


def options_of(args: Namespace, method: Method, dtype: torch.dtype) -> Options:
    return Options(
        steps=args.steps, batch_size=args.batch_size, lr=args.lr, accumulation=args.accumulation,
        warmup=max(1, round(args.warmup * args.steps)), weight_decay=args.weight_decay, clip=args.clip, seed=args.seed,
        dtype=dtype, layerwise=method.layerwise, lora_plus=method.lora_plus,
        optimizer=args.optim, checkpoint_every=args.checkpoint_every,
        evaluate_every=args.evaluate_every or max(1, args.steps // 6),
    )  # fmt: skip


def sequence_length(model: Any, given: int | None, default: int, virtual: int = 0) -> int:
    """What is given, or the default as far as the model has positions beside those of `virtual` tokens.

    Raises UserError: what is given has more.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    most = (given or default) if positions is None else positions - virtual
    if most < 1 or (given is not None and given > most):
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise UserError(f"--sequence-length {given or default}: the model takes {max(0, most)} tokens at most{beside}")
    return given or min(default, most)


def load_data(args: Namespace, tokenizer: Tokenizer) -> Split:
    documents = read_documents(args.data) if args.data else embedded.python_source()
    return pack(documents, tokenizer, args.sequence_length, args.held_out, args.seed)


# What changes where a run is kept or shown, not what it learns.
_INCIDENTAL = (
    "command", "out", "restart", "checkpoint_every", "evaluate_every", "device", "data", "recipe", "model", "methods",
)  # fmt: skip


def identity(args: Namespace, folder: Path, dtype: torch.dtype, data: Split) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was interrupted."""
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    arguments = {f"--{k.replace('_', '-')}": v for k, v in jsonable(args).items() if k not in _INCIDENTAL}
    model = f"{folder.resolve()} {weights}"
    return arguments | {"--model": model, "--dtype": str(dtype), "--data": data.fingerprint()}


def jsonable(args: Namespace) -> dict[str, Any]:
    """The arguments as JSON takes them."""
    plain = (str, int, float, type(None))

    def convert(value: Any) -> Any:
        return (
            [convert(v) for v in value]
            if isinstance(value, list)
            else value
            if isinstance(value, plain)
            else str(value)
        )

    return {name: convert(value) for name, value in vars(args).items()}


def save_result(out: Path, model: Any, tokenizer: Tokenizer, method: Method) -> Path:
    """What was trained, or the whole model where the base was, in the run's folder."""
    if not method.trains_base:
        save_adapter(model, out / "adapter")
        return out / "adapter"

    def write(new: Path) -> None:
        model.save_pretrained(new)
        if tokenizer.source is not None:
            tokenizer.source.save_pretrained(new)

    write_folder(out / "model", write)
    return out / "model"
