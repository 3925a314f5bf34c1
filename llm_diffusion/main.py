"""The command line: train, and use what was trained.

    llm-diffusion --preset tiny          or, a word that is no command being a preset: llm-diffusion tiny
    llm-diffusion chat output/tiny/sft_model "Sort the letters: k d e a"

Every command imports what it needs when it runs, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click
from loguru import logger

from . import UserError
from .config import HyperParameters, build, layers, read_mapping, resolve
from .models.files import writable, write_text
from .objective.settings import LARGEST, SEEDS, merge, redacted
from .presets import preset_names, read_preset
from .presets.files import NO_TEXT

COUNT, SEED = click.IntRange(1, LARGEST), click.IntRange(*SEEDS.values())
# Of memory, a disk, damaged files and the network, as libraries raise them; torch has no class for most. By name: importing them is slow.
FAULTS = "UserError OSError UnicodeDecodeError FloatingPointError MemoryError OutOfMemoryError".split()
FAULTS += "SafetensorError ArrowException TransportError".split()
TORCH_FAULTS = r"^DataLoader worker \(pid|DefaultCPUAllocator: |PytorchStreamWriter failed|unexpected pos \d"
EXTRAS = {"bitsandbytes": "qlora", "wandb": "wandb", "gguf": "gguf", "fastapi": "serve", "uvicorn": "serve"}
EXTRAS |= {"gradio": "demo", "lm_eval": "eval", "sacrebleu": "eval", "rouge_score": "eval"}


def is_users(error: Exception) -> bool:
    """Whether an error is the user's to put right: a setting, a file, a missing extra, memory, or a run that diverged."""
    if isinstance(error, ImportError):
        return any(name in str(error) for name in EXTRAS)
    return any(kind.__name__ in FAULTS for kind in type(error).__mro__) or bool(re.search(TORCH_FAULTS, str(error)))


class Commands(click.Group):
    """A first word that is no command is a preset: `llm-diffusion tiny` is `llm-diffusion --preset tiny`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in filter(NO_TEXT.search, args):  # bytes that are no UTF-8
            ctx.fail(f"{word!r} is no text.")
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            if args[0] not in preset_names() and (close := difflib.get_close_matches(args[0], self.commands, n=1)):
                ctx.fail(f"No such command or preset {args[0]!r}; did you mean {close[0]!r}?")
            args = ["--preset", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """What the user can put right is one line on stderr and exit code 2; a fault of ours keeps its traceback."""
        from .training.signals import exit_codes_of_signals

        with exit_codes_of_signals():
            try:
                return super().invoke(ctx)
            except Exception as error:
                if not is_users(error) or os.environ.get("LLM_DIFFUSION_TRACEBACK"):
                    raise
                extra = EXTRAS.get(getattr(error, "name", None))
                how = f"; run `pip install 'llm-diffusion[{extra}]'`" if extra else ""
                click.echo(f"error: {redacted(' '.join(str(error).split())) or type(error).__name__}{how}", err=True)
                sys.exit(2)


def declared(flag: str, name: str, **options: Any) -> Callable:
    """An option with the help, and unless given otherwise the default, of a setting of the main job."""
    field = {field.name: field for field in dataclasses.fields(HyperParameters)}[name]
    options = {"default": field.default, "help": field.metadata["help"], **options}
    options |= {"is_flag": True} if field.default is False else {"show_default": options["default"] is not None}
    return click.option(flag, metavar="|".join(field.metadata.get("choices", ())) or None, **options)


def job_settings(command: Callable) -> Callable:
    """`--preset`, `--config` and `--hyper-parameters-json`, as `config.resolve` takes them, and `--resume`."""
    json_help = "Settings, inline or in a JSON or YAML file; win over all others."
    for option in (
        click.option("--resume", is_flag=True, help="Go on with a stopped run of the same settings."),
        click.option("--hyper-parameters-json", "hyper_parameters", metavar="JSON|FILE", help=json_help),
        click.option("--config", metavar="FILE", help="Settings from a YAML or JSON file, config.yaml for one."),
        click.option("--preset", metavar="NAME[+NAME]", help="Shipped settings, joined by '+'; see --list-presets."),
    ):
        command = option(command)
    return command


decoding = "Decoding settings, '{\"max_new_tokens\": 64}' for one."
decoding_settings = click.option("--settings", metavar="JSON", default="{}", help=decoding)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"max_content_width": 110})
@job_settings
@click.option("--list-presets", is_flag=True, help="Print the names of the presets and exit.")
@click.pass_context
def cli(ctx: click.Context, list_presets: bool, resume: bool, **settings: str | None) -> None:
    """Turns an autoregressive language model into a diffusion language model. Without a command: the main job."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of missing CPU kernels that are not needed
    logger.remove()
    logger.configure(patcher=lambda record: record.update(message=redacted(record["message"])))
    colours = sys.stderr.isatty()
    logger.add(sys.stderr, format="<green>{time:HH:mm:ss}</green> {message}", colorize=colours, level="INFO")
    if ctx.invoked_subcommand is None and list_presets:
        click.echo("\n".join(preset_names()))
    elif ctx.invoked_subcommand is None:
        hp = resolve(**settings)
        quiet_libraries()
        from .job import run

        run(hp, resume)


