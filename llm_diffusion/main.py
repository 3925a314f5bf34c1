"""The command line: train, and use what was trained.

    python -m llm_diffusion.main --hyper-parameters-json '{"model": "tiny", "dataset": "tiny"}'
    llm-diffusion --preset tiny
    llm-diffusion analyze Qwen/Qwen3-4B
    llm-diffusion convert --preset tiny-3stage
    llm-diffusion chat output/sft_model "Sort the letters: k d e a"

Every command imports what it needs when it runs, so that `--help` and a mistyped option are answered at once, and an import that
fails is one line like any other error.
Trade-off: imports inside functions. Alternative: seconds of imports before the first word.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from loguru import logger

from . import UserError

if TYPE_CHECKING:
    from .config import HyperParameters

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


@contextmanager
def one_line_errors() -> Any:
    """What the user got wrong is one line on stderr and exit code 2, without a traceback."""
    try:
        yield
    except Exception as error:
        # By name: importing torch for its class would cost seconds at every start.
        if not isinstance(error, USER_ERRORS) and type(error).__name__ != "OutOfMemoryError":
            raise
        if os.environ.get("LLM_DIFFUSION_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        click.echo(f"error: {message}", err=True)
        sys.exit(2)


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option(
    "--hyper-parameters-json",
    metavar="JSON|FILE",
    help="Settings as inline JSON, or a JSON or YAML file; win over all others.",
)
@click.option("--config", metavar="FILE", help="Settings from a YAML or JSON file, config.yaml for one.")
@click.option("--preset", metavar="NAME[+NAME]", help="Shipped settings, joined by '+'; see --list-presets.")
@click.option("--list-presets", is_flag=True, help="Print the names of the presets and exit.")
@click.option("--resume", is_flag=True, help="Go on with a stopped run of the same settings.")
@click.pass_context
def cli(
    context: click.Context,
    hyper_parameters_json: str | None,
    config: str | None,
    preset: str | None,
    list_presets: bool,
    resume: bool,
) -> None:
    """Turns an autoregressive language model into a diffusion language model. Without a command: the main job."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client is imported
    start_logging()
    if context.invoked_subcommand is not None:
        return
    with one_line_errors():
        from .config import preset_names, resolve

        if list_presets:
            click.echo("\n".join(preset_names()))
            return
        hp = resolve(preset, config, hyper_parameters_json)
        quiet_hosts()
        show_left_aside(config, hyper_parameters_json)
        if hp.pipeline == "arm":
            from .autoregressive import run
        else:
            from .job import run

        run(hp, resume)


@cli.command()
@click.argument("model", required=False)
@click.option("--preset", metavar="NAME[+NAME]", help="Shipped settings; `3stage` is what this command adds to them.")
@click.option("--config", metavar="FILE", help="Settings from a YAML or JSON file.")
@click.option("--hyper-parameters-json", metavar="JSON|FILE", help="Settings that win over all others.")
@click.option("--resume", is_flag=True, help="Go on with a stopped run of the same settings.")
def convert(
    model: str | None, preset: str | None, config: str | None, hyper_parameters_json: str | None, resume: bool
) -> None:
    """Convert MODEL in three stages (attention, diffusion, recovery), from analysis to evaluation."""
    with one_line_errors():
        from .config import (
            build,
            layers,
            merge,
            read_preset,
        )
        from .job import run

        given = layers(preset, config, hyper_parameters_json)
        if model is not None:
            given["model"] = model
        if "stages" not in given:
            given = merge(read_preset("3stage"), given)
        hp = build(given)
        if hp.pipeline == "arm":
            raise UserError("`pipeline`='arm' converts nothing; leave it out, or leave out `convert`.")
        quiet_hosts()
        show_analysis(hp)
        run(hp, resume)