@cli.command()
@click.argument("model", required=False)
@job_settings
def convert(model: str | None, resume: bool, **settings: str | None) -> None:
    """Convert MODEL in three stages (attention, diffusion, recovery), from analysis to evaluation."""
    given = layers(**settings) | ({"model": model} if model is not None else {})
    hp = build(given if "stages" in given else merge(read_preset("3stage"), given))
    if hp.pipeline == "arm":
        raise UserError("`pipeline`='arm' converts nothing; leave it out, or leave out `convert`.")
    quiet_libraries()
    from .analysis import analysis_tables, analyze
    from .job import run

    setup = {"batch_size": hp.batch_size, "length": hp.max_length, "lora_rank": hp.lora_config.get("r", 16)}
    setup |= {"attention": "bidirectional", "gradient_checkpointing": True}
    setup |= {name: value for name, value in hp.training.items() if name in setup and value is not None}
    console().print(*analysis_tables(analyze(hp.model, trust_remote_code=hp.trust_remote_code, **setup)))
    run(hp, resume)


@cli.command()
@click.argument("model")
@declared("--batch-size", "batch_size", default=4)
@declared("--length", "max_length", help="Tokens of a row.")
@click.option("--lora-rank", type=COUNT, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--block", is_flag=True, help="Block attention, which trains on a noisy and a clean copy.")
@click.option("--no-checkpointing", is_flag=True, help="Keep all activations for the backward pass.")
@declared("--trust-remote-code", "trust_remote_code")
@click.option("--download", is_flag=True, help="Fetch the weights too.")
@click.option("--json", "json_path", metavar="FILE", help="Write the analysis to FILE.")
def analyze(model: str, block: bool, no_checkpointing: bool, download: bool, json_path: str, **options: Any) -> None:
    """Parameters, memory and fitting cards of MODEL, from its config alone."""
    quiet_libraries()
    from .analysis import analysis_tables
    from .analysis import analyze as analyze_model
    from .models.checkpoints import download as fetch

    output = None if json_path is None else writable(json_path, "--json")
    attention = "block" if block else "bidirectional"
    analysis = analyze_model(model, attention=attention, gradient_checkpointing=not no_checkpointing, **options)
    console().print(*analysis_tables(analysis))
    if output:
        write_text(output, json.dumps(dataclasses.asdict(analysis), indent=1) + "\n")
    if download:
        console().print(f"weights: {fetch(model)}", markup=False)


@cli.command("prepare-data")
@click.argument("source")
@click.option("--output", metavar="FOLDER", required=True, help="Where the dataset is written.")
@click.option("--model", required=True, help="Whose tokenizer is used.")
@click.option("--form", default="joined", show_default=True, help="joined, padded or documents.")
@click.option("--length", type=int, default=1024, show_default=True, help="Tokens of a row.")
@click.option("--train", type=int, help="Documents to train on; all if left out.")
@click.option("--test", type=float, default=0.01, show_default=True, help="Documents held out: a share or a number.")
@click.option("--text-field", default="text", show_default=True, help="Column of the text.")
@click.option("--config", help="Configuration of a hub dataset, sample-10BT for one.")
@click.option("--split", default="train", show_default=True, help="Split of a hub dataset.")
@click.option("--dtype", default="uint16", show_default=True, help="Type of the ids in a .bin file.")
def prepare_data(source: str, output: str, **options: Any) -> None:
    """Tokenise SOURCE once: a file or folder of txt, JSONL or Parquet, a .bin of token ids, or a hub name, streamed."""
    quiet_libraries(bars=False)  # lines of our own, which know documents and tokens
    from .data.prepare import Preparation, prepare

    folder, preparation = writable(output, "--output", folder=True), Preparation(source, **options)
    prepare(preparation, folder, logger.info)
    for split, count in preparation.counts.items():
        click.echo(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in count.items()))
    click.echo(f"name it as data: --hyper-parameters-json '{json.dumps({'dataset': output})}'")