@cli.command()
@click.argument("model")
@click.option("--batch-size", type=int, default=4, show_default=True, help="Rows of a micro-batch.")
@click.option("--length", type=int, default=768, show_default=True, help="Tokens of a row.")
@click.option("--lora-rank", type=int, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--block", is_flag=True, help="Block attention, which trains on a noisy and a clean copy.")
@click.option("--no-checkpointing", is_flag=True, help="Keep all activations for the backward pass.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
@click.option("--download", is_flag=True, help="Fetch the weights too.")
@click.option("--json", "json_path", metavar="FILE", help="Write the analysis to FILE.")
def analyze(
    model: str,
    batch_size: int,
    length: int,
    lora_rank: int,
    block: bool,
    no_checkpointing: bool,
    trust_remote_code: bool,
    download: bool,
    json_path: str | None,
) -> None:
    """Parameters, memory and fitting cards of MODEL, from its config alone."""
    with one_line_errors():
        from dataclasses import asdict

        from rich.console import Console

        from .analysis import analysis_tables
        from .analysis import analyze as analyze_model
        from .job import check_writable

        quiet_hosts()
        if json_path is not None:
            check_writable(Path(json_path).expanduser().parent, "--json")
        analysis = analyze_model(
            model,
            batch_size=batch_size,
            length=length,
            lora_rank=lora_rank,
            attention="block" if block else "bidirectional",
            gradient_checkpointing=not no_checkpointing,
            trust_remote_code=trust_remote_code,
        )
        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        for table in analysis_tables(analysis):
            console.print(table)
        if json_path is not None:
            Path(json_path).expanduser().write_text(json.dumps(asdict(analysis), indent=1) + "\n")
        if download:
            from .models.checkpoints import download as fetch

            console.print(f"weights: {fetch(model)}", markup=False)


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
    with one_line_errors():
        from .data.prepare import Preparation, prepare
        from .job import check_writable

        quiet_hosts()
        import datasets

        datasets.disable_progress_bars()  # lines of our own, which know documents and tokens
        check_writable(Path(output).expanduser(), "--output")
        asked = Preparation(source, **options)
        prepare(asked, Path(output).expanduser(), logger.info)
        for split, count in asked.counts.items():
            click.echo(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in count.items()))
        click.echo(f"name it as data: --hyper-parameters-json '{json.dumps({'dataset': output})}'")


@cli.command()
@click.argument("model", required=False)
@click.argument("prompts", nargs=-1)
@click.option("--pipeline", help="diffusion, or arm: from left to right, by the host's own decoding.")
@click.option("--settings", metavar="JSON", default="{}", help="Decoding settings, e.g. '{\"max_new_tokens\": 64}'.")
@click.option("--config", metavar="FILE", help="Take what is left out from a config.json, `user_prompt` for one.")
@click.option("--watch", is_flag=True, help="Show the text as it forms, coloured by confidence.")
@click.option("--svg", "svg_path", metavar="FILE", help="Draw that as an animated picture.")
def generate(
    model: str | None,
    prompts: tuple[str, ...],
    pipeline: str | None,
    settings: str,
    config: str | None,
    watch: bool,
    svg_path: str | None,
) -> None:
    """Continue plain texts (PROMPTS) with MODEL."""
    with one_line_errors():
        from .config import read_mapping, resolve
        from .pipelines import check_pipeline

        chosen = read_mapping(settings, "--settings")
        if config is not None:
            own = json.dumps({"pipeline": pipeline} if pipeline else {})
            hp = resolve(config=config, hyper_parameters=own)
            show_left_aside(config, own)
            if hp.scratch and model is None:
                raise UserError("`init_from`: a model from nothing has nothing to say; train it, and name its folder.")
            chosen = {**hp.generation, **chosen}
            model, prompts, pipeline = model or hp.model, prompts or tuple(hp.prompts), pipeline or hp.pipeline
        if not model or not prompts:
            raise UserError(
                "MODEL and PROMPTS are missing; give them, or a `--config` with `init_from` and `user_prompt`."
            )
        if check_pipeline(pipeline or "diffusion") == "arm":
            from_left_to_right(model, prompts, chosen, watch or svg_path is not None)
        else:
            by_diffusion(model, prompts, chosen, watch, svg_path)


def from_left_to_right(model: str, prompts: tuple[str, ...], settings: dict[str, Any], watched: bool) -> None:
    from .pipelines import continue_from_left, for_left_to_right, load_autoregressive

    if watched:
        raise UserError("`--watch` and `--svg` show how masks are filled; leave them out with `--pipeline arm`.")
    quiet_hosts()
    for answer in continue_from_left(*load_autoregressive(for_left_to_right(model)), list(prompts), **settings):
        click.echo(answer)


def by_diffusion(
    model: str, prompts: tuple[str, ...], settings: dict[str, Any], watch: bool, svg_path: str | None
) -> None:
    if svg_path is not None:
        from .job import check_writable

        check_writable(Path(svg_path).expanduser().parent, "--svg")
        if len(prompts) > 1:
            raise UserError(f"`--svg` draws one text, got {len(prompts)} prompts.")
    inference = load_inference(model, json.dumps(settings))
    if not watch and svg_path is None:
        click.echo("\n".join(inference.generate(list(prompts))))
        return
    from rich.console import Console

    from .generation.watching import Watch

    console = Console() if watch and sys.stdout.isatty() else None  # a log gets the answer alone
    for prompt in prompts:
        view = Watch(inference.tokenizer, inference.settings["mask_token_id"], console)
        answer = inference.generate(prompt, streamer=view)[0]
        if console is None:
            click.echo(answer)
    if svg_path is not None:
        picture = Path(svg_path).expanduser()
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(view.svg(), encoding="utf-8")


@cli.command("side-by-side")
@click.argument("models", nargs=-1, required=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text to continue; may be given several times.")
@click.option("--chat", is_flag=True, help="The texts are questions, put by every model's chat template.")
@click.option(
    "--settings", metavar="JSON", default="{}", help="Decoding settings; what both pipelines know, both take."
)
def side_by_side(models: tuple[str, ...], prompts: tuple[str, ...], chat: bool, settings: str) -> None:
    """Continue texts with each of MODELS by both pipelines; the first one, left to right, judges how likely the answers are."""
    with one_line_errors():
        from rich.console import Console

        from .config import read_mapping
        from .pipelines import continued, figures

        quiet_hosts()
        load = partial(load_inference, settings=settings)
        rows = continued(list(models), list(prompts), load, read_mapping(settings, "--settings"), chat)
        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        console.print(figures(rows))
        for number, prompt in enumerate(prompts):
            console.print(f"\n{prompt!r}", style="bold", markup=False)
            for row in rows:
                console.print(f"  {row.model}, {row.pipeline}: {row.texts[number]!r}", markup=False, soft_wrap=True)


@cli.command()
@click.argument("model")
@click.argument("question", required=False)
@click.option("--settings", metavar="JSON", default="{}", help="Decoding settings as JSON.")
def chat(model: str, question: str | None, settings: str) -> None:
    """Ask a converted MODEL one QUESTION, or talk to it line by line."""
    with one_line_errors():
        inference = load_inference(model, settings)
        if question is not None:
            click.echo(inference.chat([{"role": "user", "content": question}]))
            return
        messages: list[dict[str, str]] = []
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.rstrip("\n")})
            messages.append({"role": "assistant", "content": inference.chat(messages)})
            click.echo(messages[-1]["content"])


@cli.command()
@click.argument("source")
@click.option("--output", required=True, metavar="FILE", help="JSONL to write.")
@click.option("--kinds", metavar="NAME,NAME", help="Only these kinds of error; all that fit unless given.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the errors and of sampling.")
@click.option("--limit", type=int, help="Use the first so many records.")
@click.option("--from-model", metavar="PATH", help="Sample this converted model's answers instead of injecting errors.")
@click.option("--samples", type=int, default=4, show_default=True, help="Answers to each problem, with --from-model.")
@click.option("--settings", metavar="JSON", default="{}", help="Decoding settings as JSON, with --from-model.")
@click.option("--answers", is_flag=True, help="With --from-model: write the labelled answers, for people or a judge.")
@click.option(
    "--judge", metavar="URL", help="Of an OpenAI-style API: with --from-model, a model there labels the answers."
)
@click.option("--judge-model", metavar="NAME", help="The model at --judge; its key is read from OPENAI_API_KEY.")
def prefer(
    source: str,
    output: str,
    kinds: str | None,
    seed: int,
    limit: int | None,
    from_model: str | None,
    samples: int,
    settings: str,
    answers: bool,
    judge: str | None,
    judge_model: str | None,
) -> None:
    """Make preference pairs from SOURCE: worked answers, labelled answers, or pairs to be checked.

    SOURCE is "tiny", a JSONL file, a hub name, or one of gsm8k, math, logiqa and hotpotqa.
    """
    with one_line_errors():
        from collections import Counter

        from .job import check_writable
        from .reasoning.judge import LLMJudge
        from .reasoning.pairs import preference_pairs
        from .reasoning.preference_files import checked_pairs, pairs_from_answers, write_rows
        from .reasoning.problems import load_records, read_problem

        quiet_hosts()
        check_writable(Path(output).expanduser().parent, "--output")
        if limit is not None and limit < 1:
            raise UserError(f"`--limit` must be at least 1, got {limit}.")
        if (answers or judge) and from_model is None:
            named = "`--answers` writes" if answers else "`--judge` labels"
            raise UserError(f"{named} a model's answers; name the model with `--from-model`.")
        asked = LLMJudge(judge, judge_model or "") if judge else None
        records = load_records(source, limit, seed=seed)
        if from_model is not None:
            from .evaluation.answers import sample_answers

            inference = load_inference(from_model, settings)
            rows = sample_answers(
                inference.model,
                inference.tokenizer,
                [read_problem(record) for record in records],
                samples,
                seed,
                progress_bar("rounds"),
                **inference.settings,
            )
            if asked is not None:
                for row in progress_bar("judged")(rows):
                    row |= asked(row["prompt"][-1]["content"], row["answer"], row["reference"])
            click.echo(f"{sum(row['right'] for row in rows)} of {len(rows)} answers are right")
            if answers:
                write_rows(output, rows)
                return
            pairs = pairs_from_answers(rows)
        elif {"answer", "right"} <= set(records[0]):
            pairs = pairs_from_answers(records)
        elif "chosen" in records[0] or "rejected" in records[0]:
            pairs = checked_pairs(records)
        else:
            pairs = preference_pairs(progress_bar("records")(records), seed, kinds.split(",") if kinds else None)
        write_rows(output, pairs)
        for kind, count in Counter(pairs["kind"]).most_common():
            click.echo(f"{count:6d}  {kind}")