@cli.command()
@click.argument("model", required=False)
@click.argument("prompts", nargs=-1)
@declared("--pipeline", "pipeline", default=None)
@decoding_settings
@click.option("--config", metavar="FILE", help="Take what is left out from a config.json, `user_prompt` for one.")
@click.option("--watch", is_flag=True, help="Show the text as it forms, coloured by confidence.")
@click.option("--svg", metavar="FILE", help="Draw that as an animated picture.")
def generate(
    model: str | None, prompts: tuple[str, ...], pipeline: str | None, settings: str, config: str | None, **shown: Any
) -> None:
    """Continue plain texts (PROMPTS) with MODEL."""
    chosen = read_mapping(settings, "--settings")
    hp = resolve(config=config, hyper_parameters=json.dumps({"pipeline": pipeline} if pipeline else {}))
    if config is not None:
        if hp.scratch and model is None:
            raise UserError("`init_from`: a model from nothing must be trained first; then name its folder.")
        chosen, model, prompts = {**hp.generation, **chosen}, model or hp.model, prompts or tuple(hp.prompts)
    if not model or not prompts:
        raise UserError("MODEL and PROMPTS are missing; or give a `--config` with `init_from` and `user_prompt`.")
    if hp.pipeline == "diffusion":
        return generate_by_diffusion(model, prompts, chosen, **shown)
    if shown["watch"] or shown["svg"] is not None:
        raise UserError("`--watch` and `--svg` show how masks are filled; leave them out with `--pipeline arm`.")
    quiet_libraries()
    from .generation.inference import continue_autoregressive
    from .models.loading import autoregressive_base, load_autoregressive

    loaded = load_autoregressive(autoregressive_base(model))
    click.echo("\n".join(continue_autoregressive(*loaded, list(prompts), **chosen)))


def generate_by_diffusion(model: str, prompts: tuple[str, ...], settings: dict, watch: bool, svg: str | None) -> None:
    picture = None if svg is None else writable(svg, "--svg")
    if picture and len(prompts) > 1:
        raise UserError(f"`--svg` draws one text, got {len(prompts)} prompts.")
    inference = load_inference(model, settings)
    if not (watch or picture):
        return click.echo("\n".join(inference.generate(list(prompts))))
    from .generation.streaming import generate_watched

    terminal = console() if watch and sys.stdout.isatty() else None  # a log gets the answer alone
    for answer, view in generate_watched(inference, prompts, terminal):
        if terminal is None:
            click.echo(answer)
        if picture:
            write_text(picture, view.svg())


@cli.command("side-by-side")
@click.argument("models", nargs=-1, required=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; may be given several times.")
@click.option("--chat", is_flag=True, help="The texts are questions, put by every model's chat template.")
@decoding_settings
def side_by_side(models: tuple[str, ...], prompts: tuple[str, ...], chat: bool, settings: str) -> None:
    """Continue texts with each of MODELS by both pipelines; the first, from left to right, judges the answers."""
    quiet_libraries()
    from .evaluation.report import show_side_by_side
    from .evaluation.statistics import side_by_side as decode_side_by_side

    chosen = read_mapping(settings, "--settings")
    rows = decode_side_by_side(models, list(prompts), lambda name: load_inference(name, chosen), chosen, chat)
    show_side_by_side(console(), rows, prompts)


@cli.command()
@click.argument("model")
@click.argument("question", required=False)
@decoding_settings
def chat(model: str, question: str | None, settings: str) -> None:
    """Ask a converted MODEL one QUESTION, or talk to it line by line."""
    from .generation.config import check_one_answer

    inference, messages = load_inference(model, read_mapping(settings, "--settings")), []
    check_one_answer(inference.settings)
    for line in [question] if question is not None else sys.stdin:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        messages.append({"role": "assistant", "content": inference.chat(messages)})
        click.echo(messages[-1]["content"])


def address(default_port: int) -> Callable:
    host = click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
    port = click.option("--port", type=click.IntRange(0, 65535), default=default_port, show_default=True)
    return lambda command: host(port(command))


@cli.command()
@click.argument("model")
@decoding_settings
@address(8000)
@click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Requests decoded at once.")
@click.option("--max-tokens", type=COUNT, default=1024, show_default=True, help="Most tokens of an answer.")
def serve(model: str, settings: str, host: str, port: int, **limits: int) -> None:
    """Answer requests in OpenAI's format with a converted MODEL."""
    from .serving import server

    with server.listen(host, port) as at:
        server.serve(server.build_app(load_inference(model, read_mapping(settings, "--settings")), model, **limits), at)


@cli.command()
@click.argument("model")
@address(7860)
def demo(model: str, **where: Any) -> None:
    """Play with a converted MODEL in a browser: an answer forms pass by pass, gaps are filled in."""
    from .serving import demo

    demo.launch(demo.build_demo(load_inference(model, {}), model), **where)


@cli.command()
@click.argument("source")
@click.option("--output", required=True, metavar="FILE", help="JSONL to write.")
@click.option("--kinds", metavar="NAME,NAME", help="Only these kinds of error; all that fit unless given.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the errors and of sampling.")
@click.option("--limit", type=COUNT, help="Use the first so many records.")
@click.option("--from-model", metavar="PATH", help="Sample this converted model's answers instead of injecting errors.")
@click.option("--samples", type=COUNT, default=4, show_default=True, help="Answers to each problem, with --from-model.")
@decoding_settings
@click.option("--answers", is_flag=True, help="With --from-model: write the labelled answers, for people or a judge.")
@click.option("--judge", metavar="URL", help="Of an OpenAI-style API, whose model labels the answers of --from-model.")
@click.option("--judge-model", metavar="NAME", help="The model at --judge; its key is read from OPENAI_API_KEY.")
def prefer(source: str, output: str, **options: Any) -> None:
    """Make preference pairs from SOURCE: worked answers, labelled answers, or pairs to be checked.

    SOURCE is "tiny", a JSONL file, a hub name, or one of gsm8k, math, logiqa and hotpotqa.
    """
    writable(output, "--output")
    quiet_libraries()
    from .evaluation.answers import prefer as make_pairs

    for line in make_pairs(source, output, read_mapping(options.pop("settings"), "--settings"), **options):
        click.echo(line)


@cli.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--output", "--report", metavar="DIR", default="evaluation", show_default=True, help="Its folder.")
@click.option("--tasks", metavar="A,B", default="", help="Tasks of lm-evaluation-harness.")
@click.option("--data", metavar="DIR", help="Local files of tasks, without the hub: see docs/evaluation.md.")
@click.option("--limit", type=COUNT, help="Documents of a task, texts or prompts to use at most.")
@click.option("--text", metavar="FILE", help="Likelihood of a text file, or of the `text` of a JSONL file.")
@click.option("--prompts", metavar="NAME|FILE", help="Prompts with references, or problems: answers, calibration.")
@click.option("--sweep", metavar="[JSON]", is_flag=False, flag_value="{}", help="Sweep decoding settings over lists.")
@decoding_settings
@click.option("--base", metavar="MODEL", help="The AR model beside it; default: the same weights without adapters.")
@click.option("--estimator", default="exact_count", show_default=True, help="Of the likelihood's bound.")
@click.option("--samples", type=COUNT, default=128, show_default=True, help="Of the noise, a text or completion.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of all noise.")
@click.option("--batch-size", type=COUNT, default=16, show_default=True, help="Rows at once.")
@click.option("--max-length", type=COUNT, help="Tokens of a window.")
@click.option("--num-fewshot", type=click.IntRange(0, 1000), help="Worked examples before a task's question.")
@click.option("--chat-template", is_flag=True, help="Ask tasks through the chat template.")
@click.option("--judge", metavar="URL", help="Of an OpenAI-style API: a model there reads worked answers too.")
@click.option("--judge-model", metavar="NAME", help="The model at --judge; its key is read from OPENAI_API_KEY.")
@declared("--trust-remote-code", "trust_remote_code")
def evaluate(models: tuple[str, ...], output: str, **options: Any) -> None:
    """Measure converted MODELS beside the AR base of the first: likelihood, tasks, answers, speed; one report."""
    quiet_libraries()
    from .evaluation.evaluate import run

    folder = writable(output, "--output", folder=True)
    if run(models, folder, console(), **options):
        click.echo(f"report: {folder / 'report.html'}")


@cli.command()
@click.argument("model")
@click.option("--format", "form", metavar="NAME", required=True, help="sdar (SGLang, LMDeploy) or gguf (llama.cpp).")
@click.option("--output", metavar="DIR", required=True, help="A new folder.")
def export(model: str, form: str, output: str) -> None:
    """Write MODEL, its adapters merged, in bf16 as another engine loads it."""
    quiet_libraries()
    from .serving.export import export as write

    click.echo(f"written: {write(model, form, writable(output, '--output', folder=True))}")


def load_inference(model: str, settings: dict[str, Any]) -> Any:
    quiet_libraries()
    from .generation.inference import DiffusionInference

    return DiffusionInference.from_pretrained(model, **settings)


def console() -> Any:
    """Tables on a terminal, and the same without control characters in a log."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def quiet_libraries(bars: bool = True) -> None:
    """Progress bars of transformers and datasets are for terminals; a log gets lines instead."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # PEFT's
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not bars or not sys.stderr.isatty():
        datasets.disable_progress_bars()


if __name__ == "__main__":
    cli()