def progress_bar(what: str) -> Any:
    """Wraps what is gone through: a bar on a terminal, nothing in a log."""
    from rich.progress import track

    return lambda items: track(items, what, transient=True, disable=not sys.stderr.isatty())


@cli.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--output", "--report", metavar="DIR", default="evaluation", show_default=True, help="Folder of the report."
)
@click.option("--tasks", metavar="A,B", default="", help="Tasks of lm-evaluation-harness.")
@click.option(
    "--data", metavar="DIR", help="Local files of tasks, for tasks without a hub; docs/evaluation.md names them."
)
@click.option("--limit", type=click.IntRange(1), help="Documents of a task, texts or prompts to use at most.")
@click.option("--text", metavar="FILE", help="Likelihood of a text file, or of the `text` of a JSONL file.")
@click.option(
    "--prompts", metavar="NAME|FILE", help="Prompts with references, or problems: answers, calibration, samples."
)
@click.option("--sweep", metavar="[JSON]", is_flag=False, flag_value="{}", help="Sweep decoding settings over lists.")
@click.option("--settings", metavar="JSON", default="{}", help="Decoding settings as JSON.")
@click.option("--base", metavar="MODEL", help="The AR model beside it; default: the same weights without adapters.")
@click.option("--estimator", default="exact_count", show_default=True, help="Of the likelihood's bound.")
@click.option("--samples", type=int, default=128, show_default=True, help="Of the noise, a text or completion.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all noise.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows at once.")
@click.option("--max-length", type=int, help="Tokens of a window.")
@click.option("--num-fewshot", type=int, help="Worked examples before a task's question.")
@click.option("--chat-template", is_flag=True, help="Ask tasks through the chat template.")
@click.option("--judge", metavar="URL", help="Of an OpenAI-style API: a model there reads worked answers too.")
@click.option("--judge-model", metavar="NAME", help="The model at --judge; its key is read from OPENAI_API_KEY.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
def evaluate(models: tuple[str, ...], output: str, **options: Any) -> None:
    """Measure converted MODELS beside the AR base of the first: likelihood, tasks, answers, speed; one report."""
    with one_line_errors():
        from rich.console import Console

        from .evaluation.evaluate import run
        from .job import check_writable

        quiet_hosts()
        folder = Path(output).expanduser()
        check_writable(folder, "--output")
        console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
        if run(models, folder, console, **options):
            click.echo(f"report: {folder / 'report.html'}")


def load_inference(model: str, settings: str) -> Any:
    from .config import read_mapping
    from .generation.inference import DiffusionInference, default_decoding

    quiet_hosts()
    chosen = read_mapping(settings, "--settings")
    inference = DiffusionInference.from_pretrained(model, **chosen)
    inference.settings |= default_decoding(inference.model, chosen)
    return inference


def show_left_aside(*sources: str | None) -> None:
    """Says which keys of a DiffuGPT config mean nothing in their combination."""
    from .config import read_mapping
    from .diffugpt_config import is_diffugpt_config, left_aside

    given: dict[str, Any] = {}
    for source in filter(None, sources):
        given |= read_mapping(source, "--config")
    if is_diffugpt_config(given):
        aside = left_aside(given)
        for why in dict.fromkeys(aside.values()):
            logger.info("left aside: " + ", ".join(f"`{key}`" for key in aside if aside[key] == why) + f": {why}")


def start_logging() -> None:
    logger.remove()
    terminal = sys.stderr.isatty()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of missing CPU kernels that are not needed
    logger.add(sys.stderr, format="<green>{time:HH:mm:ss}</green> {message}", colorize=terminal, level="INFO")


def quiet_hosts() -> None:
    """The hosts' progress bars are for terminals; a log gets lines instead."""
    # PEFT asks transformers by an old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def show_analysis(hp: HyperParameters) -> None:
    """What is about to be converted, and the memory it takes."""
    from rich.console import Console

    from .analysis import analysis_tables, analyze

    analysis = analyze(
        hp.model,
        batch_size=hp.batch_size,
        length=hp.max_length,
        lora_rank=hp.lora_config.get("r", 16),
        attention=hp.training.get("attention") or "bidirectional",
        gradient_checkpointing=hp.training.get("gradient_checkpointing", True),
        trust_remote_code=hp.trust_remote_code,
    )
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for table in analysis_tables(analysis):
        console.print(table)


if __name__ == "__main__":
    cli()
